"""Modes that compute some tokens of a composition again, against a plain simulation with transformers' modules."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from braidsdk import Braid, Chunk
from braidsdk.cache.pool import Pool
from braidsdk.compose.composition import Composition, Segment
from braidsdk.compose.modes import parse_mode
from braidsdk.compose.repairs import Blended, Guided, Linked, Random, ranked
from braidsdk.engine import loop, repair
from braidsdk.engine.attribution import layers_of
from braidsdk.engine.repair import highest, widened
from braidsdk.errors import BraidError, InputError, UnknownModeError

ASK = "What is the capital of Aistonia?"
TEXTS = [
    "The capital of Thessily is Troick. Thessily lies on the sea.",
    "The capital of Belmora is Plonk. Belmora lies in the north, and its queen is old.",
    "The capital of Aistonia is Flubarg.",
    "The capital of Falkirra is Jassik.",
]
MIDDLE = ["linked(5)", "guided(0.2)", "blended(0.3)", "blended(0.3, layer=2)", "guided(0.2)+shift", "linked(3)+shift"]
MIDDLE += ["random(0.2)", "random(0.2)+shift", "guided(0.2, near=3)"]


@pytest.fixture
def braid(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Braid]:
    """A random model of 28 layers."""
    with Braid(make_checkpoint(num_hidden_layers=28), store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        yield braid


def chunks_of(braid: Braid, *, anchor: bool = True) -> list[Chunk]:
    rules = braid.register_system("You answer questions from the documents.") if anchor else None
    documents = braid.register_many(TEXTS, anchor=rules)
    return [rules, *documents] if rules else documents


class Simulation:
    """The same with transformers' modules, in float64: chunks alone behind the anchor, then the chosen tokens layer by
    layer."""

    def __init__(self, folder: Path, ids: Sequence[int], sizes: Sequence[int]) -> None:
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.ids, self.sizes = torch.tensor(ids), sizes
        self.starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self.context = sum(sizes)
        self.layers = self.model.model.layers

    def project(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and not rotated, and values of a layer: [heads, rows, head_dim]."""
        layer = self.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        shape = (len(hidden), -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(normed).view(shape)).transpose(0, 1)
        k = attention.k_norm(attention.k_proj(normed).view(shape)).transpose(0, 1)
        return q, k, attention.v_proj(normed).view(shape).transpose(0, 1)

    def turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(q, positions[None])
        rotated = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return rotated[0][0], rotated[1][0]

    def rest(self, index: int, hidden: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """The rest of a layer; the weights are kept as `self.weights`, [q_heads, rows, keys]."""
        layer, group = self.layers[index], len(q) // len(keys)
        scores = q @ keys.repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        self.weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        mixed = (self.weights @ values.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def causal(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys (not rotated) and values of each layer for tokens from position 0 on."""
        hidden, found = self.model.model.embed_tokens(ids), []
        positions = torch.arange(len(ids))
        for index in range(len(self.layers)):
            q, k, v = self.project(index, hidden)
            found.append((k, v))
            turned_q, turned_k = self.turned(q, k, positions)
            hidden = self.rest(index, hidden, turned_q, turned_k, v, positions[:, None] >= positions)
        return found

    @torch.no_grad()
    def run(self, mode: str) -> tuple[Tensor, list[int]]:
        """Logits after the prompt, and the positions of what was computed again."""
        anchor = self.ids[: self.sizes[0]]
        alone = [
            [(k[:, -size:], v[:, -size:]) for k, v in self.causal(torch.cat([anchor, self.ids[start : start + size]]))]
            for start, size in zip(self.starts[1:], self.sizes[1:], strict=True)
        ]
        entries = [self.causal(anchor), *alone]
        kept = [[torch.cat(parts, 1) for parts in zip(*layer, strict=True)] for layer in zip(*entries, strict=True)]
        tail = torch.arange(self.context, len(self.ids))
        chosen = self.chosen(mode, kept, tail)
        rows = torch.tensor(chosen + tail.tolist())
        hidden = self.model.model.embed_tokens(self.ids[rows])
        seen = rows[:, None] >= torch.arange(len(self.ids))
        for index, (k, v) in enumerate(kept):
            q, fresh_k, fresh_v = self.project(index, hidden)
            k, v = (torch.cat([each, each.new_zeros(len(each), len(tail), each.shape[2])], 1) for each in (k, v))
            k[:, rows], v[:, rows] = fresh_k, fresh_v
            turned_q, _ = self.turned(q, fresh_k, rows)
            _, turned_k = self.turned(k, k, torch.arange(len(self.ids)))
            if mode.endswith("+shift"):
                _, was = self.turned(kept[index][0], kept[index][0], torch.arange(self.context))
                self.shift(turned_k, was, chosen)
                self.shift(v, kept[index][1], chosen)
            hidden = self.rest(index, hidden, turned_q, turned_k, v, seen)
        return self.model.lm_head(self.model.model.norm(hidden[-1])), chosen

    def shift(self, now: Tensor, was: Tensor, chosen: list[int]) -> None:
        """Move the other tokens of each chunk as its chosen ones did in the mean: [heads, tokens, head_dim]."""
        for start, size in zip(self.starts, self.sizes, strict=True):
            of_chunk = [at for at in chosen if start <= at < start + size]
            others = [at for at in range(start, start + size) if at not in of_chunk]
            if of_chunk:
                moved = (now[:, of_chunk] - was[:, of_chunk]).mean(1, keepdim=True)
                now[:, others] += moved * len(of_chunk) / (len(of_chunk) + 16)

    def widened(self, scores: Tensor, near: int) -> Tensor:
        """For each token of a chunk the highest score at most so far away, within the chunk, less by the distance."""
        found = scores.clone()
        for start, size in zip(self.starts, self.sizes, strict=True):
            for at in range(start, start + size):
                others = range(max(start, at - near), min(start + size, at + near + 1))
                found[at] = max(scores[other] * (1 - abs(at - other) / (near + 1)) for other in others)
        return found

    def chosen(self, mode: str, kept: list[list[Tensor]], tail: Tensor) -> list[int]:
        may = range(self.starts[2], self.context)  # the first chunk behind the anchor has seen what precedes it
        _, rule = parse_mode(mode)
        if isinstance(rule, Linked):
            return [at for start, size in zip(self.starts[2:], self.sizes[2:], strict=True)
                    for at in range(start, start + min(rule.k, size))]  # fmt: skip
        assert isinstance(rule, Guided | Blended | Random)
        count = min(len(may), math.ceil(rule.ratio * (self.context - self.sizes[0])))
        if isinstance(rule, Guided):
            scores, hidden = (
                torch.zeros(len(self.ids), dtype=torch.float64),
                self.model.model.embed_tokens(self.ids[tail]),
            )
            for index, (k, v) in enumerate(kept):
                q, fresh_k, fresh_v = self.project(index, hidden)
                k, v = torch.cat([k, fresh_k], 1), torch.cat([v, fresh_v], 1)
                turned_q, _ = self.turned(q, fresh_k, tail)
                _, turned_k = self.turned(k, k, torch.arange(len(self.ids)))
                hidden = self.rest(index, hidden, turned_q, turned_k, v, tail[:, None] >= torch.arange(len(self.ids)))
                if index in layers_of(len(kept)):
                    scores += self.weights.amax((0, 1))
            if rule.near:
                scores = self.widened(scores, rule.near)
        elif isinstance(rule, Random):
            tail_bytes = b"".join(int(each).to_bytes(8, "little") for each in self.ids[tail])
            scores = {at: xxhash.xxh3_64(tail_bytes, seed=at).intdigest() / 2**64 for at in may}
        else:
            full = self.causal(self.ids[: self.context])[rule.layer][0]
            scores = (full - kept[rule.layer][0]).square().sum((0, 2))
        return sorted(sorted(may, key=lambda at: (-float(scores[at]), at))[:count])


@pytest.fixture(scope="module")
def checkpoint(save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("repaired"), num_hidden_layers=5)


@pytest.mark.parametrize("mode", MIDDLE)
@pytest.mark.parametrize("step_tokens", [2048, 7])
def test_equals_the_simulation(
    mode: str, step_tokens: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what is computed again goes in several pieces."""
    with Braid(checkpoint, store=tmp_path, device="cpu", dtype="float32") as braid:
        chunks = chunks_of(braid)
        braid.compose(chunks, mode="anchored").prepare()
        monkeypatch.setitem(loop.STEP_TOKENS, "cpu", step_tokens)
        monkeypatch.setattr(repair, "_MOVED_AT_ONCE", step_tokens)
        braid._engine._loop.scheduler._step_tokens = step_tokens
        context = braid.compose(chunks, mode=mode)
        logits = context.next_token_logits(ASK).double()
        usage = context.ask(ASK, max_new_tokens=1).usage
        sizes = [len(segment.token_ids) for segment in context._composition.segments]
        simulation = Simulation(checkpoint, context.prompt_ids(ASK), sizes)
    truth, chosen = simulation.run(mode)
    assert usage.repaired_tokens == len(chosen)
    assert float((logits - truth).abs().max()) < 1e-4 * float(truth.abs().max())
    anchored, _ = simulation.run("linked(0)")
    assert float((anchored - truth).abs().max()) > 1e-2 * float(truth.abs().max()), "the repair changes nothing"


@pytest.mark.parametrize("near", [0, 1, 5, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 1.0])
def test_the_highest_scores_are_chosen_as_python_ranks_them(near: int, ratio: float) -> None:
    """Also scores with many ties. What has none stands around these chunks: system prompt, first chunk, past turn."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    segments, origin = [], 0
    for size in (11, 2, 200, 1, 64, 30):
        everything = tuple(range(len(segments)))
        turn = size == 30
        after = everything if turn else everything[:1]
        segments.append(Segment(None, (5,) * size, origin, after, keep=False, is_turn=turn))
        origin += size
    composition = Composition("x", tuple(segments), tail=(1, 2), repair=Guided(ratio, near=near))
    sizes = [200, 1, 64]
    for scores in (torch.rand(sum(sizes)), torch.randint(0, 4, (sum(sizes),)) / 4, torch.zeros(sum(sizes))):
        by_segment = [one.tolist() for one in scores.split(sizes)]
        around = [
            [
                max(
                    values[other] * float(1 - torch.tensor(abs(at - other)) / (near + 1))
                    for other in range(max(0, at - near), min(len(values), at + near + 1))
                )
                for at in range(len(values))
            ]
            for values in by_segment
        ]
        rounded = [torch.tensor(values, dtype=torch.float32).tolist() for values in around]
        chosen = highest(composition, widened(scores, sizes, near))
        assert chosen == ranked(composition, rounded), f"torch.manual_seed({seed})"
        assert len(chosen) == min(math.ceil(ratio * 267), sum(sizes))


@pytest.mark.parametrize("mode", ["guided(1)", "linked(1000)", "blended(1)", "guided(1)+shift", "random(1)"])
def test_all_tokens_make_it_exact(mode: str, braid: Braid) -> None:
    chunks = chunks_of(braid)
    exact, anchored, repaired = (
        braid.compose(chunks, mode=each).next_token_logits(ASK) for each in ("exact", "anchored", mode)
    )
    largest = float(exact.abs().max())
    assert float((exact - repaired).abs().max()) < 1e-4 * largest
    assert float((exact - anchored).abs().max()) > 1e-2 * largest


@pytest.mark.parametrize("mode", ["guided(0)", "linked(0)", "blended(0)", "guided(0)+shift", "random(0)"])
def test_no_tokens_make_it_anchored_bit_for_bit(mode: str, braid: Braid) -> None:
    chunks = chunks_of(braid)
    anchored, repaired = (braid.compose(chunks, mode=each).next_token_logits(ASK) for each in ("anchored", mode))
    assert torch.equal(anchored, repaired)


@pytest.mark.parametrize("mode", MIDDLE)
def test_answers_go_on_from_what_was_repaired(mode: str, braid: Braid) -> None:
    """Decoding sees it as the first token did: the same answer as by asking for it token by token."""
    chunks = chunks_of(braid)
    context = braid.compose(chunks, mode=mode)
    answer = context.ask(ASK, max_new_tokens=8, stop_ids=[])
    for count in (2, 5):
        assert context.ask(ASK, max_new_tokens=count, stop_ids=[]).token_ids == answer.token_ids[:count]
    assert answer.token_ids != braid.compose(chunks).ask(ASK, max_new_tokens=8, stop_ids=[]).token_ids


def test_decoding_sees_the_overlay(random_braid: Braid, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything repaired, whole answers are the exact ones: their tokens saw what was repaired."""
    monkeypatch.setattr(repair, "_COPIED_AT_ONCE", 7)
    chunks = chunks_of(random_braid)
    asked = [f"What is {number}?" for number in range(6)]
    exact, anchored, repaired = (
        [random_braid.compose(chunks, mode=mode).ask(each, max_new_tokens=16, stop_ids=[]).token_ids for each in asked]
        for mode in ("exact", "anchored", "guided(1)")
    )
    assert repaired == exact
    assert sum(a != b for a, b in zip(exact, anchored, strict=True)) > 3


@pytest.mark.parametrize("mode", MIDDLE)
def test_entries_stay_as_they_were(mode: str, random_braid: Braid, pool_of: Callable[[Braid], Pool]) -> None:
    chunks = chunks_of(random_braid)
    context = random_braid.compose(chunks)
    before = context.next_token_logits(ASK)
    pool = pool_of(random_braid)
    entries = [pool.find(key) for key in context._keys]
    kept = [pool.kv[:, :, entry.pages].clone() for entry in entries if entry]
    used = pool.used_bytes
    random_braid.compose(chunks, mode=mode).ask(ASK, max_new_tokens=4)
    pool = pool_of(random_braid)
    assert all(torch.equal(pool.kv[:, :, entry.pages], was) for entry, was in zip(entries, kept, strict=True) if entry)
    assert pool.used_bytes == used, "pages were kept"
    assert torch.equal(context.next_token_logits(ASK), before)


def test_together_with_others(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    contexts = [random_braid.compose(chunks, mode=mode) for mode in (*MIDDLE, "anchored", "exact", "guided(1)")]
    alone = [context.ask(ASK, max_new_tokens=12, stop_ids=[]).token_ids for context in contexts]
    together = random_braid.ask_many([(context, ASK) for context in contexts], max_new_tokens=12, stop_ids=[])
    assert [answer.token_ids for answer in together] == alone


def test_the_first_chunk_behind_the_anchor_is_exact(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    usage = random_braid.compose(chunks[:2], mode="guided(1)").ask(ASK, max_new_tokens=1).usage
    assert usage.repaired_tokens == 0
    assert usage.budget == 0
    for mode in ("guided(1)", "linked(1000)"):
        usage = random_braid.compose(chunks, mode=mode).ask(ASK, max_new_tokens=1).usage
        assert usage.repaired_tokens == sum(len(chunk.token_ids) for chunk in chunks[2:])


def test_without_an_anchor_all_chunks_are_repaired(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid, anchor=False)
    exact, repaired = (random_braid.compose(chunks, mode=mode) for mode in ("exact", "guided(1)"))
    wanted = exact.next_token_logits(ASK)
    assert float((repaired.next_token_logits(ASK) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    usage = repaired.ask(ASK, max_new_tokens=1).usage
    assert usage.repaired_tokens == sum(len(chunk.token_ids) for chunk in chunks)


def test_a_chunk_that_stands_twice(random_braid: Braid) -> None:
    rules, first, second, *_ = chunks_of(random_braid)
    chunks = [rules, first, second, first, second]
    exact, repaired = (
        random_braid.compose(chunks, mode=mode).next_token_logits(ASK) for mode in ("exact", "guided(1)")
    )
    assert float((repaired - exact).abs().max()) < 1e-4 * float(exact.abs().max())


def test_what_it_took_is_said(random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    context = random_braid.compose(chunks, mode="guided(0.25)")
    usage = context.ask(ASK, max_new_tokens=3).usage
    documents = sum(len(chunk.token_ids) for chunk in chunks[1:])
    tail = len(context.prompt_ids(ASK)) - len(context.input_ids)
    assert usage.repaired_tokens == math.ceil(0.25 * documents)
    layers = random_braid._engine.config.layers
    choosing = tail * layers_of(layers).stop / layers
    assert usage.budget == pytest.approx((usage.repaired_tokens + choosing) / documents)
    assert usage.prompt_tokens == usage.cached_tokens + usage.computed_tokens + usage.repaired_tokens
    assert "are computed again for each question" in context.explain().notes[-1]
    usage = random_braid.compose(chunks, mode="blended(0.25)").ask(ASK, max_new_tokens=3).usage
    assert usage.budget == pytest.approx((usage.repaired_tokens + documents * 2 / layers) / documents)


def test_conversations_go_on(tiny: Braid) -> None:
    rules = tiny.register_system("You answer questions from the documents.")
    context = tiny.compose([rules, *tiny.register_many(TEXTS, anchor=rules)], mode="guided(0.3)")
    history: list[dict[str, str]] = []
    for place in ("Aistonia", "Belmora"):
        question = f"What is the capital of {place}?"
        answer = context.ask(question, history=history, max_new_tokens=12)
        assert answer.text == {"Aistonia": "Flubarg.", "Belmora": "Plonk."}[place]
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]


def test_a_new_context_computes_its_entries_first(random_braid: Braid) -> None:
    rules = random_braid.register_system("You answer questions from the documents.")
    chunks = [rules, *random_braid.register_many(TEXTS)]  # registered, with nothing computed
    first = random_braid.compose(chunks, mode="guided(0.5)").next_token_logits(ASK)
    again = random_braid.compose(chunks, mode="guided(0.5)").next_token_logits(ASK)
    assert float((first - again).abs().max()) < 1e-5 * float(first.abs().max())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("guided(0.15)", Guided(0.15)),
        ("guided", Guided()),
        (" guided( ratio = 1 ) ", Guided(1.0)),
        ("linked(16)", Linked(16)),
        ("linked(k=3)", Linked(3)),
        ("blended(0.2)", Blended(0.2, 1)),
        ("blended(0.2, layer=2)", Blended(0.2, 2)),
        ("blended(0.2, 3)", Blended(0.2, 3)),
        ("guided(0.15)+shift", Guided(0.15, shift=True)),
        ("guided(0.15, near=8)", Guided(0.15, near=8)),
        ("guided(0.15, layers=1/2, near=0)+shift", Guided(0.15, (1, 2), 0, shift=True)),
        ("linked +shift", Linked(shift=True)),
        ("random(0.1)+shift", Random(0.1, shift=True)),
    ],
)
def test_modes_are_read_from_text(text: str, rule: object) -> None:
    assert parse_mode(text) == ("anchored", rule)
    assert parse_mode(str(rule)) == ("anchored", rule)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("guidde(0.2)", UnknownModeError, "Did you mean 'guided'?"),
        ("blend", UnknownModeError, "'blended'"),
        ("guided(1.5)", InputError, "ratio of mode 'guided' must be from 0 to 1"),
        ("guided(nan)", InputError, "ratio"),
        ("guided(-0.1)", InputError, "ratio"),
        ("guided()", InputError, "ratio"),
        ("guided(0.2, 3, 4, 5)", InputError, "the form guided"),
        ("guided(0.2, near=-1)", InputError, "near of mode 'guided' must be a whole number"),
        ("guided(0.2, near=x)", InputError, "near of mode"),
        ("guided(0.2, near=65)", InputError, "from 0 to 64"),
        ("guided(0.2", UnknownModeError, "mode must be one of"),
        ("linked(1.5)", InputError, "k of mode 'linked' must be a whole number"),
        ("linked(-1)", InputError, "k of mode"),
        ("linked(k=1, k=2)", InputError, "the form linked"),
        ("blended(layer=1)", InputError, "the form blended"),
        ("blended(0.2, layer=-1)", InputError, "layer of mode"),
        ("exact(1)", UnknownModeError, "Did you mean 'exact'?"),
        ("anchored+shift", UnknownModeError, "Did you mean 'anchored'?"),
        ("guided(shift=1)", InputError, "the form guided"),
        ("random(2)", InputError, "ratio of mode 'random' must be from 0 to 1"),
        ("random(0.1, 2)", InputError, "the form random"),
        (7, UnknownModeError, "got 7"),
    ],
)
def test_bad_modes_are_refused(text: str, error: type[BraidError], said: str, random_braid: Braid) -> None:
    with pytest.raises(error) as caught:
        random_braid.compose(chunks_of(random_braid), mode=text)
    assert said in str(caught.value)


def test_a_layer_that_the_model_has_not_is_refused(random_braid: Braid) -> None:
    with pytest.raises(InputError, match="must be below 3"):
        random_braid.compose(chunks_of(random_braid), mode="blended(0.2, layer=3)")


def test_a_cache_of_transformers_needs_a_question_to_repair_for(random_braid: Braid) -> None:
    with pytest.raises(InputError, match="mode must be 'exact'"):
        random_braid.compose(chunks_of(random_braid), mode="guided(0.2)").to_transformers_cache()


def test_a_failing_choice_fails_its_request_alone(
    random_braid: Braid, monkeypatch: pytest.MonkeyPatch, pool_of: Callable[[Braid], Pool]
) -> None:
    chunks = chunks_of(random_braid)
    model = random_braid._engine.model

    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(model, "attended", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            random_braid.compose(chunks, mode="guided(0.2)").ask(ASK)
    pool_of(random_braid)
    assert random_braid.compose(chunks, mode="guided(0.2)").ask(ASK, max_new_tokens=2).token_ids


@pytest.mark.parametrize("mode", ["guided(1)", "guided(0.4)", "guided(0.4)+shift"])
def test_sources_count_what_was_repaired_for_its_chunk(mode: str, random_braid: Braid) -> None:
    chunks = chunks_of(random_braid)
    shares = {}
    for each in ("exact", mode):
        answer = random_braid.compose(chunks, mode=each).ask(ASK, max_new_tokens=6, stop_ids=[], sources=True)
        assert answer.sources is not None
        shares[each] = {source.chunk.id: source.share for source in answer.sources}
        assert sum(shares[each].values()) == pytest.approx(1)
        assert len(shares[each]) == len(TEXTS)
    if mode == "guided(1)":
        assert shares[mode] == pytest.approx(shares["exact"], abs=1e-4)
