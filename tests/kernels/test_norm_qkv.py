"""RMSNorm, QKV, QK-norm, RoPE and append against the float64 reference, in the interpreter where there is no GPU."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from braidsdk.kernels.norm_qkv import NormQKVWeights, eager, launch, norm_qkv
from braidsdk.kernels.products import launch as products_launch

EPS = 1e-6
PAGE = 16
ROWS = [1, 2, 3, 7, 15, 16, 17, 33, 65]


@dataclass(frozen=True)
class Geometry:
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads} heads of {self.head_dim}, hidden {self.hidden}"


SMALL = Geometry(96, 4, 2, 32)
PADDED = [Geometry(96, 2, 1, 80), Geometry(64, 3, 1, 96)]
GEOMETRIES = [SMALL, Geometry(160, 8, 1, 64), Geometry(64, 2, 2, 128), Geometry(40, 5, 1, 16), *PADDED]
QWEN3_06B = Geometry(1024, 16, 8, 128)


@dataclass(frozen=True)
class Case:
    """Arguments of the operation; `slots` are scattered over pages, every fifth row from the second is padding."""

    hidden: Tensor
    weights: NormQKVWeights
    cos: Tensor
    sin: Tensor
    slots: Tensor
    kv_shape: tuple[int, ...]

    def run(self, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Queries, and the memory afterwards, which held NaN everywhere."""
        dtype = dtype or self.hidden.dtype
        kv = torch.full(self.kv_shape, float("nan"), dtype=dtype, device=self.hidden.device)
        fields = vars(self.weights).items()
        weights = replace(self.weights, **{name: value.to(dtype) for name, value in fields if value is not None})
        angles = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = self.cos.to(angles), self.sin.to(angles)
        return norm_qkv(self.hidden.to(dtype), weights, EPS, cos, sin, kv, self.slots, backend=backend), kv

    def written(self, kv: Tensor) -> Tensor:
        """Keys and values of the rows that are not padding: [2, rows, kv_heads, head_dim]."""
        slots = self.slots[self.slots >= 0]
        return kv[:, slots // PAGE, :, slots % PAGE].transpose(0, 1)


def make(
    rows: int,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    head_norms: bool = True,
) -> Case:
    hidden, head_dim = geometry.hidden, geometry.head_dim
    out = (geometry.q_heads + 2 * geometry.kv_heads) * head_dim
    angles = torch.rand(rows, head_dim // 2, device=device, dtype=torch.float64) * 6.28
    pages = rows // PAGE + 3
    slots = torch.randperm(pages * PAGE, device=device)[:rows]
    slots[1::5] = -1

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    return Case(
        draw(rows, hidden, scale=3.0),
        NormQKVWeights(
            norm=draw(hidden).abs() + 0.5,
            qkv=draw(out, hidden, scale=hidden**-0.5),
            bias=draw(out) if bias else None,
            q_norm=draw(head_dim).abs() / 50 if head_norms else None,
            k_norm=draw(head_dim).abs() * 50 if head_norms else None,
        ),
        angles.cos().float(),
        angles.sin().float(),
        slots,
        (2, pages, geometry.kv_heads, PAGE, head_dim),
    )


def check(case: Case, dtype: torch.dtype, assert_near) -> None:
    """Queries, keys and values each near the truth, and nothing else written."""
    queries, kv = case.run("triton")
    true_queries, true_kv = case.run("torch", torch.float64)
    assert_near(queries, true_queries, dtype)
    for ours, truth in zip(case.written(kv), case.written(true_kv), strict=True):
        if len(ours):
            assert_near(ours, truth, dtype)
    assert torch.equal(kv.isnan(), true_kv.isnan())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_truth(rows, bias, dtype, device, seed, poisoned, assert_near) -> None:
    check(make(rows, SMALL, dtype, device, bias=bias), dtype, assert_near)


@pytest.mark.parametrize("rows", [1, 3, 16, 65])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_other_geometries(geometry, rows, dtype, device, seed, poisoned, assert_near) -> None:
    check(make(rows, geometry, dtype, device), dtype, assert_near)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 65])
def test_heads_without_norms_equal_the_truth(rows, bias, dtype, device, seed, poisoned, assert_near) -> None:
    """As in Llama, and in Qwen2 with a bias. Nothing scales the product's rounding, so the room is the same: up to 64
    rows the only rounding beside the normed input's is at the end; above, the library rounds the product too, by half
    of an eps of the eight."""
    check(make(rows, SMALL, dtype, device, bias=bias, head_norms=False), dtype, assert_near)


@pytest.mark.parametrize("rows", [1, 17])
def test_sizes_over_several_blocks(rows, dtype, device, seed, poisoned, assert_near) -> None:
    """More columns than are in flight at once, and a number of them that is no multiple of a block."""
    check(make(rows, Geometry(1304, 1, 1, 32), dtype, device), dtype, assert_near)


@pytest.mark.parametrize(("hidden", "head_dim"), [(896, 16), (2048, 16), (2560, 16), (96, 80)])
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
def test_nothing_is_read_past_the_ends(
    rows, hidden, head_dim, dtype, device, seed, poisoned, fenced, assert_near
) -> None:
    case = make(rows, Geometry(hidden, 1, 1, head_dim), dtype, device, bias=True)
    weights = NormQKVWeights(**{name: fenced(value) for name, value in vars(case.weights).items()})
    check(
        replace(case, hidden=fenced(case.hidden), weights=weights, cos=fenced(case.cos), sin=fenced(case.sin)),
        dtype,
        assert_near,
    )


@pytest.mark.parametrize("programs", [1, 1000], ids=["", "columns split"])
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_rows_of_a_program_and_parts_of_the_columns_change_rounding_only(
    rows, programs, device, monkeypatch, tiles_of, seed, poisoned, assert_near
) -> None:
    """Whatever entry of the table serves, alone or several programs of it."""
    monkeypatch.setattr(launch, "FEW_ROWS", 128)
    monkeypatch.setattr(launch, "TILES", tiles_of(rows, launch.TILES))
    monkeypatch.setattr(products_launch, "PROGRAMS", programs)
    check(make(rows + 5, replace(SMALL, hidden=336), torch.float32, device), torch.float32, assert_near)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 5, 65])
def test_padding_rows_append_nothing(rows, backend, device, seed) -> None:
    case = make(rows, SMALL, torch.float32, device)
    case.slots.fill_(-1)
    queries, kv = case.run(backend)
    assert kv.isnan().all()
    assert queries.isfinite().all()
    if rows > 1:
        case.slots[-1] = 0
        _, kv = case.run(backend)
        assert case.written(kv).isfinite().all()
        assert kv.isnan().sum() == kv.numel() - case.written(kv).numel()


def test_on_a_cpu_padding_rows_do_not_even_write_back(monkeypatch) -> None:
    """Other threads may be writing to the page of slot 0."""
    written = []
    monkeypatch.setattr(eager, "append", lambda kv, slots, *_: written.extend(slots.tolist()))
    case = make(5, SMALL, torch.float32, torch.device("cpu"))
    case.slots.fill_(-1)
    case.run("torch")
    assert not written
    case.slots[3] = 7
    case.run("torch")
    assert written == [7]


@pytest.mark.parametrize("rows", [1, 17, 65])
def test_running_again_gives_the_same_bits(rows, device, seed) -> None:
    case = make(rows, SMALL, torch.float16, device)
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("head_norms", [True, False], ids=["", "no QK norms"])
@pytest.mark.parametrize("rows", [2, 33, 65])
def test_is_as_close_to_the_truth_as_torch(rows, head_norms, dtype, device, assert_as_good) -> None:
    if dtype == torch.float32:
        pytest.skip("float32 rounds nothing but its sums")
    geometry = QWEN3_06B if device.type == "cuda" else Geometry(256, 2, 1, 64)
    factor = 50 if head_norms else 1

    def results():
        case = make(rows, geometry, dtype, device, head_norms=head_norms)
        parts = []
        for backend, wanted in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
            queries, kv = case.run(backend, wanted)
            # Values and keys in one number: each scaled to about one first.
            keys, values = case.written(kv)
            parts.append(torch.cat([queries.flatten() * factor, keys.flatten() / factor, values.flatten()]))
        return tuple(parts)

    assert_as_good(results)


def test_no_rows(device) -> None:
    queries, kv = make(0, SMALL, torch.float32, device).run("triton")
    assert queries.shape == (0, 4, 32)
    assert kv.isnan().all()


def test_refuses_what_does_not_fit(device) -> None:
    case = make(3, SMALL, torch.float32, device)
    with pytest.raises(ValueError, match=r"slots of shape \[3\], got \[2\]"):
        replace(case, slots=case.slots[:2].contiguous()).run("triton")
    with pytest.raises(ValueError, match=r"cos of shape \[3, 16\], got \[2, 16\]"):
        replace(case, cos=case.cos[:2]).run("triton")
    with pytest.raises(ValueError, match=r"slots contiguous, torch.int64 .* got torch.int32"):
        replace(case, slots=case.slots.int()).run("triton")
    with pytest.raises(ValueError, match="multiple of 16"):
        make(3, Geometry(96, 2, 1, 24), torch.float32, device).run("triton")


@pytest.mark.parametrize(("given", "lost"), [("q_norm", "k_norm"), ("k_norm", "q_norm")])
def test_refuses_one_qk_norm_without_the_other(given, lost, device) -> None:
    case = make(3, SMALL, torch.float32, device)
    with pytest.raises(ValueError, match=f"q_norm and k_norm or neither, got {given} alone"):
        replace(case, weights=replace(case.weights, **{lost: None})).run("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("head_norms", [True, False], ids=["", "no QK norms"])
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 100])
def test_the_geometry_of_qwen3(rows, head_norms, dtype, device, seed, poisoned, assert_near) -> None:
    case = make(rows, QWEN3_06B, dtype, device, bias=not head_norms, head_norms=head_norms)
    check(case, dtype, assert_near)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 65])
def test_memory_past_two_billion_elements(rows, device, seed, assert_near) -> None:
    geometry = Geometry(64, 2, 8, 128)
    case = make(rows, geometry, torch.float16, device)
    page_size, pages = 64, 2**31 // (8 * 64 * 128) // 2 + 8  # keys and values, each just past a billion
    kv = torch.zeros(2, pages, 8, page_size, 128, dtype=torch.float16, device=device)
    slots = torch.arange(pages * page_size - rows, pages * page_size, device=device)
    norm_qkv(case.hidden, case.weights, EPS, case.cos, case.sin, kv, slots, backend="triton")
    ours = kv[:, slots // page_size, :, slots % page_size]
    small = torch.zeros(2, 2, 8, page_size, 128, dtype=torch.float16, device=device)
    near = torch.arange(2 * page_size - rows, 2 * page_size, device=device)
    norm_qkv(case.hidden, case.weights, EPS, case.cos, case.sin, small, near, backend="triton")
    assert torch.equal(ours, small[:, near // page_size, :, near % page_size])
    assert torch.count_nonzero(kv) == torch.count_nonzero(small)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_same_bits(device, seed) -> None:
    case = make(4, QWEN3_06B, torch.bfloat16, device)
    kv = torch.zeros(case.kv_shape, dtype=torch.bfloat16, device=device)
    arguments = (case.hidden, case.weights, EPS, case.cos, case.sin, kv, case.slots)
    eager = norm_qkv(*arguments, backend="triton")
    appended = kv.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [norm_qkv(*arguments, backend="triton") for _ in range(8)]
    for _ in range(20):
        kv.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, eager) for out in outputs)
        assert torch.equal(kv, appended)
