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
    "store": {"sqlite_utils", "xxhash", "numpy"},
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


FLOORS = (
    ("cli", "testing"),
    ("serve",),
    ("braid",),
    ("fidelity",),
    ("chunks", "context", "model_kernels"),
    ("answer", "ingest"),
    ("engine",),
    ("cache",),
    ("compose",),
    ("prompt",),
    ("store", "models", "kernels"),
)
"""Modules and folders of `braidsdk`: each imports itself, and what stands on lower floors. docs/design.md shows it."""

ANYONES = ("errors", "types", "settings", "logs", "progress", "plots")
"""What every floor may import. These import each other alone."""

NEVER = {
    "store": {"torch"},
    "braidsdk/prompt": {"torch"},
    "braidsdk/compose": {"torch"},
    "braidsdk/engine/scheduler.py": {"torch", "threading"},
}


def part_of(name: str) -> str:
    """The part of `braidsdk` that an import reads: `braidsdk.Braid` is at home in `braid`, as all that is the package's
    own."""
    first = "".join(name.split(".")[1:2])
    if first in ANYONES or any(first in floor for floor in FLOORS):
        return first
    return braidsdk._HOME.get(first, "braidsdk.braid").split(".")[1]


def upwards(part: str, names: list[str]) -> list[str]:
    """Imports of a part of `braidsdk` that do not point downwards."""
    below = {*ANYONES, part}
    if part not in ANYONES:
        (height,) = (height for height, floor in enumerate(FLOORS) if part in floor)
        below |= {each for floor in FLOORS[height + 1 :] for each in floor}
    return [name for name in names if name.split(".")[0] == "braidsdk" and part_of(name) not in below]


PARTS = sorted({path.relative_to(ROOT / "braidsdk").parts[0] for path in (ROOT / "braidsdk").rglob("*.py")})


@pytest.mark.parametrize("part", [each for each in PARTS if each != "__init__.py"])
def test_imports_inside_the_package_point_downwards(part: str) -> None:
    path = ROOT / "braidsdk" / part
    files, part = sorted(path.rglob("*.py")) or [path], path.stem
    assert part in ANYONES or any(part in floor for floor in FLOORS), f"{part} has no floor"
    bad = {str(path.relative_to(ROOT)): found for path in files if (found := upwards(part, imports(path)))}
    assert not bad


def test_the_rule_of_floors_notices() -> None:
    assert upwards("engine", ["braidsdk.answer.Stream"])
    assert upwards("compose", ["braidsdk.cache.pool.Pool"])
    assert upwards("context", ["braidsdk.chunks.Chunks"]), "two of one floor"
    assert upwards("prompt", ["braidsdk.Context"]), "where the name is at home"
    assert upwards("fidelity", ["braidsdk"]), "the package itself"
    assert upwards("errors", ["braidsdk.store.ChunkStore"])
    assert not upwards("testing", ["braidsdk.braid.Braid", "braidsdk.store.ChunkStore", "braidsdk.errors", "torch"])
    assert not upwards("cli", ["braidsdk.Braid", "braidsdk.__version__", "braidsdk.cli.exits.FAILED"])
    assert not upwards("progress", ["braidsdk.types.Progress"])


def test_the_design_shows_the_floors() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    assert "\n".join(", ".join(floor) for floor in FLOORS) in design
    assert ", ".join(ANYONES) in design


@pytest.mark.parametrize("where", NEVER)
def test_some_parts_never_import(where: str) -> None:
    files = sorted((ROOT / where).rglob("*.py")) or [ROOT / where]
    bad = {str(path.relative_to(ROOT)): found for path in files if (found := forbidden(where, imports(path)))}
    assert not bad


def forbidden(where: str, names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] in NEVER[where]]


def test_the_rule_of_what_is_never_imported_notices() -> None:
    assert forbidden("braidsdk/compose", ["torch.Tensor"])
    assert forbidden("braidsdk/engine/scheduler.py", ["threading.Lock"])
    assert not forbidden("braidsdk/prompt", ["threading.Lock", "braidsdk.errors"])


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


def behind_the_surface(tree: ast.AST) -> set[str]:
    """Private attributes of other objects, and SQLite."""
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {each for each in used if each == "sqlite3.connect" or re.search(r"(?<!self)(?<!cls)\._(?!_)\w+$", each)}


def test_the_command_line_uses_the_public_surface_and_the_store_alone() -> None:
    files = sorted((ROOT / "braidsdk" / "cli").glob("*.py"))
    assert files
    assert not {path.stem: used for path in files if (used := behind_the_surface(ast.parse(path.read_text())))}
    assert behind_the_surface(ast.parse("braid._engine.model")) == {"braid._engine"}


ABOUT_THE_ENGINE = {
    "engine",
    "conftest.py",  # for those that need a pool to look at, or logits of bare ids
    "test_graphs.py",
    "test_gpu.py",
    "test_architecture.py",
}
"""Tests that may reach into an engine: those of its parts. Others use what an application sees, so that a change of the
engine's parts does not break them."""


def reaches_into_the_engine(code: str) -> bool:
    return re.search(r"\b_engine\b", code) is not None


def test_tests_reach_into_the_engine_only_where_they_are_about_it() -> None:
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.relative_to(ROOT / "tests").parts[0] not in ABOUT_THE_ENGINE
    ]
    assert len(files) > 40
    assert not [path.name for path in files if reaches_into_the_engine(path.read_text())]
    assert reaches_into_the_engine("free = braid._engine.pool.room")
    assert not reaches_into_the_engine("from braidsdk.engine.engine import Engine; failing_engine()")


def packages_on_disk(root: Path) -> set[str]:
    """Folders with Python files, as they are called when installed."""
    return {
        ".".join([FOLDERS[folder], *path.relative_to(root / folder).parent.parts])
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }


def test_the_packages_that_are_listed_are_the_folders_on_disk(tmp_path: Path) -> None:
    """A package that is not listed works from the clone, but is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk(ROOT))
    (tmp_path / "kernels" / "new" / "one").mkdir(parents=True)
    (tmp_path / "kernels" / "new" / "one" / "op.py").touch()
    assert packages_on_disk(tmp_path) == {"braidsdk.kernels.new.one"}


def test_the_public_names_are_these() -> None:
    assert sorted(braidsdk.__all__) == [
        "Answer",
        "AsyncStream",
        "Auto",
        "Blended",
        "Braid",
        "BraidError",
        "Certificate",
        "Chunk",
        "ChunkVersion",
        "Context",
        "EntryGroup",
        "ExplainedChunk",
        "Explanation",
        "FidelityReport",
        "Guided",
        "Inline",
        "Kernels",
        "Linked",
        "Progress",
        "Registered",
        "RegistrationEstimate",
        "Skipped",
        "Source",
        "Stats",
        "Stream",
        "Timings",
        "TokenSources",
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


@pytest.mark.parametrize(
    "modules",
    [
        "braidsdk",
        "braidsdk.errors, braidsdk.store",
        "braidsdk.compose.modes",
        "braidsdk.prompt.history, braidsdk.prompt.answer_text",
        "braidsdk.engine.scheduler",
    ],
)
def test_importing_these_does_not_import_torch(modules: str) -> None:
    assert run("-c", f"import sys, {modules}; print('torch' in sys.modules)").strip() == "False"


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
