"""`braid.kernels`: what the model runs on; on a GPU see cli/test_doctor.py and test_gpu.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from braidsdk import Braid, Kernels, model_kernels
from braidsdk.errors import ClosedError, InputError
from braidsdk.kernels import native
from braidsdk.kernels.selftest import Result

OPS = ["norm_qkv", "attention", "out_proj", "swiglu", "head"]


def test_each_operation_has_a_path(random_braid: Braid) -> None:
    assert random_braid.kernels.paths == dict.fromkeys(OPS, "torch")
    assert str(random_braid.kernels) == "torch"


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
def test_paths_may_differ_and_are_said_in_words(tmp_path: Path) -> None:
    with Braid(
        "braid-tiny", store=tmp_path, device="cpu", dtype="bfloat16", kernels="amx,attention=torch,head=torch"
    ) as braid:
        assert [braid.kernels.paths[op] for op in OPS] == ["amx", "torch", "amx", "amx", "torch"]
        assert braid.kernels.obstacle("amx") is None
        assert str(braid.kernels) == "amx for norm_qkv and out_proj and swiglu, torch for attention and head"


def test_what_is_in_the_way_of_faster_kernels(random_braid: Braid) -> None:
    assert random_braid.kernels.obstacle("triton") == "the model is on cpu; Triton kernels need a CUDA device"
    assert random_braid.kernels.obstacle("amx") == "the model is in torch.float32; the C kernels need bfloat16"


@pytest.mark.parametrize("path", ["torch", "cuda", "", None, ["amx"]])
def test_a_path_without_kernels_of_its_own_is_refused(random_braid: Braid, path: object) -> None:
    with pytest.raises(InputError, match="path must be 'triton' or 'amx'; got"):
        random_braid.kernels.obstacle(path)  # type: ignore[arg-type]


def test_without_triton_there_is_no_self_test(random_braid: Braid) -> None:
    with pytest.raises(InputError, match=r"must be able to run this model; the model is on cpu.*obstacle\('triton'\)"):
        random_braid.kernels.self_test()


def test_the_self_test_is_of_this_model_and_reports(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result("head", "1 row", error=0.0, limit=1e-5)

    def tested(model: object, *, timed: bool, report: Callable[[int, int], None]) -> list[Result]:
        report(int(timed), model.config.head_dim)  # type: ignore[attr-defined]
        return [result]

    steps: list[tuple[int, int]] = []
    monkeypatch.setitem(model_kernels.OBSTACLES, "triton", lambda model: None)
    monkeypatch.setattr(model_kernels, "self_test", tested)

    assert random_braid.kernels.self_test(timed=True, on_progress=lambda *step: steps.append(step)) == [result]
    assert steps == [(1, 32)], "timed, and a model with a head_dim of 32"


@pytest.mark.parametrize(
    "use",
    [lambda it: it.paths, lambda it: it.obstacle("amx"), lambda it: it.self_test(), lambda it: it.launches()],
    ids=["paths", "obstacle", "self_test", "launches"],
)
def test_a_closed_braid_says_so(random_braid: Braid, use: Callable[[Kernels], object]) -> None:
    random_braid.close()
    with pytest.raises(ClosedError):
        use(random_braid.kernels)
