"""`braid.kernels`: what the model runs on; on a GPU see cli/test_doctor.py and test_gpu.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk import Braid, Kernels, model_kernels
from braidsdk.errors import ClosedError, InputError
from braidsdk.kernels import native
from braidsdk.kernels.backends import Geometry
from braidsdk.kernels.selftest import Result

OPS = ["norm_qkv", "attention", "out_proj", "swiglu", "head"]


def test_each_operation_has_a_backend(random_braid: Braid) -> None:
    assert random_braid.kernels.backends == dict.fromkeys(OPS, "torch")
    assert str(random_braid.kernels) == "torch"


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
def test_backends_may_differ_and_are_said_in_words(tmp_path: Path) -> None:
    with Braid(
        "braid-tiny", store=tmp_path, device="cpu", dtype="bfloat16", kernels="native,attention=torch,head=torch"
    ) as braid:
        assert [braid.kernels.backends[op] for op in OPS] == ["native", "torch", "native", "native", "torch"]
        assert braid.kernels.obstacle("native") is None
        assert str(braid.kernels) == "native for norm_qkv and out_proj and swiglu, torch for attention and head"


def test_what_is_in_the_way_of_faster_kernels(random_braid: Braid) -> None:
    assert random_braid.kernels.obstacle("triton") == "the model is on cpu; Triton kernels need a CUDA device"
    assert random_braid.kernels.obstacle("native") == "the model is in torch.float32; the C kernels need bfloat16"


@pytest.mark.parametrize("backend", ["cuda", "", None, ["native"]])
def test_no_other_backend_is_known(random_braid: Braid, backend: object) -> None:
    with pytest.raises(InputError, match="backend must be 'torch' or 'native' or 'triton'; got"):
        random_braid.kernels.obstacle(backend)  # type: ignore[arg-type]


def test_without_triton_there_is_no_self_test(random_braid: Braid) -> None:
    with pytest.raises(InputError, match=r"must be able to run this model; the model is on cpu.*obstacle\('triton'\)"):
        random_braid.kernels.self_test()


def test_the_self_test_is_of_this_model_and_reports(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result("head", "1 row", error=0.0, limit=1e-5)

    def tested(geometry: Geometry, _: object, *, timed: bool, report: Callable[[int, int], None]) -> list[Result]:
        report(int(timed), geometry.head_dim)
        return [result]

    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(model_kernels, "obstacle", lambda *_: None)
    monkeypatch.setattr(model_kernels, "self_test", tested)

    assert random_braid.kernels.self_test(timed=True, on_progress=lambda *step: steps.append(step)) == [result]
    assert steps == [(1, 32)], "timed, and a model with a head_dim of 32"


@pytest.mark.parametrize(
    "use",
    [lambda it: it.backends, lambda it: it.obstacle("native"), lambda it: it.self_test(), lambda it: it.launches()],
    ids=["backends", "obstacle", "self_test", "launches"],
)
def test_a_closed_braid_says_so(random_braid: Braid, use: Callable[[Kernels], object]) -> None:
    random_braid.close()
    with pytest.raises(ClosedError):
        use(random_braid.kernels)
