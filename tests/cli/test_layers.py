"""`braid doctor --layers`: a fault shows in the layer that has it, and in no other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from braidsdk.cli import layer_checks
from braidsdk.kernels import native
from braidsdk.kernels.paging import append
from braidsdk.models import decoder
from braidsdk.models.registry import load_model

Cli = Callable[..., Any]
FAULTY = 1

DTYPES = ["float32", "bfloat16"]


def scaled(monkeypatch: pytest.MonkeyPatch, model: decoder.Decoder) -> None:
    """Attention's output projection times 0.97."""
    layers = list(model._layers)
    out = layers[FAULTY].out
    layers[FAULTY] = replace(layers[FAULTY], out=(out.to_dense() if out.is_mkldnn else out) * 0.97)
    model._layers = tuple(layers)


def normed_late(monkeypatch: pytest.MonkeyPatch, model: decoder.Decoder) -> None:
    """Keys normed by their weights after RoPE, which differs wherever the weights do."""
    honest = decoder.norm_qkv

    def norm_qkv(hidden: Tensor, weights: Any, eps: float, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor, **how):
        if weights is not model._layers[FAULTY].qkv:
            return honest(hidden, weights, eps, cos, sin, kv, slots, **how)
        plain = replace(weights, k_norm=torch.ones_like(weights.k_norm))
        queries = honest(hidden, plain, eps, cos, sin, kv, slots, **how)
        keys, values = kv.transpose(2, 3).flatten(1, 2)[:, slots]
        append(kv, slots, keys * weights.k_norm, values)
        return queries

    monkeypatch.setattr(decoder, "norm_qkv", norm_qkv)


def late_rows(monkeypatch: pytest.MonkeyPatch, model: decoder.Decoder) -> None:
    """A MLP that is wrong where one row is computed by itself."""
    honest = decoder.norm_swiglu

    def norm_swiglu(hidden: Tensor, norm: Tensor, gate_up: Tensor, *rest: Any, **how: Any) -> Tensor:
        factor = 0.97 if gate_up is model._layers[FAULTY].gate_up and len(hidden) == 1 else 1.0
        return honest(hidden, norm, gate_up, *rest, **how) * factor

    monkeypatch.setattr(decoder, "norm_swiglu", norm_swiglu)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Plants a fault in models that the command loads."""

    def planted(fault: Callable[..., None]) -> None:
        def load(folder: Path, **how: Any) -> object:
            model = load_model(folder, **how)
            fault(monkeypatch, model)
            return model

        monkeypatch.setattr(layer_checks, "load_model", load)

    return planted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_model_is_as_near_to_the_truth_as_transformers(cli: Cli, random_checkpoint: Path, dtype: str) -> None:
    ended = cli("doctor", "--layers", str(random_checkpoint), "--dtype", dtype)
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [(row[0], row[-1]) for row in rows] == [("0", "ok"), ("1", "ok"), ("2", "ok")]
    report = cli("doctor", "--layers", str(random_checkpoint), "--dtype", dtype, "--json").json
    backend = "torch" if dtype == "float32" or native.obstacle() else "native"
    assert (report["ok"], report["dtype"], report["device"], report["backends"]) == (True, dtype, "cpu", backend)
    assert [[each["name"] for each in layer["passes"]] for layer in report["layers"]] == [
        ["documents", "question", "answer"]
    ] * 3
    errors = [each["ours"] for layer in report["layers"] for each in layer["passes"]]
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert all(eps / 100 < error < 30 * eps for error in errors), "roundings, a few of them"


@pytest.mark.filterwarnings("ignore:Weights in int8 save memory")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_int8_are_judged_by_their_rounding_and_tell_what_they_cost(cli: Cli, dtype: str) -> None:
    plain, rounded = (
        cli("doctor", "--layers", "braid-tiny", "--dtype", dtype, "--weights", weights, "--json").json
        for weights in ("auto", "int8")
    )
    assert plain["ok"]
    assert rounded["ok"]
    assert (plain["weights"], rounded["weights"]) == ("auto", "int8")
    errors = [each["ours"] for layer in rounded["layers"] for each in layer["passes"]]
    assert all(2e-3 < error < layer_checks.INT8_SMALL for error in errors)
    assert plain["agreement"]["kl"] < rounded["agreement"]["kl"] < 1e-3
    assert rounded["agreement"]["top1"] > 0.95
    assert rounded["agreement"]["their_perplexity"] == plain["agreement"]["their_perplexity"]
    assert 0 < abs(rounded["agreement"]["perplexity"] / rounded["agreement"]["their_perplexity"] - 1) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_is_one_on_a_gpu(cli: Cli, random_checkpoint: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_KERNELS", "triton")
    report = cli("doctor", "--layers", str(random_checkpoint), "--device", "cuda", "--dtype", dtype, "--json").json
    assert (report["device"], report["backends"]) == ("cuda:0", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (scaled, {"documents", "question", "answer"}),
        (normed_late, {"documents", "question", "answer"}),
        (late_rows, {"answer"}),
    ],
    ids=["a weight times 0.97", "K-norm after RoPE", "wrong for one row"],
)
def test_a_fault_shows_in_its_layer_and_pass_alone(
    cli: Cli, random_checkpoint: Path, plant: Callable, fault: Callable, where: set[str], dtype: str
) -> None:
    plant(fault)
    ended = cli("doctor", "--layers", str(random_checkpoint), "--dtype", dtype, "--json", code=1)
    wrong = {
        (layer["layer"], each["name"])
        for layer in ended.json["layers"]
        for each in layer["passes"]
        if each["ours"] > layer_checks.SMALL + layer_checks.RATIO * each["transformers"]
    }
    assert wrong == {(FAULTY, name) for name in where}
    assert ended.json["ok"] is False
    assert "1 layer with more than 1.25 times transformers' error" in ended.stderr


def test_nan_is_a_fault(cli: Cli, random_checkpoint: Path, plant: Callable) -> None:
    plant(lambda _, model: model._layers[FAULTY].out.fill_(float("nan")))
    rows = [line.split("\t") for line in cli("doctor", "--layers", str(random_checkpoint), code=1).stdout.splitlines()]
    assert [row[-1] for row in rows] == ["ok", "FAIL", "ok"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_models_without_norms_of_heads_are_checked_too(
    cli: Cli, make_checkpoint: Callable[..., Path], family: str
) -> None:
    folder = str(make_checkpoint(family=family))
    ended = cli("doctor", "--layers", folder, "--dtype", "float32")
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [(row[0], row[1], row[-1]) for row in rows] == [(index, "-", "ok") for index in "012"]


def test_a_file_has_no_layers_of_transformers(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    said = cli("doctor", "--layers", str(tmp_path / "model.gguf"), code=1).stderr
    assert "must be a folder, to be compared" in said


def test_the_largest_k_norm_weight_is_listed(cli: Cli, make_checkpoint: Callable[..., Path]) -> None:
    from transformers import Qwen3ForCausalLM

    folder = make_checkpoint()
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, largest in enumerate((96.5, -41.0, 3.0)):
        model.model.layers[index].self_attn.k_norm.weight.data[5] = largest
    model.save_pretrained(folder)
    report = cli("doctor", "--layers", str(folder), "--json").json
    assert [layer["largest_k_norm"] for layer in report["layers"]] == [96.5, 41.0, 3.0]


def test_a_model_that_would_not_fit_twice_is_refused(
    cli: Cli, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_checks, "free_memory", lambda _: 10)
    assert "10 B are free" in cli("doctor", "--layers", str(random_checkpoint), code=1).stderr
    assert cli("doctor", "--layers", "nowhere", code=3)
