"""`braid doctor`: what it finds when all is well, and each trouble."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from braidsdk import Braid, Context, Kernels
from braidsdk.cli import checks, model_checks
from braidsdk.cli.checks import Finding, Subject, look
from braidsdk.kernels import native
from braidsdk.kernels.selftest import Result

Cli = Callable[..., Any]


@pytest.fixture
def subject(tmp_path: Path, random_checkpoint: Path) -> Any:
    subject = Subject(str(random_checkpoint), "cpu", "float32", "auto", tmp_path / "store", tmp_path / "scratch")
    yield subject
    if subject.braid:
        subject.braid.close()


@pytest.fixture
def opened(subject: Subject) -> Subject:
    assert look(model_checks.check_model, subject).status == "ok"
    return subject


@pytest.fixture
def store(subject: Subject) -> Path:
    """A store with two computed chunks."""
    with Braid(subject.model, store=subject.store, device="cpu", dtype="float32") as braid:
        for text in ("Be brief.", "Be kind."):
            braid.register_system(text)
    return subject.store


def test_all_is_well(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("add", "--system", "rules.txt", "-q")
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count())  # tests run with one thread
    report = cli("doctor", "--json").json
    assert report["ok"] is True
    found = {check["check"]: check for check in report["checks"]}
    assert list(found) == [
        "versions", "processor", "device", "store", "integrity", "disk space", "disk speed",
        "model", "dtype", "seams", "numerics", "kernels",
    ]  # fmt: skip
    assert found.pop("kernels")["status"] == "skip", "they need a CUDA device"
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}
    assert {"python", "torch", "transformers", "safetensors", "sqlite"} <= set(found["versions"]["facts"])
    assert found["store"]["facts"]["entries"] == 1
    assert found["numerics"]["facts"]["error"] < found["numerics"]["facts"]["limit"] == 1e-4
    assert len(cli("ls", "--json").json) == 1, "the checks left something in the store"


def test_a_failure_is_a_line_with_a_remedy_and_ends_with_1(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    ended = cli("doctor", "--model", "nowhere", code=1)
    lines = ended.stdout.splitlines()
    assert any(line.startswith("fail  store: The store") for line in lines)
    assert any(line.startswith("fail  model: No checkpoint at 'nowhere'") for line in lines)
    assert any(line.startswith("skip  numerics:") for line in lines)
    assert "failed." in ended.stderr
    assert json.loads(cli("doctor", "--model", "nowhere", "--json", code=1).stdout)["ok"] is False


def test_a_damaged_entry_is_found_and_named(subject: Subject, store: Path) -> None:
    assert checks.check_integrity(subject).status == "ok"
    one, other = (store / "entries").rglob("*.safetensors")
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    found = checks.check_integrity(subject)
    assert (found.status, found.facts["damaged"]) == ("warn", [one.stem])
    other.unlink()
    assert set(checks.check_integrity(subject).facts["damaged"]) == {one.stem, other.stem}


def test_a_full_or_slow_disk_is_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = checks.shutil.disk_usage(subject.store.parent)
    for free, status in ((10, "fail"), (10**9, "warn"), (10**12, "ok")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert checks.check_disk_space(subject).status == status
    monkeypatch.setattr(checks, "SLOW_DISK_BYTES_PER_S", 1e15)
    slow = checks.check_disk_speed(subject)
    assert (slow.status, "SSD" in slow.remedy) == ("warn", True)
    assert list(subject.store.parent.iterdir()) == [], "the probe left a file"


def test_idle_cores_are_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    found = checks.check_processor(subject)
    assert (found.status, "OMP_NUM_THREADS=64" in found.remedy) == ("warn", True)


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
def test_what_c_kernels_are_compiled_for_is_said(subject: Subject) -> None:
    low = replace(subject, dtype="bfloat16")
    assert look(model_checks.check_model, low).status == "ok"
    found = model_checks.check_kernels(low)
    assert (found.status, found.facts["level"]) == ("ok", native.level().name)
    assert native.level().name in found.detail
    assert low.braid is not None
    low.braid.close()


def test_bfloat16_without_its_instructions_is_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    low = replace(subject, dtype="bfloat16")
    monkeypatch.setenv("BRAID_KERNELS", "torch")  # the C kernels do without them
    assert look(model_checks.check_model, low).status == "ok"
    monkeypatch.setattr(model_checks, "processor", lambda: ("old", {"avx2"}))
    found = model_checks.check_dtype(low)
    assert (found.status, "float32" in found.remedy) == ("warn", True)
    assert model_checks.check_numerics(low).status == "ok"
    assert low.braid is not None
    low.braid.close()


def test_prompts_that_differ_from_the_template_are_said(opened: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_checks.check_seams(opened).status == "ok"
    real = Context.prompt_ids
    monkeypatch.setattr(Context, "prompt_ids", lambda self, question: real(self, question)[1:])
    assert model_checks.check_seams(opened).status == "warn"


def test_each_kernel_is_a_line_and_one_that_fails_is_a_failure(
    opened: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        Result("norm_qkv", "1 row", error=1e-3, limit=1e-2, us=4.2, bandwidth=0.45),
        Result("attention", "5 rows of 5 requests", error=2e-3, limit=1e-2, us=21.0, bandwidth=0.5),
    ]
    monkeypatch.setattr(Kernels, "obstacle", lambda self, path: None)
    monkeypatch.setattr(Kernels, "self_test", lambda self, timed: results)
    found = model_checks.check_kernels(opened)
    assert found.status == "ok"
    assert "the model runs on torch, no CUDA graphs" in found.detail
    assert "norm_qkv   1 row                 1.0e-03       4.2 us    45%" in found.detail
    results.append(Result("head", "1 row", None, 1e-2, trouble="CompilationError: no registers left"))
    found = model_checks.check_kernels(opened)
    assert (found.status, "BRAID_KERNELS=torch" in found.remedy) == ("fail", True)
    assert "head       1 row                 FAIL: CompilationError: no registers left" in found.detail
    assert found.facts["cases"][0]["bandwidth"] == 0.45


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_DEVICE", "cuda")
    report = cli("doctor", "--json").json
    kernels = next(check for check in report["checks"] if check["check"] == "kernels")
    assert kernels["status"] == "ok", kernels["detail"]
    assert kernels["facts"]["backends"] == "triton"
    assert kernels["facts"]["launches"]["decoding of 1"] > 0
    assert {case["op"] for case in kernels["facts"]["cases"]} == {"norm_qkv", "attention", "out_proj", "swiglu", "head"}
    assert all(case["bandwidth"] > 0 for case in kernels["facts"]["cases"])


@pytest.mark.parametrize("scale", [0.97, float("nan")])
def test_a_wrong_scale_of_the_scores_fails_the_numbers(
    opened: Subject, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    assert model_checks.check_numerics(opened).status == "ok"
    real = Context.next_token_logits
    monkeypatch.setattr(Context, "next_token_logits", lambda self, question: real(self, question) * scale)
    found = model_checks.check_numerics(opened)
    assert (found.status, found.remedy != "") == ("fail", True)


def test_a_model_that_would_not_fit_twice_is_not_loaded_twice(opened: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "free_memory", lambda _: 10)
    assert model_checks.check_numerics(opened).status == "skip"


def test_what_a_check_raises_is_a_finding(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    def check_nothing(_: Subject) -> Finding:
        raise ZeroDivisionError("by nothing")

    assert look(check_nothing, subject).detail == "ZeroDivisionError: by nothing"
    assert capsys.readouterr().err == ""
    look(check_nothing, subject, debug=True)
    assert "Traceback" in capsys.readouterr().err
