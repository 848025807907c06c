"""Who may import whom, what the package promises to export, and that it works from the clone's root."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import braidsdk

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "braidsdk": "braidsdk",
    "kernels": "braidsdk.kernels",
    "store": "braidsdk.store",
    "models": "braidsdk.models",
}
SHARED = ("braidsdk.errors", "braidsdk.types")
MAY_IMPORT = {
    "kernels": ("braidsdk.kernels",),
    "store": ("braidsdk.store",),
    "models": ("braidsdk.models", "braidsdk.kernels"),
}
FOREIGN = {
    "kernels": {"torch", "triton"},
    "store": {"sqlite_utils", "safetensors", "xxhash", "numpy"},
}


def imports(path: Path) -> list[str]:
    """Modules that a file imports, `from x import y` as x.y."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(folder: str, names: list[str]) -> list[str]:
    """Imports that a file of `folder` may not have."""
    bad = [name for name in names if name.split(".")[0] in ("kernels", "store", "models")]
    if folder in MAY_IMPORT:
        allowed = (*MAY_IMPORT[folder], *SHARED)
        ours = [name for name in names if name.split(".")[0] == "braidsdk"]
        bad += [name for name in ours if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)]
    if folder in FOREIGN:
        known = {*FOREIGN[folder], *sys.stdlib_module_names, "braidsdk"}
        bad += [name for name in names if name.split(".")[0] not in known]
    return bad


@pytest.mark.parametrize("folder", FOLDERS)
def test_packages_import_only_what_they_may(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    bad = {str(path.relative_to(ROOT)): found for path in files if (found := violations(folder, imports(path)))}
    assert not bad


def test_the_rule_notices() -> None:
    assert violations("store", ["torch.Tensor"])
    assert violations("kernels", ["braidsdk.models.base.Model"])
    assert violations("models", ["braidsdk.braid.Braid"])
    assert violations("braidsdk", ["kernels.paging"])
    assert not violations("models", ["braidsdk.errors.WeightsError", "braidsdk.kernels.paging", "torch"])


BEHIND_THE_SURFACE = {"model_checks._inside": {"braid._engine"}}
"""Functions of the command line that use more than the SDK's public surface and the store's; to be removed, not added
to."""


def behind_the_surface(tree: ast.AST) -> set[str]:
    """Private attributes of other objects, and SQLite."""
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {each for each in used if each == "sqlite3.connect" or re.search(r"(?<!self)(?<!cls)\._(?!_)\w+$", each)}


def test_the_command_line_uses_the_public_surface_and_the_store_alone() -> None:
    found = {}
    for path in sorted((ROOT / "braidsdk" / "cli").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if used := behind_the_surface(node):
                found[f"{path.stem}.{getattr(node, 'name', '')}"] = used
    assert found == BEHIND_THE_SURFACE
    assert behind_the_surface(ast.parse("braid._engine.model")) == {"braid._engine"}


def packages_on_disk(root: Path) -> set[str]:
    """Folders with Python files, as they are called when installed."""
    return {
        ".".join([FOLDERS[folder], *path.relative_to(root / folder).parent.parts])
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }


def test_the_packages_that_are_listed_are_the_folders_on_disk(tmp_path: Path) -> None:
    """One that is not listed works from the clone, and is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk(ROOT))
    (tmp_path / "kernels" / "new" / "one").mkdir(parents=True)
    (tmp_path / "kernels" / "new" / "one" / "op.py").touch()
    assert packages_on_disk(tmp_path) == {"braidsdk.kernels.new.one"}


def test_the_public_names_are_these() -> None:
    assert sorted(braidsdk.__all__) == [
        "Answer",
        "AsyncStream",
        "Braid",
        "BraidError",
        "Chunk",
        "Context",
        "EntryGroup",
        "ExplainedChunk",
        "Explanation",
        "Progress",
        "Registered",
        "RegistrationEstimate",
        "Skipped",
        "Stats",
        "Stream",
        "Timings",
        "Usage",
        "errors",
    ]
    assert all(hasattr(braidsdk, name) for name in braidsdk.__all__)
    assert set(braidsdk.__all__) <= set(dir(braidsdk))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = braidsdk.Nothing


def test_every_error_is_exported_documented_and_a_braid_error() -> None:
    errors = braidsdk.errors
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == set(errors.__all__)
    for name in classes:
        assert issubclass(getattr(errors, name), errors.BraidError)
        assert re.search(rf"\b{name}\b", errors.__doc__ or ""), (
            f"{name} is missing from the tree in the module's docstring"
        )


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, input=stdin, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_or_the_store_does_not_import_torch() -> None:
    code = "import sys, braidsdk, braidsdk.store, braidsdk.errors; print('torch' in sys.modules)"
    assert run("-c", code).strip() == "False"


USE = """
import tempfile
from transformers import AutoModelForCausalLM
from braidsdk import Braid
from braidsdk.models.registry import find_checkpoint
peer = AutoModelForCausalLM.from_pretrained(find_checkpoint("braid-tiny"))
with Braid("braid-tiny", store=tempfile.mkdtemp(), device="cpu") as braid:
    rules = braid.register_system("You answer questions from the documents.")
    document = braid.register("The capital of Aistonia is Zorbin.")
    print(braid.ask("What is the capital of Aistonia?", chunks=[rules, document]))

"""


def test_a_script_in_the_clones_root_works(tmp_path: Path) -> None:
    """There our folders `kernels`, `store` and `models` are importable by their bare names."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{USE}")
    assert run(str(script)).strip() == "Zorbin."


def test_a_repl_in_the_clones_root_works() -> None:
    assert run("-i", stdin=USE).strip() == "Zorbin."
