"""`Braid(weights="int8")`: right, by itself in the store, and refused by name where it can't be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from braidsdk import Braid
from braidsdk.engine.kernel_choice import KernelsWarning
from braidsdk.errors import InputError
from braidsdk.fidelity.agreement import compared
from braidsdk.kernels import native
from braidsdk.kernels.backends import Backends
from braidsdk.kernels.weight import Int8, quantised
from braidsdk.models.registry import load_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Weights in int8 save memory")
BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(bool(native.obstacle()), reason="no C kernels"))]


@pytest.mark.parametrize("kernels", BACKENDS)
def test_it_answers(tmp_path: Path, kernels: str) -> None:
    with Braid("braid-tiny", store=tmp_path, device="cpu", dtype="bfloat16", weights="int8", kernels=kernels) as braid:
        assert str(braid.kernels) == kernels
        rules = braid.register_system("You answer questions from the documents.")
        document = braid.register("The capital of Aistonia is Zorbin.")
        assert str(braid.ask("What is the capital of Aistonia?", chunks=[rules, document])) == "Zorbin."


def test_its_entries_are_its_own(tmp_path: Path) -> None:
    stats = []
    for weights in ("auto", "int8", "int8", "auto"):
        with Braid("braid-tiny", store=tmp_path, device="cpu", dtype="float32", weights=weights) as braid:
            braid.register_system("You answer questions from the documents.")
            stats.append((braid.stats().entries, sorted(group.model for group in braid.stats().groups)))
    both = ["braid-tiny", "braid-tiny (int8)"]
    assert stats == [(1, both[:1]), (2, both), (2, both), (2, both)]


@pytest.mark.parametrize("tied", [False, True])
def test_products_are_in_int8_and_nothing_else(make_checkpoint: Callable[..., Path], tied: bool) -> None:
    folder = make_checkpoint(tie_word_embeddings=tied)

    def load(*, int8: bool) -> object:
        return load_model(folder, device=CPU, dtype=torch.float32, int8=int8, choose=lambda *_: Backends())

    model, plain = load(int8=True), load(int8=False)
    for layer, same in zip(model._layers, plain._layers, strict=True):
        for made, weight in (
            (layer.qkv.qkv, same.qkv.qkv),
            (layer.out, same.out),
            (layer.gate_up, same.gate_up),
            (layer.down, same.down),
        ):
            assert isinstance(made, Int8)
            assert torch.equal(made.values, quantised(weight).values)
        assert torch.equal(layer.mlp_norm, same.mlp_norm)
        assert torch.equal(layer.qkv.k_norm, same.qkv.k_norm)
    assert torch.equal(model.embedding, plain.embedding)
    assert torch.equal(model._head.values, quantised(plain._head).values)
    assert model.fingerprint != plain.fingerprint
    assert model.geometry.int8


def test_a_warning_says_where_it_is_slow(tmp_path: Path) -> None:
    with (
        pytest.warns(KernelsWarning, match="torch's operations convert them") as said,
        Braid("braid-tiny", store=tmp_path, device="cpu", dtype="float32", weights="int8"),
    ):
        pass
    assert len(said) == 1


@pytest.mark.parametrize("weights", ["int4", "", None, 8])
def test_other_forms_are_refused(tmp_path: Path, weights: object) -> None:
    with pytest.raises(InputError, match="weights must be 'auto' or 'int8'; got"):
        Braid("braid-tiny", store=tmp_path, weights=weights)  # type: ignore[arg-type]


def test_an_agreement_is_that_of_the_distributions() -> None:
    torch.manual_seed(0)
    theirs, ids = torch.randn(600, 50, dtype=torch.float64), torch.randint(50, (600,))
    ours = theirs + 0.3 * torch.randn_like(theirs)
    found = compared(ours, theirs, ids)
    mine, their = ours.log_softmax(-1), theirs.log_softmax(-1)
    assert found.tokens == 600
    assert found.kl == pytest.approx(float((their.exp() * (their - mine)).sum(-1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((mine.argmax(-1) == their.argmax(-1)).double().mean()))
    told = torch.nn.functional.cross_entropy
    assert found.perplexity == pytest.approx(float(told(ours[:-1], ids[1:]).exp()), rel=1e-4)
    assert found.their_perplexity == pytest.approx(float(told(theirs[:-1], ids[1:]).exp()), rel=1e-4)
    same = compared(theirs, theirs, ids)
    assert (same.kl, same.top1) == (0.0, 1.0)
