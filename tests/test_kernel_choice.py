"""Which kernels a model takes on a CPU, and what is shown while a GPU's are tried."""

import logging
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from braidsdk import Braid
from braidsdk.engine import kernel_choice
from braidsdk.engine.kernel_choice import KernelsWarning
from braidsdk.engine.self_test import _processes, self_test
from braidsdk.errors import InputError
from braidsdk.kernels import native
from braidsdk.kernels.backends import Backends, Geometry
from braidsdk.kernels.selftest import CASES

TORCH, NATIVE = Backends(), Backends.all("native")

needs_native = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))


def backends(store: Path, kernels: str | None = None, dtype: str = "bfloat16") -> Backends:
    with Braid("braid-tiny", store=store, device="cpu", dtype=dtype, kernels=kernels) as braid:
        return Backends(**braid.kernels.backends)  # type: ignore[arg-type]


def pretend(monkeypatch: pytest.MonkeyPatch, *, cpu: str | None, all_told: str | None) -> None:
    monkeypatch.setattr(native, "cpu_obstacle", lambda: cpu)
    monkeypatch.setattr(native, "obstacle", lambda: all_told)


@needs_native
def test_bfloat16_takes_c_kernels(tmp_path: Path) -> None:
    assert backends(tmp_path) == backends(tmp_path, "native") == NATIVE
    assert backends(tmp_path, "torch") == backends(tmp_path, dtype="float32") == TORCH
    assert backends(tmp_path, "auto,attention=torch").attention == "torch"
    assert backends(tmp_path, "torch,attention=native") == Backends(attention="native")


@needs_native
def test_the_backend_is_taken_and_changes_no_answer(tmp_path: Path) -> None:
    answers = []
    for kernels in ("native", "torch"):
        with Braid("braid-tiny", store=tmp_path, device="cpu", dtype="bfloat16", kernels=kernels) as braid:
            rules = braid.register_system("You answer questions from the documents.")
            document = braid.register("The capital of Aistonia is Zorbin.")
            answers.append(str(braid.ask("What is the capital of Aistonia?", chunks=[rules, document])))
    assert answers == ["Zorbin.", "Zorbin."]


def test_a_cpu_that_is_too_old_takes_torch_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu="this CPU lacks amx_bf16", all_told="this CPU lacks amx_bf16")
    assert backends(tmp_path) == TORCH
    with pytest.raises(InputError, match="kernels='native' can't run here: this CPU lacks amx_bf16"):
        backends(tmp_path, "native")


def test_a_machine_without_a_compiler_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu=None, all_told="there is no C compiler; install gcc or clang")
    with pytest.warns(KernelsWarning, match="install gcc") as said:
        assert backends(tmp_path) == TORCH
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends(tmp_path, "torch") == backends(tmp_path, dtype="float32") == TORCH


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(InputError, match=f"in torch.{dtype}; the C kernels need bfloat16"):
        backends(tmp_path, "native", dtype)


def test_triton_still_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kernels='triton' can't run here: the model is on cpu"):
        backends(tmp_path, "triton")
    with pytest.raises(InputError, match="'auto', 'triton', 'native' or 'torch'"):
        backends(tmp_path, "cuda")


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, deadly: str = "()", start: str = "") -> None:
    """A self-test on three cores that needs no GPU.

    Args:
        deadly: the cases that end their process.
        start: what a process does first.
    """
    script = folder / "python"
    script.write_text(
        f"""#!{sys.executable}
import os, sys
print("loading")
{start}
while taken := os.read(0, 1):
    if taken[0] in {deadly}:
        sys.exit(f"broken by {{taken[0]}}")
    result = '"op": "swiglu", "case": "1 row", "error": 0.0, "limit": 1e-5'
    os.write(1, f'\\n{{{{"number": {{taken[0]}}, {{result}}}}}}\\n'.encode())
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    monkeypatch.setattr(kernel_choice, "user_cache_dir", lambda _: folder)
    monkeypatch.setattr(kernel_choice, "_setting", lambda *_: "here")


CPU = torch.device("cpu")
SHAPE = Geometry(hidden=64, intermediate=96, q_heads=4, kv_heads=2, head_dim=32, vocab=1024, dtype="float32")


@pytest.mark.parametrize("timed", [False, True])
def test_each_case_of_the_self_test_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: bool) -> None:
    steps: list[tuple[int, int]] = []
    stand_in(tmp_path, monkeypatch)
    results = self_test(SHAPE, CPU, timed=timed, report=lambda *step: steps.append(step))
    assert [result.op for result in results] == ["swiglu"] * len(CASES)
    assert all(result.ok for result in results)
    assert steps == [(done, len(CASES)) for done in range(len(CASES) + 1)]


def test_a_case_that_ends_its_process_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = (0, 1, 2, 3, 7)  # more than there are processes at first
    stand_in(tmp_path, monkeypatch, deadly=str(deadly))
    results = self_test(SHAPE, CPU, timed=False)
    assert [number for number, result in enumerate(results) if not result.ok] == list(deadly)
    for number in deadly:
        assert results[number].op == CASES[number].op
        assert re.match(r"(?s)its process ended with 1: .*broken by \d$", results[number].trouble)
    found = kernel_choice._troubles(SHAPE, CPU)
    assert set(found) == {CASES[number].op for number in deadly}
    assert not list(tmp_path.glob("*.json")), "it may not happen again"


def test_processes_that_cannot_begin_fail_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, start="sys.exit('no torch here')")
    results = self_test(SHAPE, CPU, timed=False)
    assert len(results) == len(CASES)
    assert all("no torch here" in result.trouble for result in results)


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, start=f"open(f'{tmp_path}/{{os.getpid()}}.pid', 'w')")

    def interrupt(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_test(SHAPE, CPU, timed=False, report=interrupt)
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.stem), 0)


@pytest.mark.parametrize(("gigabytes", "processes"), [(1, 1), (7, 2), (80, 3)])
def test_processes_fit_in_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, processes: int
) -> None:
    shape = replace(SHAPE, hidden=2048, vocab=151_936, dtype="bfloat16")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, 80 * 10**9))
    assert _processes(shape, torch.device("cuda")) == processes


def test_the_first_start_says_what_it_does_and_the_second_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stand_in(tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO, "braidsdk"):
        assert kernel_choice._troubles(SHAPE, CPU) == {}
        assert [re.split(", | in ", record.message)[0] for record in caplog.records] == [
            "compiling and trying each kernel",
            f"tried {len(CASES)} cases of the kernels",
        ]
        assert f"{len(CASES)}/{len(CASES)}" in capfd.readouterr().err
        caplog.clear()
        assert kernel_choice._troubles(SHAPE, CPU) == {}
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_the_results_lie_in_a_folder_that_c_kernels_can_lie_in_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    folder = tmp_path / "cache" / "braidsdk"
    monkeypatch.setattr(kernel_choice, "user_cache_dir", lambda _: folder)
    before = os.umask(0o002)
    try:
        kernel_choice._troubles(SHAPE, CPU)
    finally:
        os.umask(before)
    assert (folder / "kernels.json").exists()
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
