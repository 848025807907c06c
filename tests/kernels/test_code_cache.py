"""Compiled code on disk: what is refused because somebody else could have put it there, and that what was checked is
what is loaded."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk.kernels import code_cache, native

if sys.platform != "linux":
    pytest.skip("C kernels are for Linux", allow_module_level=True)

ROOT = os.geteuid() == 0
OTHER = os.geteuid() + 12345
"""A user that is neither root nor the one who runs the tests."""

needs_root = pytest.mark.skipif(not ROOT, reason="only root can give files away")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

NAME = "code.so"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's folder."""
    (tmp_path / "home").mkdir(mode=0o700)
    return tmp_path / "home"


@pytest.fixture
def folder(home: Path) -> Path:
    return home / "cache" / "native"


@pytest.fixture
def kept(folder: Path) -> Path:
    """A file that is kept, of the code b"code"."""
    with code_cache.opened(folder) as opened:
        code_cache.write(opened, NAME, b"code")
    return folder / NAME


def read(folder: Path) -> bytes | None:
    with code_cache.opened(folder) as opened:
        return code_cache.read(opened, NAME)


def refuses(folder: Path, why: str) -> None:
    with pytest.raises(RuntimeError, match=rf"others could write to .*{why}.*set XDG_CACHE_HOME to your own folder"):
        read(folder)


def as_kept(code: bytes) -> bytes:
    return code + hashlib.sha256(code).digest()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_created_is_the_users_alone(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with code_cache.opened(folder) as opened:
            code_cache.write(opened, NAME, b"code")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder, folder / NAME)] == [0o700, 0o700, 0o600]
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert read(folder) == b"code"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_folder_that_others_can_write_to_is_refused_wherever_it_is_above(
    kept: Path, home: Path, mode: int, levels: int
) -> None:
    bad = (kept.parent, kept.parent.parent, home)[levels]
    bad.chmod(mode)
    refuses(kept.parent, rf"{bad} \(its mode is d")


def test_nothing_is_created_under_a_folder_that_is_refused(folder: Path, home: Path) -> None:
    home.chmod(0o777)
    refuses(folder, "its mode is drwxrwxrwx")
    assert not list(home.iterdir())


def test_a_sticky_folder_is_safe_above_a_folder_of_the_user(kept: Path, home: Path) -> None:
    home.chmod(0o1777)
    assert read(kept.parent) == b"code"


def test_a_sticky_folder_is_not_safe_itself(kept: Path) -> None:
    kept.parent.chmod(0o1777)
    refuses(kept.parent, "its mode is drwxrwxrwt")


@needs_root
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("levels", [0, 1])
def test_a_folder_of_somebody_else_is_refused(kept: Path, home: Path, sticky: bool, levels: int) -> None:
    """In /tmp others may have created it first."""
    home.chmod(0o1777 if sticky else 0o755)
    os.chown((kept.parent, kept.parent.parent)[levels], OTHER, OTHER)
    refuses(kept.parent, f"it belongs to user {OTHER}")


@needs_root
def test_a_file_of_somebody_else_is_refused(kept: Path) -> None:
    os.chown(kept, OTHER, OTHER)
    refuses(kept.parent, f"{NAME} .*it belongs to user {OTHER}.*delete it")


@needs_root
def test_what_belongs_to_root_is_safe_for_a_user(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert read(kept.parent) == b"code"


@pytest.mark.skipif(ROOT, reason="what belongs to root is safe for all")
def test_what_belongs_to_a_user_is_not_safe_for_another(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    refuses(kept.parent, f"it belongs to user {os.getuid()}")


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_to_is_refused(kept: Path, mode: int) -> None:
    kept.chmod(mode)
    refuses(kept.parent, f"{NAME} .*its mode is -rw")


def test_a_file_of_two_names_is_refused(kept: Path, home: Path) -> None:
    os.link(kept, home / "elsewhere")
    refuses(kept.parent, f"{NAME} .*it has 2 names.*delete it")


def test_what_is_not_a_regular_file_is_refused(kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept, 0o600)
    refuses(kept.parent, "it is not a regular file")


def test_a_symlink_in_place_of_the_file_is_not_followed(kept: Path, home: Path) -> None:
    kept.rename(home / "elsewhere")
    kept.symlink_to(home / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        read(kept.parent)


@pytest.mark.parametrize("left", [0, 3, 35])
def test_a_damaged_file_is_as_good_as_none(kept: Path, left: int) -> None:
    kept.write_bytes(kept.read_bytes()[:left])
    assert read(kept.parent) is None
    kept.unlink()
    assert read(kept.parent) is None


def test_a_home_under_a_symlink_is_the_folder_that_it_leads_to(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("home")
    assert read(tmp_path / "link" / "cache" / "native") == b"code"


def test_where_a_symlink_leads_is_checked(kept: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("home")
    home.chmod(0o777)
    refuses(tmp_path / "link" / "cache" / "native", "its mode is drwxrwxrwx")


@pytest.mark.parametrize("below", ["cache", "cache/native"])
def test_a_symlink_that_takes_a_folders_place_meanwhile_is_not_followed(
    kept: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """Between the resolving of links and the walk."""
    honest = os.path.realpath

    def swapped(path: Path) -> str:
        real = honest(path)
        (home / below).rename(tmp_path / "moved")
        (home / below).symlink_to(tmp_path / "moved")
        return real

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(NotADirectoryError):
        read(kept.parent)


def test_what_takes_the_folders_place_after_the_check_is_not_read(kept: Path, tmp_path: Path) -> None:
    with code_cache.opened(kept.parent) as opened:
        kept.parent.rename(tmp_path / "moved")
        kept.parent.mkdir()
        kept.write_bytes(as_kept(b"bad"))
        assert code_cache.read(opened, NAME) == b"code"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """A library whose function `answer` gives a number."""
    folder = tmp_path_factory.mktemp("compiled")

    def code(number: int) -> bytes:
        (folder / "answer.c").write_text(f"int answer(void) {{ return {number}; }}")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", "answer.so", "answer.c"], cwd=folder, check=True)
        return (folder / "answer.so").read_bytes()

    return code


@needs_compiler
def test_what_was_read_is_what_is_loaded(
    compiled: Callable[[int], bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file is rewritten in place, or replaced, when the linker is about to open its path."""
    honest = ctypes.CDLL

    def swapped(path: str) -> ctypes.CDLL:
        (folder / NAME).write_bytes(as_kept(compiled(2)))
        (folder / "new").write_bytes(as_kept(compiled(2)))
        (folder / "new").replace(folder / NAME)
        return honest(path)

    with code_cache.opened(folder) as opened:
        code_cache.write(opened, NAME, compiled(1))
        monkeypatch.setattr(ctypes, "CDLL", swapped)
        assert code_cache.load(NAME, code_cache.read(opened, NAME) or b"").answer() == 1


@needs_compiler
def test_a_descriptor_that_is_used_again_is_another_library(compiled: Callable[[int], bytes]) -> None:
    """As in a daemon, which closes all that it finds open."""
    taken = []
    for number in (3, 4, 5):
        assert code_cache.load(NAME, compiled(number)).answer() == number
        for link in Path("/proc/self/fd").iterdir():
            if link.is_symlink() and str(link.readlink()).startswith(f"/memfd:{NAME}"):
                taken.append(int(link.name))
                os.close(taken[-1])
    assert len(taken) > len(set(taken))


@needs_compiler
def test_what_is_loaded_is_sealed(compiled: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    honest, refused = ctypes.CDLL, []

    def attacked(path: str) -> ctypes.CDLL:
        descriptor = int(path.rpartition("/")[2])
        for attack in (lambda: os.pwrite(descriptor, b"bad", 0), lambda: os.truncate(descriptor, 0)):
            with pytest.raises(PermissionError) as error:
                attack()
            refused.append(error)
        return honest(path)

    monkeypatch.setattr(ctypes, "CDLL", attacked)
    assert code_cache.load(NAME, compiled(6)).answer() == 6
    assert len(refused) == 2


def test_code_that_cannot_run_from_memory_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(name: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", denied)
    with pytest.raises(RuntimeError, match=r"Permission denied.*vm\.memfd_noexec"):
        code_cache.load(NAME, b"code")


@pytest.fixture
def source(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file, which `native.library` compiles into the user's folder."""
    if platform.machine() != "x86_64":
        pytest.skip("C kernels are for x86-64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return 7; }")
    return file


@needs_compiler
def test_a_kernel_is_compiled_once_and_again_if_its_file_is_damaged(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = native.library.__wrapped__
    monkeypatch.setenv("TMPDIR", "/nowhere")  # the compiler's own files lie in the checked folder too
    assert load(source).answer() == 7
    (kept,) = (home / "braidsdk" / "native").iterdir()
    written = kept.stat()
    assert load(source).answer() == 7
    assert kept.stat().st_mtime_ns == written.st_mtime_ns
    kept.write_bytes(kept.read_bytes()[:5000])
    assert load(source).answer() == 7
    assert kept.stat().st_size == written.st_size


@needs_compiler
@pytest.mark.parametrize("mode", [0o700, 0o770])
def test_where_others_could_put_kernels_there_is_an_obstacle(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setattr(native, "cpu_obstacle", lambda: None)
    home.chmod(mode)
    native.library.cache_clear()
    try:
        said = str(native.obstacle.__wrapped__())
    finally:
        native.library.cache_clear()
    assert ("set XDG_CACHE_HOME to your own folder" in said) == (mode == 0o770)
