"""Warming up, where there is nothing to compile; on a GPU see test_gpu.py."""

import pytest

from braidsdk import Braid
from braidsdk.errors import ClosedError, InputError
from braidsdk.progress import steps_bar


def test_on_a_cpu_there_is_nothing_to_warm_up(random_braid: Braid) -> None:
    steps: list[tuple[int, int]] = []
    random_braid.warm_up(on_progress=lambda done, total: steps.append((done, total)))
    assert not steps
    assert random_braid.kernels.launches() == {}


@pytest.mark.parametrize("requests", [0, 65, 1.0, True, "all"])
def test_a_number_of_requests_that_cannot_be_used(random_braid: Braid, requests: object) -> None:
    with pytest.raises(InputError, match="requests must be a whole number from 1 to 64"):
        random_braid.warm_up(requests=requests)  # type: ignore[arg-type]


def test_a_closed_braid_is_not_warmed_up(random_braid: Braid) -> None:
    random_braid.close()
    with pytest.raises(ClosedError):
        random_braid.warm_up(progress=False)


def test_steps_are_shown_on_a_terminal_only_and_leave_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        with steps_bar("warming up") as report:
            report(0, 3)
            report(3, 3)
        with steps_bar("not needed"):
            pass
        return capfd.readouterr().err

    assert shown() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown()
    assert "warming up" in text
    assert "3/3" in text
    assert "not needed" not in text
