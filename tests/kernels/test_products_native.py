"""The linear operations in C against the float64 references, in bfloat16."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from braidsdk.kernels import native
from braidsdk.kernels.head import norm_head
from braidsdk.kernels.norm_qkv import NormQKVWeights, norm_qkv
from braidsdk.kernels.out_proj import out_proj
from braidsdk.kernels.swiglu import norm_swiglu
from braidsdk.kernels.weight import Int8, Rows, quantised

pytestmark = pytest.mark.usefixtures("level")

BF16 = torch.bfloat16
EPS = 1e-6
PAGE = 16
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 65]
SIZES = [(96, 64), (896, 48), (160, 33), (41, 5), (1056, 70)]
"""Columns and outputs: whole tiles, a Qwen size that is no power of two, and what ends within a tile either way."""

Values = dict[str, object]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(BF16)


def project(rows: int, size: int, outputs: int, bias: bool = True) -> Values:
    weight, offset = draw(outputs, size, scale=size**-0.5), draw(outputs) if bias else None
    return {"x": draw(rows, size), "weight": weight, "bias": offset, "residual": draw(rows, outputs)}


def mix(rows: int, size: int, outputs: int) -> Values:
    return {
        "hidden": draw(rows, size, scale=3.0),
        "norm": draw(size).abs() + 0.5,
        "gate_up": draw(2 * outputs, size, scale=2 * size**-0.5),
        "eps": EPS,
    }


def score(rows: int, size: int, outputs: int) -> Values:
    head = draw(outputs, size, scale=size**-0.5)
    return {"hidden": draw(rows, size, scale=3.0), "norm": draw(size).abs() + 0.5, "head": head, "eps": EPS}


def wide(values: Values) -> Values:
    return {
        name: each.double()
        if isinstance(each, Tensor)
        else each.dense(torch.float64)
        if isinstance(each, Int8)
        else each
        for name, each in values.items()
    }


OPS: dict[str, tuple[Callable[..., Values], Callable[..., Tensor]]] = {
    "out_proj": (project, out_proj),
    "swiglu": (mix, norm_swiglu),
    "head": (score, norm_head),
}

each_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_op
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "outputs"), SIZES)
def test_equals_the_truth(name, rows, size, outputs, seed, poisoned, fenced, assert_near) -> None:
    """With NaN on both sides of everything that is read."""
    make, run = OPS[name]
    values = make(rows, size, outputs)
    between = {key: fenced(each) if isinstance(each, Tensor) else each for key, each in values.items()}
    assert_near(run(**between, backend="native"), run(**wide(values)), BF16)


@each_op
@pytest.mark.parametrize(("rows", "size"), [(700, 1024), (1100, 64), (300, 4128)])
def test_more_rows_than_are_computed_together(name, rows, size, seed, poisoned, assert_near) -> None:
    make, run = OPS[name]
    values = make(rows, size, 40)
    assert_near(run(**values, backend="native"), run(**wide(values)), BF16)


@pytest.mark.parametrize("rows", [1, 20])
def test_eps_counts(rows, seed, monkeypatch, assert_near) -> None:
    """Where it is as large as the mean squares are."""
    monkeypatch.setitem(globals(), "EPS", 0.7)
    for make, run in (OPS["swiglu"], OPS["head"]):
        values = make(rows, 96, 40)
        assert_near(run(**values, backend="native"), run(**wide(values)), BF16)
    case = Heads(rows, 96, 4, 2, 32)
    (ours, kv), (queries, truth) = case.run("native"), case.run("torch", torch.float64)
    assert_near(ours, queries, BF16)
    assert_near(case.written(kv)[0], case.written(truth)[0], BF16)


@pytest.mark.parametrize("rows", [1, 2, 33, 600])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_projection_is_rounded_once(rows, bias, seed) -> None:
    values = project(rows, 1024, 64, bias)
    truth = out_proj(**wide(values))
    best = (truth.to(BF16).double() - truth).norm()
    assert (out_proj(**values, backend="native").double() - truth).norm() <= 1.01 * best


def test_logits_are_not_rounded(seed) -> None:
    """But for the normed hidden states: their rounding is the only error, and a sum averages it."""
    values = score(4, 1024, 500)
    values["hidden"], values["norm"] = torch.ones(4, 1024, dtype=BF16), torch.ones(1024, dtype=BF16)
    truth = norm_head(**wide(values | {"eps": 0.0}))
    torch.testing.assert_close(norm_head(**values | {"eps": 0.0}, backend="native").double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [500, 1e30])
@pytest.mark.parametrize("rows", [1, 40])
def test_gates_far_out_stay_finite(rows, factor, seed, assert_near) -> None:
    values = mix(rows, 64, 40)
    values["gate_up"][:40] *= factor
    assert_near(norm_swiglu(**values, backend="native"), norm_swiglu(**wide(values)), BF16)


class Heads:
    """Arguments of norm_qkv; slots are scattered over pages, and every fifth row from the second is padding."""

    def __init__(
        self,
        rows: int,
        hidden: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        head_norms: bool = True,
    ) -> None:
        out = (q_heads + 2 * kv_heads) * head_dim
        pages = rows // PAGE + 3
        self.kv_shape = (2, pages, kv_heads, PAGE, head_dim)
        self.slots = torch.randperm(pages * PAGE)[:rows]
        self.slots[1::5] = -1
        angles = torch.rand(rows, head_dim // 2, dtype=torch.float64) * 6.28
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.hidden = draw(rows, hidden, scale=3.0)
        self.weights = NormQKVWeights(
            norm=draw(hidden).abs() + 0.5,
            qkv=draw(out, hidden, scale=hidden**-0.5),
            bias=draw(out) if bias else None,
            q_norm=draw(head_dim).abs() / 50 if head_norms else None,
            k_norm=draw(head_dim).abs() * 50 if head_norms else None,
        )

    def run(self, backend: str, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
        """Queries, and the memory afterwards, which held NaN everywhere."""
        kv = torch.full(self.kv_shape, float("nan"), dtype=dtype)
        fields = {name: each.to(dtype) for name, each in vars(self.weights).items() if isinstance(each, Tensor)}
        angles = (each.to(torch.promote_types(dtype, torch.float32)) for each in (self.cos, self.sin))
        weights = replace(self.weights, **fields)
        return norm_qkv(self.hidden.to(dtype), weights, EPS, *angles, kv, self.slots, backend=backend), kv

    def written(self, kv: Tensor) -> Tensor:
        """Keys and values of the rows that are not padding: [2, rows, kv_heads, head_dim]."""
        slots = self.slots[self.slots >= 0]
        return kv[:, slots // PAGE, :, slots % PAGE].transpose(0, 1)


HEADS = [
    (96, 4, 2, 32),
    (64, 3, 1, 80),
    (96, 2, 1, 48),
    (160, 8, 1, 64),
    (64, 2, 2, 128),
    (896, 7, 1, 64),
    (41, 3, 3, 96),
]


@pytest.mark.parametrize("rows", [*ROWS, 600])
@pytest.mark.parametrize("geometry", HEADS, ids=lambda g: f"{g[1]}/{g[2]} heads of {g[3]}, hidden {g[0]}")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("head_norms", [False, True], ids=["no QK norms", "QK norms"])
def test_queries_and_memory_equal_the_truth(rows, geometry, bias, head_norms, seed, poisoned, assert_near) -> None:
    """Without QK norms the room is the same: the result is still rounded once, after RoPE, and the reference rounds the
    product first."""
    case = Heads(rows, *geometry, bias=bias, head_norms=head_norms)
    (ours, kv), (queries, truth) = case.run("native"), case.run("torch", torch.float64)
    assert_near(ours, queries, BF16)
    for mine, true in zip(case.written(kv), case.written(truth), strict=True):  # keys and values differ in size
        assert_near(mine, true, BF16)
    assert torch.equal(kv.isnan(), truth.isnan())  # nothing else was written


def test_padding_rows_alone_write_nothing(seed) -> None:
    case = Heads(33, 96, 4, 2, 32)
    case.slots.fill_(-1)
    queries, kv = case.run("native")
    assert queries.isfinite().all()
    assert kv.isnan().all()


@pytest.mark.parametrize("rows", [1, 17, 40, 700])
@pytest.mark.parametrize("name", [*OPS, "norm_qkv"])
def test_any_number_of_threads_gives_the_same_bits(name, rows, seed, threads) -> None:
    case = Heads(rows, 160, 3, 1, 64)
    make, run = OPS.get(name, (None, None))
    values = make(rows, 1056, 70) if make else None

    def results() -> tuple[Tensor, ...]:
        return (run(**values, backend="native"),) if run else case.run("native")

    torch.set_num_threads(1)
    alone = [each.nan_to_num() for each in results()]
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(each.nan_to_num(), one) for each, one in zip(results(), alone, strict=True))


@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("name", [*OPS, "queries", "memory", "queries without norms", "memory without norms"])
def test_is_as_close_to_the_truth_as_torch(name, rows, assert_as_good) -> None:
    def results() -> tuple[Tensor, Tensor, Tensor]:
        if name in OPS:
            make, run = OPS[name]
            values = make(rows, 256, 64)
            return run(**values, backend="native"), run(**values), run(**wide(values))
        case = Heads(rows, 256, 4, 2, 64, head_norms="without" not in name)
        runs = case.run("native"), case.run("torch"), case.run("torch", torch.float64)
        return tuple(queries if name.startswith("queries") else case.written(kv) for queries, kv in runs)

    assert_as_good(results)


WEIGHTS = ("weight", "gate_up", "head")


def instead(values: Values, made: Callable[[Tensor], object]) -> Values:
    """The same with another weight, made of it."""
    return {key: made(each) if key in WEIGHTS else each for key, each in values.items()}


def at_odd_address(piece: Tensor) -> Tensor:
    """A copy that begins one element after a cache line's start, NaN or the largest number before and behind it."""
    around = float("nan") if piece.is_floating_point() else 127
    space = torch.full((piece.numel() + 130,), around, dtype=piece.dtype)
    begin = -space.data_ptr() % 64 // space.element_size() + 1
    return space[begin : begin + piece.numel()].view(piece.shape).copy_(piece)


def in_pieces(weight: Tensor, *cuts: int) -> Rows:
    """Rows that lie apart, cut before these, at odd addresses."""
    return Rows(tuple(at_odd_address(piece) for piece in weight.tensor_split(cuts) if len(piece)))


def at_odd_addresses(weight: Int8) -> Int8:
    return Int8(at_odd_address(weight.values), at_odd_address(weight.scales))


@each_op
@pytest.mark.parametrize("rows", [1, 6, 33])
@pytest.mark.parametrize("size", [96, 41])
@pytest.mark.parametrize("cuts", [(), (17,), (33, 34)], ids=str)
def test_a_weight_may_lie_in_pieces_at_any_address(name, rows, size, cuts, seed, poisoned) -> None:
    make, run = OPS[name]
    values = make(rows, size, 38)
    whole = run(**values, backend="native")
    cut = instead(values, lambda weight: in_pieces(weight, *(at % len(weight) for at in cuts)))
    assert torch.equal(run(**cut, backend="native"), whole)


@pytest.mark.parametrize("rows", [1, 40])
def test_queries_keys_and_values_may_lie_apart(rows, seed) -> None:
    case = Heads(rows, 96, 4, 2, 32)
    queries, kv = case.run("native")
    case.weights = replace(case.weights, qkv=in_pieces(case.weights.qkv, 128, 192))
    again, kv_again = case.run("native")
    assert torch.equal(again, queries)
    assert torch.equal(kv_again.nan_to_num(), kv.nan_to_num())


INT8_SIZES = [(128, 32), (96, 33), (300, 20), (41, 5), (1056, 70)]
"""Whole groups, and last ones of 96, 44, 41 and 32 columns."""


@each_op
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 33])
@pytest.mark.parametrize(("size", "outputs"), INT8_SIZES)
def test_a_weight_in_int8_equals_the_truth(name, rows, size, outputs, seed, poisoned, assert_near) -> None:
    make, run = OPS[name]
    values = instead(make(rows, size, outputs), lambda weight: at_odd_addresses(quantised(weight)))
    assert_near(run(**values, backend="native"), run(**wide(values)), BF16)


@pytest.mark.parametrize("rows", [1, 20])
def test_heads_of_a_weight_in_int8_equal_the_truth(rows, seed, assert_near) -> None:
    case = Heads(rows, 160, 4, 2, 32, head_norms=False)
    whole = quantised(case.weights.qkv)
    case.weights = replace(case.weights, qkv=whole.dense(torch.float64))
    queries, truth = case.run("torch", torch.float64)
    case.weights = replace(case.weights, qkv=whole)
    ours, kv = case.run("native")
    assert_near(ours, queries, BF16)
    assert_near(case.written(kv)[0], case.written(truth)[0], BF16)
    assert_near(case.written(kv)[1], case.written(truth)[1], BF16)


def test_fixed_point_loses_less_than_bfloat16_does(seed) -> None:
    """Also where one number is a thousand times the others. Weights are sums' only other error, and exact here."""
    values = instead(score(3, 512, 64), quantised)
    values["hidden"], values["norm"] = draw(3, 512), torch.ones(512, dtype=BF16)
    values["hidden"][:, 200] *= 1000
    normed = (values["hidden"].double() * values["hidden"].double().square().mean(-1, keepdim=True).rsqrt()).to(BF16)
    truth = normed.double() @ values["head"].dense(torch.float64).T
    ours = norm_head(**values | {"eps": 0.0}, backend="native").double()
    assert (ours - truth).norm() <= 2**-11 * truth.norm()


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(rows, value, seed) -> None:
    values = instead(project(rows, 300, 20), quantised)
    values["x"][1, 200] = value
    finite = out_proj(**values, backend="native").isfinite().all(1)
    assert finite.tolist() == [row != 1 for row in range(rows)]


@pytest.mark.parametrize("in_int8", [False, True], ids=["bfloat16", "int8"])
@each_op
def test_a_rows_result_does_not_depend_on_those_beside_it(name, in_int8, seed, level: native.Level) -> None:
    """But for tiles, which take several rows alone, and for a weight in int8, which many rows meet as bfloat16."""
    make, run = OPS[name]
    values = make(6 if in_int8 else 20, 300, 40)
    if in_int8:
        values = instead(values, quantised)
    elif level.name == "amx":
        pytest.skip("of several rows in bfloat16 tiles are multiplied")
    together = run(**values, backend="native")
    for row in range(len(together)):
        own = {key: values[key][row : row + 1] for key in ("x", "hidden", "residual") if key in values}
        assert torch.equal(run(**values | own, backend="native")[0], together[row])


@each_op
def test_no_rows(name) -> None:
    make, run = OPS[name]
    assert run(**make(0, 64, 32), backend="native").shape == (0, 32)


def test_no_rows_of_heads() -> None:
    assert Heads(0, 64, 2, 1, 32).run("native")[0].shape == (0, 2, 32)


def test_what_can_not_be_read_is_refused() -> None:
    values = project(2, 64, 32)
    with pytest.raises(ValueError, match=r"weight of shape \[32, 64\], got \[32, 63\]"):
        out_proj(**values | {"weight": values["weight"][:, :63].contiguous()}, backend="native")
    with pytest.raises(ValueError, match=r"needs bfloat16 on the CPU, got torch\.float32"):
        out_proj(**values | {"x": values["x"].float()}, backend="native")
    with pytest.raises(ValueError, match=r"contiguous.* strides \[1, 32\]"):
        out_proj(**values | {"weight": draw(64, 32).T}, backend="native")
    with pytest.raises(ValueError, match=r"residual of shape \[2, 32\]"):
        out_proj(**values | {"residual": draw(1, 32)}, backend="native")
    with pytest.raises(ValueError, match=r"gate_up of shape \[30, 64\], got \[31, 64\]"):
        norm_swiglu(draw(2, 64), draw(64), draw(31, 64), EPS, backend="native")
    with pytest.raises(ValueError, match=r"norm of shape \[64\]"):
        norm_head(draw(2, 64), draw(32), draw(31, 64), EPS, backend="native")


def test_heads_that_can_not_be_written_are_refused() -> None:
    case = Heads(4, 64, 2, 1, 40)
    with pytest.raises(ValueError, match="multiple of 16"):
        case.run("native")
    case = Heads(4, 64, 2, 1, 32)
    case.slots[2] = 3 * PAGE
    with pytest.raises(IndexError, match=f"below {3 * PAGE}, got {3 * PAGE}"):
        case.run("native")
    for given, lost in (("q_norm", "k_norm"), ("k_norm", "q_norm")):
        case = Heads(4, 64, 2, 1, 32)
        case.weights = replace(case.weights, **{lost: None})
        with pytest.raises(ValueError, match=f"q_norm and k_norm or neither, got {given} alone"):
            case.run("native")
    case = Heads(4, 64, 2, 1, 32)
    case.cos = case.cos[:2]
    with pytest.raises(ValueError, match=r"cos of shape \[4, 16\]"):
        case.run("native")
