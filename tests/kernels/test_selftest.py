"""The self-test's cases, in the interpreter where there is no GPU, and whether they are all that warming up needs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from braidsdk.engine import kernel_choice
from braidsdk.kernels import selftest
from braidsdk.kernels.backends import Geometry
from braidsdk.kernels.norm_qkv import NormQKVWeights
from braidsdk.kernels.selftest import CASES, Bench, Case, check
from braidsdk.kernels.weight import Int8
from braidsdk.models.base import ModelConfig

SMALL = Geometry(hidden=32, intermediate=48, q_heads=2, kv_heads=1, head_dim=16, vocab=300, dtype="float32")


@pytest.fixture
def bench(device: torch.device, seed: int) -> Bench:
    return Bench(SMALL, device, timed=False)


def test_each_case_is_right(bench: Bench) -> None:
    for case in CASES:
        result = check(bench, case, 0.0)
        assert result.ok, (case, result)
        assert (result.op, result.case, result.us) == (case.op, case.name, None)


def test_weights_in_int8_are_tried_for_a_model_that_has_them(device: torch.device, seed: int) -> None:
    bench, dense = (Bench(replace(SMALL, int8=int8), device, timed=False) for int8 in (True, False))
    for case in CASES:
        if case.op != "attention" and case.name.startswith(("2 rows", "32 rows")):
            assert check(bench, case, 0.0).ok
    assert isinstance(bench.weight(3, 200), Int8)
    assert (bench.weight_bytes(3, 200), dense.weight_bytes(3, 200)) == (3 * 200 + 3 * 2 * 4, 3 * 200 * 4)


FORMS = [(True, False), (True, True), (False, False), (False, True)]


@pytest.mark.parametrize(("qk_norm", "qkv_bias"), FORMS)
def test_layers_are_tried_in_the_models_own_form(
    qk_norm: bool, qkv_bias: bool, device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[NormQKVWeights] = []
    real = selftest.norm_qkv

    def noted(hidden: torch.Tensor, weights: NormQKVWeights, *rest: object, **path: str) -> torch.Tensor:
        given.append(weights)
        return real(hidden, weights, *rest, **path)

    monkeypatch.setattr(selftest, "norm_qkv", noted)
    bench = Bench(replace(SMALL, qk_norm=qk_norm, qkv_bias=qkv_bias), device, timed=False)
    for case in CASES:
        if case.op == "norm_qkv":
            assert check(bench, case, 0.0).ok
    assert {(each.q_norm is not None, each.k_norm is not None, each.bias is not None) for each in given} == {
        (qk_norm, qk_norm, qkv_bias)
    }


def test_each_form_of_layers_is_tried_and_remembered_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    shapes = {"hidden_size": 32, "intermediate_size": 48, "q_heads": 2, "kv_heads": 1, "head_dim": 16}
    rest = {"layers": 1, "vocab_size": 300, "window": 64, "rope": "{}", "eos_ids": frozenset({1})}
    found = [
        ModelConfig(**shapes, **rest, qk_norm=qk_norm, qkv_bias=qkv_bias).geometry(torch.float32)
        for qk_norm, qkv_bias in FORMS
    ]
    assert found == [replace(SMALL, qk_norm=qk_norm, qkv_bias=qkv_bias) for qk_norm, qkv_bias in FORMS]
    assert len({kernel_choice._setting(each, torch.device("cpu")) for each in found}) == len(FORMS)


def the(op: str, name: str) -> Case:
    return next(case for case in CASES if (case.op, case.name) == (op, name))


def test_a_kernel_that_errs_or_does_not_run_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest.out_proj
    monkeypatch.setattr(selftest, "out_proj", lambda *given, **path: real(*given, **path) + bool(path) * 1e-3)
    result = check(bench, the("out_proj", "1 row after swiglu"), 0.0)
    assert not result.ok
    assert "expected at most" in result.trouble
    monkeypatch.setattr(selftest, "out_proj", lambda *_, **path: 1 // 0)
    assert "ZeroDivisionError" in check(bench, the("out_proj", "1 row after swiglu"), 0.0).trouble


def test_one_token_that_is_not_the_likeliest_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest.sample

    def wrong(logits: torch.Tensor, *rest: object, **path: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, finite = real(logits, *rest, **path)
        ids[-1] += 1
        return ids, finite

    monkeypatch.setattr(selftest, "sample", wrong)
    assert not check(bench, the("head", "choice of tokens"), 0.0).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_warming_up_compiles_nothing_that_was_not_tried(dtype: str, tmp_path: Path) -> None:
    """Else the first start compiles it, one kernel after another, and nobody has compared it with the reference."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("variants.py")), dtype]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if child.returncode == 77:
        pytest.skip(child.stderr)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert {"cascade", "merge", "products_kernel", "draw"} <= set(found["tried"])
    assert found["beyond"] == []
