"""GGUF files: the same model as the checkpoint that they were made of, and as transformers reads them."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from braidsdk import Braid
from braidsdk.errors import ModelError, UnsupportedModelError, WeightsError
from braidsdk.kernels.weight import whole
from braidsdk.models import gguf as ours
from braidsdk.models.config import weight_shapes
from braidsdk.models.families.llama import LLAMA
from braidsdk.models.gguf import GGUFFile, GGUFWeights
from braidsdk.models.registry import load_model

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit; see test_equals_transformers."""

Write = Callable[..., Path]


def write(folder: Path, file: Path, *, kind: str = "F32", tokenizer: bool = False, **changes: object) -> Path:
    """A checkpoint as llama.cpp's converter writes it: `kind` is of matrices whose rows it fits, norms stay float32."""
    config = AutoConfig.from_pretrained(folder)
    name = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(file, name)
    rope = dict(config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
        **changes,
    }
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else None
        (add or writer.add_uint32)(key if key.startswith("split") else f"{name}.{key}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1021)
    if tokenizer:
        spec = json.loads((folder / "tokenizer.json").read_text())
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
        control = {each["content"] for each in spec["added_tokens"]}
        tokens = sorted(ids, key=lambda token: ids[token])
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens])
        writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for weight, tensor in _as_in_llama_cpp(config, load_file(folder / "model.safetensors")):
        data = tensor.float().numpy()
        fits = data.ndim == 2 and data.shape[1] % 32 == 0
        own = gguf.GGMLQuantizationType[kind if fits else "F32"]
        writer.add_tensor(weight, gguf.quantize(data, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _as_in_llama_cpp(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN3 if config.model_type == "qwen3" else gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if config.model_type in ("llama", "mistral") and (count := heads.get(stem.rpartition(".")[2])):
            tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield f"{names.get_name(stem)}.{kind}", tensor.contiguous()
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequencies(config, "default") / _frequencies(config, "llama3")


def _frequencies(config: PretrainedConfig, kind: str) -> torch.Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    return ROPE_INIT_FUNCTIONS[kind](config, CPU)[0]


@pytest.fixture
def made(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A random checkpoint, and a GGUF file of it with the tokenizer beside it."""

    def make(family: str, **options: object) -> tuple[Path, Path]:
        folder = make_checkpoint(family=family)
        beside = tmp_path / "gguf"
        beside.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folder / file, beside)
        return folder, write(folder, beside / "model.gguf", **options)  # type: ignore[arg-type]

    return make


def logits(path: Path, store: Path, prompt: str = "Which?") -> torch.Tensor:
    with Braid(path, store=store, device="cpu", dtype="float32") as braid:
        docs = braid.register_many(["One fact stands here. " * 9, "And one more."], progress=False)
        return braid.compose(docs, mode="exact").next_token_logits(prompt)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_file_is_the_model_that_it_was_made_of(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    folder, file = made(family)
    want, got = logits(folder, tmp_path / "a"), logits(file, tmp_path / "b")
    assert float((got - want).abs().max() / want.abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
@torch.inference_mode()
def test_quantised_weights_are_those_of_transformers(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("accelerate")
    _, file = made("mistral", kind=kind)  # transformers reads the head_dim of no other family
    peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with Braid(file, store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        context = braid.compose([braid.register("One fact stands here. " * 9)], mode="exact")
        want = peer(torch.tensor([context.prompt_ids("Which?")])).logits[0, -1]
        got = context.next_token_logits("Which?")
    assert float((got - want).abs().max() / want.abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_mapped_weights_are_those_that_are_read(made: Callable[..., tuple[Path, Path]], kind: str) -> None:
    file = GGUFFile(made("llama", kind=kind)[1])
    config = file.config(LLAMA)
    read, mapped = GGUFWeights(file, config), GGUFWeights(file, config)
    dtype = torch.float16 if kind == "F16" else torch.float32
    names = list(weight_shapes(config, tied=False))
    taken = {name: whole(mapped.take([name], dtype, CPU, mapped=True)) for name in names}
    want = {name: read.take([name], dtype, CPU) for name in names}
    assert all(torch.equal(taken[name], want[name]) for name in names)
    assert mapped.finish() == read.finish()
    with file.path.open("r+b") as opened:
        opened.write(bytes(file.path.stat().st_size))
    shown = {name for name in names if not torch.equal(taken[name], want[name])}
    as_stored = {name for name in names if read.stored_dtype(name) == dtype}
    assert shown == {name for name in as_stored if not re.search(r"\.[qk]_proj\.", name)}, "RoPE's pairs lie apart"
    assert len(shown) > 3


@pytest.mark.parametrize("long", [2, ours.LONG], ids=["its arrays are passed over", "its arrays are read"])
def test_tokenizer_and_template_come_from_the_file(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: int
) -> None:
    monkeypatch.setattr(ours, "LONG", long)
    folder = make_checkpoint(family="qwen2")
    (tmp_path / "alone").mkdir()
    file = write(folder, tmp_path / "alone" / "model.gguf", tokenizer=True)
    with (
        Braid(folder, store=tmp_path / "a", device="cpu", dtype="float32") as want,
        Braid(file, store=tmp_path / "b", device="cpu", dtype="float32") as got,
    ):
        for question in ("Which?", "What is the capital of Aistonia? 12 <|im_end|>"):
            answers = [
                braid.ask(question, chunks=[braid.register("One fact: 7 stands (here).")], max_new_tokens=8)
                for braid in (want, got)
            ]
            assert answers[0].prompt_ids == answers[1].prompt_ids
            assert answers[0].token_ids == answers[1].token_ids


def test_a_quantised_file_opens_in_bfloat16(made: Callable[..., tuple[Path, Path]]) -> None:
    assert load_model(made("qwen3", kind="Q8_0")[1], device=CPU, dtype=None).dtype == torch.bfloat16


def test_other_bytes_or_another_quantisation_are_another_model(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(family="qwen2")
    files = [write(folder, tmp_path / f"{kind}.gguf", kind=kind) for kind in ("F32", "Q8_0", "Q4_0")]
    found = {load_model(file, device=CPU, dtype=torch.float32).fingerprint for file in (*files, files[0])}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert_count": 8}, "asks for experts"),
        ({"attention.sliding_window": 64}, "a sliding window"),
        ({"rope.dimension_count": 16}, "partial rotary"),
        ({"attention.value_length": 64}, "values of another size than keys"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"block_count": 4}, r"lacks 'model.layers.3.input_layernorm.weight'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    file = write(make_checkpoint(), tmp_path / "model.gguf", **changes)
    with pytest.raises((UnsupportedModelError, WeightsError), match=says):
        load_model(file, device=CPU, dtype=None)


def test_an_unknown_architecture_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture in .* got 'gemma3'"):
        load_model(tmp_path / "model.gguf", device=CPU, dtype=None)


@pytest.mark.parametrize("kept", [0, 3, 40, 5000])
def test_a_damaged_file_says_so(make_checkpoint: Callable[..., Path], tmp_path: Path, kept: int) -> None:
    file = write(make_checkpoint(), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UnsupportedModelError, match=r"model\.gguf must be a GGUF file"):
        load_model(file, device=CPU, dtype=None)


@pytest.mark.parametrize(
    ("options", "head"), [({}, 3000), ({"tokenizer": True}, 1200)], ids=["", "where its arrays begin"]
)
def test_flipped_bytes_never_give_another_error(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, bool],
    head: int,
) -> None:
    monkeypatch.setattr(ours, "LONG", 2)
    data = write(make_checkpoint(), tmp_path / "model.gguf", **options).read_bytes()
    chance = random.Random(5)
    for turn in range(60):
        bad = bytearray(data)
        for _ in range(3):
            bad[chance.randrange(head)] = chance.randrange(256)
        file = tmp_path / f"{turn}.gguf"
        file.write_bytes(bad)
        try:
            load_model(file, device=CPU, dtype=None)
        except ModelError:
            continue
        finally:
            file.unlink()


def test_weights_that_are_not_finite_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = write(make_checkpoint(), tmp_path / "model.gguf")
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "output_norm.weight")
    data = bytearray(file.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"NaN or infinity in 'model\.norm\.weight'"):
        load_model(file, device=CPU, dtype=None)


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.zeros(12)], ids=["another length", "zeros"])
def test_damaged_rope_factors_are_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: torch.Tensor
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_frequencies", lambda _, kind: wrong if kind == "default" else 1.0)
    file = write(make_checkpoint(family="llama"), tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight in .* must be 12 numbers above 0"):
        load_model(file, device=CPU, dtype=None)


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda _: None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"pip install 'braidsdk\[gguf\]'"):
        Braid(tmp_path / "model.gguf", store=tmp_path / "store")
