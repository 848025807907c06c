"""`braid store check` and `braid store repair`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.fixture
def store(cli: Cli, tmp_path: Path) -> Path:
    cli("add", "rules.txt", "--system")
    return tmp_path / "store"


def test_check_says_that_all_is_well(cli: Cli, store: Path) -> None:
    assert cli("store", "check").stdout == "1 chunk, 1 entry, 0 read whole: sound\n"
    assert cli("store", "check", "--read-data", "100%").stdout == "1 chunk, 1 entry, 1 read whole: sound\n"
    assert cli("store", "check", "--json").json == {
        "sound": True,
        "entries": 1,
        "read": 0,
        "index": [],
        "damaged": [],
        "stray": [],
        "chunks": 1,
        "behind": [],
    }


def test_check_names_what_is_damaged_and_ends_with_4(cli: Cli, store: Path) -> None:
    (path,) = store.glob("entries/*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "sound" in cli("store", "check").stdout
    ended = cli("store", "check", "--read-data", "1.0", code=4)
    assert f"entry {path.stem}: its content does not match its digest" in ended.stdout
    assert ended.stdout.endswith("1 damaged entry\n")
    path.unlink()
    assert not cli("store", "check", "--json", code=4).json["sound"]


def test_repair_rebuilds_what_a_damaged_index_held(cli: Cli, store: Path) -> None:
    before = cli("ls", "--json").json
    assert cli("store", "repair").stdout == "nothing was damaged\n"
    (store / "index.db").write_bytes(b"junk" * 5000)
    assert "braid store repair" in cli("store", "check", code=4).stderr
    assert cli("store", "repair").stdout == "rebuilt the index from the files: 1 chunk and 1 entry\n"
    assert cli("ls", "--json").json == before
    assert before[0]["name"] == "rules.txt"
    assert cli("store", "check", "--read-data", "100%").stdout.endswith("sound\n")


def test_repair_says_what_it_mends(cli: Cli, store: Path) -> None:
    (entry,), (chunk,) = store.glob("entries/*/*"), store.glob("chunks/*/*")
    entry.write_bytes(b"junk")
    chunk.unlink()
    ended = cli("store", "check", code=4).stdout
    assert ended.endswith("1 damaged entry, 1 file of chunks to write again\n")
    shown = cli("store", "repair").stdout
    assert f"set aside: entry {entry.stem}: " in shown
    assert f"written again: chunk {chunk.stem}: it is missing" in shown
    assert cli("store", "repair", "--json").json == {
        "rebuilt": None,
        "damaged": [],
        "written": [],
        "taken_in": [],
        "removed": [],
        "old_index": None,
    }
    assert "sound" in cli("store", "check").stdout


@pytest.mark.parametrize("share", ["x", "101%", "-1", "nan", "2"])
def test_a_share_that_is_none_is_a_usage_error(cli: Cli, store: Path, share: str) -> None:
    assert "from 0% to 100%" in cli("store", "check", "--read-data", share, code=2).stderr


def test_no_store_is_not_found(cli: Cli, tmp_path: Path) -> None:
    assert "No store" in cli("store", "check", "--store", str(tmp_path / "nowhere"), code=3).stderr


def test_limits_are_set_shown_and_kept(cli: Cli, store: Path) -> None:
    assert cli("store", "limit").stdout == "store: no limit of bytes, any age\n"
    ended = cli("store", "limit", "--max-bytes", "1.5GB", "--max-age", "30")
    assert ended.stdout == "store: at most 1.5 GB, at most 30 days unused\n"
    assert ended.stderr == "0 entries of 0 B evicted.\n"
    cli("store", "limit", "--max-age", "none")
    cli("store", "limit", "--namespace", "one", "--max-bytes", "10 kb")
    assert cli("store", "limit", "--json").json == {
        "": {"max_bytes": 1.5e9, "max_age_s": None},
        "one": {"max_bytes": 10_000.0, "max_age_s": None},
    }
    assert cli("gc").stdout == "0 entries of 0 B evicted\n"
    assert "1 entry of" in cli("store", "limit", "--max-bytes", "1").stderr
    assert cli("ls").stdout, "texts stay"


@pytest.mark.parametrize(
    "wrong", [("--max-bytes", "much"), ("--max-bytes", "-5"), ("--max-age", "x"), ("--max-age", "-1")]
)
def test_a_limit_that_is_none_is_a_usage_error(cli: Cli, store: Path, wrong: tuple[str, str]) -> None:
    assert "must be a" in cli("store", "limit", *wrong, code=2).stderr


def test_gc_says_what_it_removed(cli: Cli, store: Path) -> None:
    (entry,) = store.glob("entries/*/*")
    entry.with_name(entry.name[:2] + "0" * 30 + ".safetensors").write_bytes(entry.read_bytes())
    assert "removed 1 stray file and 0 damaged files" in cli("gc").stdout
    assert cli("gc", "--json").json["strays"] == 0


def test_an_index_elsewhere_is_named_by_the_environment(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAID_INDEX", str(tmp_path / "indexes"))
    cli("add", "rules.txt", "--system", "--store", "other")
    for command in (("ls",), ("store", "check"), ("store", "repair"), ("doctor",), ("gc",)):
        cli(*command, "--store", "other")
    assert not Path("other", "index.db").exists()
    monkeypatch.delenv("BRAID_INDEX")
    assert "must be opened where it is" in cli("ls", "--store", "other", code=1).stderr
