"""`braid store check`."""

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
    assert cli("store", "check").stdout == "1 entry, 0 read whole: sound\n"
    assert cli("store", "check", "--read-data", "100%").stdout == "1 entry, 1 read whole: sound\n"
    assert cli("store", "check", "--json").json == {
        "sound": True,
        "entries": 1,
        "read": 0,
        "index": [],
        "damaged": [],
        "stray": [],
    }


def test_check_names_what_is_damaged_and_ends_with_4(cli: Cli, store: Path) -> None:
    (path,) = store.glob("entries/*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "sound" in cli("store", "check").stdout
    ended = cli("store", "check", "--read-data", "1.0", code=4)
    assert f"entry {path.stem}: its content does not match its digest" in ended.stdout
    assert ended.stdout.endswith("1 damaged entry\n")
    path.unlink()
    assert not cli("store", "check", "--json", code=4).json["sound"]


@pytest.mark.parametrize("share", ["x", "101%", "-1", "nan", "2"])
def test_a_share_that_is_none_is_a_usage_error(cli: Cli, store: Path, share: str) -> None:
    assert "from 0% to 100%" in cli("store", "check", "--read-data", share, code=2).stderr


def test_no_store_is_not_found(cli: Cli, tmp_path: Path) -> None:
    assert "No store" in cli("store", "check", "--store", str(tmp_path / "nowhere"), code=3).stderr
