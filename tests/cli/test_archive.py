"""`braid store export` and `braid store import`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.fixture
def archive(cli: Cli, tmp_path: Path) -> Path:
    cli("add", "rules.txt", "--system")
    assert cli("store", "export", "corpus.tar").stdout.startswith("1 chunk, 1 entry, ")
    return Path("corpus.tar")


def test_a_corpus_moves_to_another_store(cli: Cli, archive: Path) -> None:
    done = cli("store", "import", str(archive), "--store", "other")
    assert done.stdout == "1 chunk, 1 entry; new: 1 chunk, 1 of the entries\n"
    assert cli("ls", "--json", "--store", "other").json == cli("ls", "--json").json
    assert cli("store", "import", str(archive), "--store", "other", "--json").json["new_chunks"] == 0


def test_names_choose_chunks(cli: Cli, archive: Path) -> None:
    assert cli("store", "export", "some.tar", "rules*", "--json").json["chunks"] == 1
    assert "No chunk" in cli("store", "export", "none.tar", "nothing", code=3).stderr


def test_a_key_signs(cli: Cli, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_ARCHIVE_KEY", "secret")
    assert cli("store", "export", "signed.tar").stdout.endswith(", signed\n")
    assert "is not signed" in cli("store", "import", str(archive), "--store", "other", code=4).stderr
    cli("store", "import", "signed.tar", "--store", "other")


def test_files_that_are_not_archives(cli: Cli, archive: Path) -> None:
    assert "must not be there yet" in cli("store", "export", str(archive), code=4).stderr
    assert "No archive" in cli("store", "import", "nowhere.tar", code=3).stderr
    archive.write_text("junk")
    assert "Nothing was imported" in cli("store", "import", str(archive), code=4).stderr
