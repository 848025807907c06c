"""Loading checkpoints: what their files ask for, strictly, and in bounded memory."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from braidsdk import Braid
from braidsdk.errors import UnsupportedModelError, WeightsError
from braidsdk.kernels.backends import Backends
from braidsdk.kernels.weight import Rows, whole
from braidsdk.models import config as models_config
from braidsdk.models import weights as models_weights
from braidsdk.models.base import GenerationDefaults
from braidsdk.models.config import CheckpointConfig, weight_shapes
from braidsdk.models.families.qwen3 import QWEN3
from braidsdk.models.registry import load_model
from braidsdk.models.weights import WeightsWarning
from braidsdk.prompt.layout import LayoutWarning, PromptLayout

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit. float32 sums in another order; we have seen 1e-6 to 2e-6."""

CPU = torch.device("cpu")
Make = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def read_config(folder: Path) -> CheckpointConfig:
    return models_config.read_config(folder, QWEN3)


def edit_json(path: Path, *without: str, **changes: object) -> Path:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in without}))
    return path.parent


def edit_weights(folder: Path, edit: Callable[[Weights], object], file: str = "model.safetensors") -> Path:
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, to: Path) -> Path:
    """The same checkpoint in shards of at most 100 KB."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    Qwen3ForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(to, max_shard_size="100KB")
    assert len(list(to.glob("*.safetensors"))) > 5
    return to


def fingerprint(folder: Path) -> str:
    return load_model(folder, device=CPU, dtype=None).fingerprint


@torch.inference_mode()
def errors_against_transformers(folder: Path, store: Path, documents: list[str]) -> list[float]:
    """Largest differences in float32, relative to the largest logit: of a plain prompt, and of mode exact."""
    peer = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with Braid(folder, store=store, device="cpu", dtype="float32") as braid:
        for chunks in ([], braid.register_many(documents)):
            context = braid.compose(chunks, mode="exact")
            prompt = context.prompt_ids(f"Which? {documents[0]}")
            want = peer(torch.tensor([prompt])).logits[0, -1]
            got = context.next_token_logits(f"Which? {documents[0]}")
            found.append(float((got - want).abs().max() / want.abs().max()))
    return found


DOCUMENTS = ["Oslo is a city by the sea. " * 6, "Rome is older. " * 3, "Bern."]


# What the config asks for


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 8.0,
            "truncate": False,
        },
    ],
    ids=["linear", "yarn", "yarn with its own attention factor", "yarn with its own ramp"],
)
def test_scaled_rope_equals_transformers(make_checkpoint: Make, tmp_path: Path, rope: dict[str, object]) -> None:
    folder = make_checkpoint(rope_parameters={**rope, "rope_theta": 1e4}, max_position_embeddings=2048)
    plain, composed = errors_against_transformers(folder, tmp_path / "store", DOCUMENTS)
    assert plain < TOLERANCE
    assert composed < TOLERANCE


@torch.inference_mode()
def test_a_wrong_rope_would_be_noticed(make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention factor enters twice. Forgotten, it is orders above the tolerance."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    folder = make_checkpoint(rope_parameters=rope)
    true = models_config._rope_frequencies
    monkeypatch.setattr(models_config, "_rope_frequencies", lambda *given: (true(*given)[0], 1.0))
    assert min(errors_against_transformers(folder, tmp_path / "store", DOCUMENTS)) > 100 * TOLERANCE


def test_the_old_spelling_of_a_scaled_rope_is_the_same_model(make_checkpoint: Make) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    new = make_checkpoint("new", rope_parameters={**rope, "rope_theta": 1e6})
    old = shutil.copytree(new, new.parent / "old")
    edit_json(old / "config.json", "rope_parameters", rope_scaling=rope, rope_theta=1e6)
    assert read_config(old).numbers == read_config(new).numbers


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1536}, 6144),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048),
    ],
    ids=["default", "linear", "yarn as Qwen3 documents it", "yarn with the window already stretched"],
)
def test_the_window_is_what_the_model_is_made_for(make_checkpoint: Make, rope: dict[str, object], window: int) -> None:
    folder = edit_json(make_checkpoint() / "config.json", rope_parameters={**rope, "rope_theta": 1e6})
    assert read_config(folder).numbers.window == window


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_type 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "another RoPE per layer type"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "must be a config that transformers can read.*factor",
        ),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None}, "sliding_at"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architecture 'Qwen3ForSequenceClassification'"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, r"its own code \(auto_map\)"),
        ({"num_key_value_heads": 3}, "4 query heads over 3 KV heads"),
        ({"hidden_size": "many"}, "must be a config that transformers can read"),
        ({"model_type": "qwen3_moe"}, "got 'qwen3_moe'"),
        ({"model_type": ["qwen3"]}, r"got \['qwen3'\]"),
        ({"rope_parameters": None, "rope_scaling": 4}, "must be a config that transformers can read"),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, "must be a config that transformers can read"),
        ({"partial_rotary_factor": [0.5]}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
        ({"dtype": "int8"}, "dtype int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_name(make_checkpoint: Make, changes: dict[str, object], says: str) -> None:
    folder = edit_json(make_checkpoint() / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=says):
        load_model(folder, device=CPU, dtype=None)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"mlp_bias": True}, r"biases in the MLP .* plain Llama checkpoint"),
        ("mistral", {"sliding_window": 64}, "a sliding window of 64 tokens"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
            "sliding",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_type 'llama3'"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(
    make_checkpoint: Make, family: str, changes: dict[str, object], says: str
) -> None:
    folder = edit_json(make_checkpoint(family=family) / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=says):
        load_model(folder, device=CPU, dtype=None)


@torch.inference_mode()
def test_a_base_models_weights_are_loaded_as_transformers_loads_them(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    fingerprint = load_model(folder, device=CPU, dtype=None).fingerprint
    edit_weights(
        folder, lambda w: [w.update({name.removeprefix("model."): w.pop(name)}) for name in list(w) if "model." in name]
    )
    assert load_model(folder, device=CPU, dtype=None).fingerprint == fingerprint
    assert max(errors_against_transformers(folder, tmp_path / "store", DOCUMENTS)) < TOLERANCE


def test_rope_buffers_of_old_versions_of_transformers_are_no_weights(make_checkpoint: Make) -> None:
    folder = make_checkpoint(family="llama")
    fingerprint = load_model(folder, device=CPU, dtype=None).fingerprint
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}))
    assert load_model(folder, device=CPU, dtype=None).fingerprint == fingerprint


@pytest.mark.parametrize(("content", "says"), [("{", "can't be read"), ("[]", "must hold a JSON object")])
def test_a_damaged_config_says_which_file(make_checkpoint: Make, content: str, says: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=rf"config\.json.*{says}"):
        load_model(folder, device=CPU, dtype=None)


@pytest.mark.parametrize(
    ("stored", "named", "chosen"),
    [
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float16, "float16", torch.float32),
    ],
    ids=str,
)
def test_dtype_auto_is_what_the_config_names_or_the_weights_are_stored_in(
    make_checkpoint: Make, stored: torch.dtype, named: str | None, chosen: torch.dtype
) -> None:
    folder = make_checkpoint()
    edit_weights(folder, lambda w: w.update({name: weight.to(stored) for name, weight in w.items()}))
    edit_json(folder / "config.json", "dtype", **({"torch_dtype": named} if named else {}))
    assert load_model(folder, device=CPU, dtype=None).dtype == chosen


def test_explain_says_that_dtype_made_a_miss(random_checkpoint: Path, tmp_path: Path) -> None:
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu") as braid:
        assert braid.dtype == torch.float32
        rules = braid.register_system("Answer briefly.")
        braid.register("A fact.", name="fact", anchor=rules)
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu", dtype="bfloat16") as braid:
        assert "computed in float32; this model runs in bfloat16" in str(braid.compose([rules, "fact"]).explain())


def test_generation_defaults_are_the_models_own(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    path = folder / "generation_config.json"
    qwen3 = {"do_sample": True, "eos_token_id": [1021, 1019], "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    path.write_text(json.dumps(qwen3))
    config = read_config(folder).numbers
    assert config.eos_ids == {1021, 1019}
    assert config.generation == GenerationDefaults(top_k=20, top_p=0.95)
    path.write_text(json.dumps({"temperature": 0.0, "do_sample": True, "min_p": None}))
    assert read_config(folder).numbers.generation == GenerationDefaults()
    path.unlink()
    assert read_config(folder).numbers.generation == GenerationDefaults()
    assert read_config(folder).numbers.eos_ids == {1021}


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"eos_token_id": ["x"]},
    ],
    ids=str,
)
def test_generation_defaults_out_of_range_are_refused(make_checkpoint: Make, wrong: dict[str, object]) -> None:
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(UnsupportedModelError, match=rf"generation_config\.json must be .* got {next(iter(wrong))}"):
        read_config(folder)


# The chat template's thinking

QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def test_thinking_changes_the_tail_and_no_stored_entry(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        rules = braid.register_system("Answer briefly.")
        fact = braid.register("A fact.", anchor=rules)
        context = braid.compose([rules, fact])
        closed = context.prompt_ids("Well?")[len(context.input_ids) :]
    with Braid(folder, store=tmp_path / "store", device="cpu", thinking=True) as braid:
        context = braid.compose([rules, fact])
        open_ended = context.prompt_ids("Well?")[len(context.input_ids) :]
        usage = braid.ask("Well?", chunks=[rules, fact], max_new_tokens=1).usage
    assert usage.computed_tokens == len(open_ended)
    assert closed[: len(open_ended)] == open_ended
    layout = PromptLayout(folder)
    assert layout.decode(closed[len(open_ended) :]) == "<think>\n\n</think>\n\n"
    assert PromptLayout(folder, thinking=True).fingerprint == layout.fingerprint


def test_a_template_with_other_blocks_has_another_fingerprint(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    first = PromptLayout(folder).fingerprint
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE.replace("system\\n' +", "system\\nRules: \\n' +"))
    assert PromptLayout(folder).fingerprint != first


def test_thinking_without_a_switch_in_the_template_warns(random_checkpoint: Path) -> None:
    with pytest.warns(LayoutWarning, match="thinking=True changes nothing"):
        PromptLayout(random_checkpoint, thinking=True)


# Where the tokenizer and the model meet


def test_an_answer_ends_where_the_template_ends_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A tuned base model: its config names only the base model's end of text."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tuned")
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=1019)
    with Braid(folder, store=tmp_path / "store", device="cpu") as braid:
        rules = braid.register_system("You answer questions from the documents.")
        fact = braid.register("The capital of Aistonia is Flubarg.")
        answer = braid.ask("What is the capital of Aistonia?", chunks=[rules, fact], max_new_tokens=60)
    assert (answer.text, answer.finish_reason, answer.token_ids[-1]) == ("Flubarg.", "stop", 1021)


def test_an_embedding_without_rows_for_control_tokens_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint(vocab_size=1000, eos_token_id=None)
    with pytest.raises(UnsupportedModelError, match="vocab_size must be above every token id of a prompt; got 1000"):
        Braid(folder, store=tmp_path / "store", device="cpu")


# Strictly


def test_every_missing_unexpected_and_misshapen_weight_is_named_at_once(make_checkpoint: Make) -> None:
    def edit(weights: Weights) -> None:
        del weights["model.norm.weight"], weights["model.layers.2.mlp.up_proj.weight"]
        weights["model.extra"] = torch.ones(1)
        weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(160, 96)

    folder = edit_weights(make_checkpoint(), edit)
    with pytest.raises(WeightsError) as caught:
        load_model(folder, device=CPU, dtype=None)
    for part in (
        "lacks 'model.norm.weight' of shape [96], 'model.layers.2.mlp.up_proj.weight' of shape [160, 96]",
        "'model.layers.0.mlp.down_proj.weight', which has shape [160, 96]; config.json asks for [96, 160]",
        "1 weights that this architecture does not use, such as 'model.extra'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_named(make_checkpoint: Make, value: float, stored: torch.dtype) -> None:
    names = ["model.layers.1.self_attn.q_norm.weight", "lm_head.weight"]

    def edit(weights: Weights) -> None:
        weights.update({name: weight.to(stored) for name, weight in weights.items()})
        for name in names:
            weights[name].view(-1)[-1] = value

    folder = edit_weights(make_checkpoint(), edit)
    with pytest.raises(WeightsError, match="NaN or infinity in '{}', '{}'".format(*names)):
        load_model(folder, device=CPU, dtype=None)


def test_finite_but_absurd_weights_are_reported_each_time(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braidsdk.models.fingerprints.SETTLED_NS", 0)
    name = "model.layers.0.mlp.down_proj.weight"
    folder = edit_weights(make_checkpoint(), lambda w: w[name].view(-1).__setitem__(7, -1e29))
    for _ in range(2):
        with pytest.warns(WeightsWarning, match=f"above 1e\\+06.*: '{name}'"):
            load_model(folder, device=CPU, dtype=None, fingerprints=tmp_path / "file")


def test_biases_that_the_config_switches_off_are_reported_and_not_used(make_checkpoint: Make) -> None:
    biased = make_checkpoint("biased", attention_bias=True)
    plain = edit_weights(
        shutil.copytree(biased, biased.parent / "plain"),
        lambda w: [w.pop(name) for name in list(w) if name.endswith(".bias")],
    )
    edit_json(plain / "config.json", attention_bias=False)
    edit_json(biased / "config.json", attention_bias=False)
    edit_weights(biased, lambda w: w["model.layers.0.self_attn.k_proj.bias"].fill_(float("nan")))
    with pytest.warns(WeightsWarning, match=r"not used: 'model\.layers\.0\.self_attn\.k_proj\.bias'.* and 4 more"):
        loaded = load_model(biased, device=CPU, dtype=None)
    assert loaded.fingerprint == fingerprint(plain)
    assert all(layer.qkv.bias is None and layer.out_bias is None for layer in loaded._layers)  # type: ignore[attr-defined]


def test_a_copy_of_tied_embeddings_is_no_fault_and_another_head_is_used_as_in_transformers(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    alone = fingerprint(folder)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert fingerprint(folder) == alone
    edit_weights(folder, lambda w: w["lm_head.weight"].mul_(torch.linspace(0.5, 2.0, 1024)[:, None]))
    with pytest.warns(WeightsWarning, match="ties its embeddings, but holds another 'lm_head.weight'"):
        assert max(errors_against_transformers(folder, tmp_path / "store", DOCUMENTS)) < TOLERANCE


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model-00003-of-00010.safetensors").unlink(), "00003-of-.* can't be read"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json must name the shards"),
        (
            lambda folder: edit_weights(
                folder, lambda w: w.update({"model.norm.weight": torch.ones(96)}), "model-00001-of-00010.safetensors"
            ),
            "'model.norm.weight' must be in one file .* both hold it",
        ),
        (
            lambda folder: os.truncate(folder / "model-00002-of-00010.safetensors", 5000),
            "00002-of-.* can't be read",
        ),
    ],
    ids=["a shard is missing", "the index is empty", "a weight is in two shards", "a shard is cut off"],
)
def test_damaged_shards_are_named(
    make_checkpoint: Make, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    folder = sharded(make_checkpoint(), tmp_path / "sharded")
    for index, path in enumerate(sorted(folder.glob("*.safetensors"))):  # names that do not depend on the count
        renamed = f"model-{index + 1:05}-of-00010.safetensors"
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(index_file.read_text().replace(path.name, renamed))
        path.rename(folder / renamed)
    damage(folder)
    with pytest.raises(WeightsError, match=says):
        load_model(folder, device=CPU, dtype=None)


def test_quantised_weights_are_refused_by_name(make_checkpoint: Make) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    folder = edit_weights(make_checkpoint(), lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(WeightsError, match=f"stores '{name}' as I8"):
        load_model(folder, device=CPU, dtype=None)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint()
    file = folder / "model.safetensors"
    monkeypatch.setattr(models_weights.Weights, "take", shrinking(models_weights.Weights.take, file))
    with pytest.raises(WeightsError, match="cut short within"):
        load_model(folder, device=CPU, dtype=None)


def shrinking(take: Callable[..., torch.Tensor], file: Path) -> Callable[..., torch.Tensor]:
    def shrink_and_take(*arguments: object, **options: object) -> torch.Tensor:
        os.truncate(file, file.stat().st_size // 2)
        return take(*arguments, **options)

    return shrink_and_take


# Mapped files


def opened(folder: Path, known: Path | None = None) -> models_weights.Weights:
    found = models_weights.Weights(folder, known)
    found.expect(weight_shapes(read_config(folder), tied=False))
    return found


def shows_the_file(weight: torch.Tensor, file: Path) -> bool:
    """Whether a tensor changes with the file. Sets the file to zeros."""
    before = weight.clone()
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    return not torch.equal(weight, before)


QKV = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]


def test_mapped_weights_are_those_that_are_read(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = sharded(random_checkpoint, tmp_path / "sharded")
    read, mapped = opened(folder), opened(folder)
    for names in [*([name] for name in weight_shapes(read_config(folder), tied=False)), QKV]:
        taken = mapped.take(names, torch.float32, CPU, mapped=True)
        assert torch.equal(whole(taken), read.take(names, torch.float32, CPU))
    assert mapped.finish() == read.finish()


def test_a_mapped_weight_is_the_file_itself(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    rows = opened(folder).take(QKV, torch.float32, CPU, mapped=True)
    assert isinstance(rows, Rows)
    assert (rows.shape, len(rows), rows.dtype, rows.device) == ((256, 96), 256, torch.float32, CPU)
    assert shows_the_file(rows.parts[2], folder / "model.safetensors")


@pytest.mark.parametrize("names", [QKV, QKV[:1]], ids=["several", "one"])
def test_weights_of_another_dtype_are_converted_and_copied(make_checkpoint: Make, names: list[str]) -> None:
    folder = make_checkpoint()
    taken = opened(folder).take(names, torch.bfloat16, CPU, mapped=True)
    assert isinstance(taken, torch.Tensor)
    assert torch.equal(taken, opened(folder).take(names, torch.float32, CPU).bfloat16())
    assert not shows_the_file(taken, folder / "model.safetensors")


def test_weights_that_are_not_aligned_are_copied(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    file = folder / "model.safetensors"
    want = opened(folder).take(QKV, torch.float32, CPU)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    file.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    taken = opened(folder).take(QKV, torch.float32, CPU, mapped=True)
    assert isinstance(taken, torch.Tensor)
    assert torch.equal(taken, want)


def test_mapped_weights_are_checked_until_they_are_known(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braidsdk.models.fingerprints.SETTLED_NS", 0)
    folder, known = make_checkpoint(), tmp_path / "known"

    def take() -> tuple[torch.Tensor, str]:
        found = opened(folder, known)
        return whole(found.take(QKV, torch.float32, CPU, mapped=True)), found.finish()

    first = take()
    with monkeypatch.context() as patch:
        patch.delattr(torch, "aminmax")
        second = take()
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    edit_weights(folder, lambda w: w[QKV[1]].view(-1).__setitem__(5, float("nan")))
    with pytest.raises(WeightsError, match=f"NaN or infinity in '{QKV[1]}'"):
        take()


@pytest.mark.parametrize(("kept", "says"), [(0.5, "cut short within"), (0.0, "can't be read")])
def test_a_file_that_is_cut_short_before_it_is_mapped_is_an_error(
    make_checkpoint: Make, kept: float, says: str
) -> None:
    folder = make_checkpoint()
    found, file = opened(folder), folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * kept))
    last = max(QKV, key=lambda name: found._stored[name].start)
    with pytest.raises(WeightsError, match=says):
        found.take([last], torch.float32, CPU, mapped=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_packed_value_comes_from_the_file(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Pieces of an odd size, and memory that is NaN until it is written."""
    monkeypatch.setattr("braidsdk.models.weights.PIECE_BYTES", 1000)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(float("nan")))
    loaded = load_model(sharded(random_checkpoint, tmp_path / "sharded"), device=CPU, dtype=dtype)
    want = {name: weight.to(dtype) for name, weight in load_file(random_checkpoint / "model.safetensors").items()}
    layers = loaded._layers  # type: ignore[attr-defined]

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return weight.to_dense() if weight.is_mkldnn else weight

    for index, layer in enumerate(layers):
        at = f"model.layers.{index}"
        stacked = torch.cat([want[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(plain(layer.qkv.qkv), stacked)
        assert torch.equal(
            plain(layer.gate_up), torch.cat([want[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        )
        assert torch.equal(plain(layer.down), want[f"{at}.mlp.down_proj.weight"])
        assert torch.equal(plain(layer.out), want[f"{at}.self_attn.o_proj.weight"])
        assert torch.equal(layer.qkv.k_norm, want[f"{at}.self_attn.k_norm.weight"])
    assert torch.equal(loaded.embedding, want["model.embed_tokens.weight"])  # type: ignore[attr-defined]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN packs no bfloat16 here")
def test_weights_lie_as_their_backend_reads_them_and_keep_their_values(random_checkpoint: Path) -> None:
    def layer(backends: Backends) -> dict[str, torch.Tensor]:
        loaded = load_model(random_checkpoint, device=CPU, dtype=torch.bfloat16, choose=lambda *_: backends)
        (first, *_) = loaded._layers  # type: ignore[attr-defined]
        return {"qkv": first.qkv.qkv, "out": first.out, "gate_up": first.gate_up, "down": first.down}

    packed, mixed = layer(Backends()), layer(Backends(norm_qkv="native"))
    assert all(weight.is_mkldnn for weight in packed.values())
    assert [name for name, weight in mixed.items() if not weight.is_mkldnn] == ["qkv"]
    assert torch.equal(packed["qkv"].to_dense(), mixed["qkv"])


# Memory

MEASURE = """
import sys, psutil, torch
from pathlib import Path
from braidsdk.models.registry import load_model
warm, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
load_model(warm, device=torch.device("cpu"), dtype=dtype)
before = psutil.Process().memory_info().rss
load_model(folder, device=torch.device("cpu"), dtype=dtype)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(int(peak) * 1024 - before)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of Qwen3-0.6B's 28 layers and a seventh of its vocabulary: 198 MB in bfloat16, tied, in two shards."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3Config(
        vocab_size=20_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = weight_shapes(read_config(folder), tied=True)
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    names, shard = list(weights), "model-{}-of-2.safetensors"
    where = {name: shard.format(1 + (index > 20)) for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak of one process")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_than_the_weights(
    random_checkpoint: Path, large_checkpoint: Path, dtype: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(random_checkpoint), str(large_checkpoint), dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = sum(path.stat().st_size for path in large_checkpoint.glob("*.safetensors"))
    size = files * (2 if dtype == "float32" else 1)
    assert 0.9 * size < int(done.stdout) < 1.3 * size


def test_a_checkpoint_that_opens_does_not_warn(random_checkpoint: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(sharded(random_checkpoint, tmp_path / "sharded"), device=CPU, dtype=None)
