"""Shared fixtures: random Qwen3 checkpoints saved by transformers, and an open Braid over a temporary store."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    logging,
)
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from braidsdk import Braid
from braidsdk.cache import pool
from braidsdk.cache.pool import PAGE_SIZE, Pool
from braidsdk.cache.resident import Resident
from braidsdk.compose.composition import Composition
from braidsdk.engine.engine import Engine
from braidsdk.engine.request import Request
from braidsdk.engine.scheduler import Priority
from braidsdk.models.tiny.tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny" / "checkpoint"

logging.set_verbosity_error()
logging.disable_progress_bar()
os.environ["BRAID_CHECK"] = "1"  # the engine checks itself whenever it is idle
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: models are tiny, and machines shared
torch.set_num_threads(1)
pool.TOUCHED_BYTES = 1 << 22  # each Braid that a test opens writes to so much memory


def patched_once(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A kernel calls a function. The interpreter patches Triton's language anew for each such call, which took a third
    of the time of all kernels' tests."""
    langs = [each for each in function.fn.__globals__.values() if each is tl or each is tl.core]
    if any(tl.core.is_builtin(lang.load) for lang in langs):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


InterpretedFunction.__call__ = patched_once  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs CUDA where there is none, and what takes minutes unless `-m` asks for it."""
    left_out = [] if torch.cuda.is_available() else ["gpu"]
    left_out += [name for name in ("slow", "campaign") if name not in config.option.markexpr]
    gone = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(trylast=True)
def pytest_report_header() -> str:
    return "cuda: " + ("yes" if torch.cuda.is_available() else "none, tests marked gpu are deselected")


FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen2": (Qwen2Config, {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "llama": (
        LlamaConfig,
        {
            "num_attention_heads": 6,
            "head_dim": 24,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "mistral": (MistralConfig, {"head_dim": 40, "sliding_window": None, "num_key_value_heads": 4}),
}
"""Of each family transformers' config, and an odd geometry."""


def save_random_checkpoint(folder: Path, *, family: str = "qwen3", seed: int = 0, **changes: object) -> Path:
    """A model of odd geometry with random weights, saved by transformers, with braid-tiny's tokenizer beside it."""
    config_class, odd = FAMILIES[family]
    config = config_class(
        **{
            "vocab_size": 1024,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 1021,
            **odd,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)
        else:
            torch.nn.init.normal_(weight, std=0.08)
    model.save_pretrained(folder)
    save_tokenizer(Tokenizer.from_file(str(TINY / "tokenizer.json")), folder)
    return folder


@pytest.fixture(scope="session")
def pool_of() -> Callable[[Braid], Pool]:
    """A Braid's pool, once the engine has done what it was asked for: no page is missing or has two owners, and no call
    holds an entry.

    Like `tail_logits` it reaches behind the surface, so that no test has to.
    """

    def settled(braid: Braid) -> Pool:
        engine = braid._engine
        engine.call(engine._loop._integrity)
        assert not engine.pool._pins, "a call holds an entry"
        return engine.pool

    return settled


@pytest.fixture(scope="session")
def engine_of() -> Callable[[Braid], Engine]:
    """A Braid's engine, for what holds its layout of prompts, its keys and its store against an attacker."""
    return lambda braid: braid._engine


@pytest.fixture(scope="session")
def evict() -> Callable[[Braid, Iterable[Resident]], None]:
    """Evicts entries of a Braid, in the engine's thread: it alone changes a pool, and checks it meanwhile."""

    def dropped(braid: Braid, entries: Iterable[Resident]) -> None:
        engine = braid._engine
        for entry in entries:
            engine.call(partial(engine.pool.drop, entry))

    return dropped


@pytest.fixture(scope="session")
def page_bytes() -> int:
    """What a page of the random checkpoint takes on a CPU, in float32."""
    layers, kv_heads, head_dim, itemsize = 3, 2, 32, 4
    return layers * 2 * kv_heads * PAGE_SIZE["cpu"] * head_dim * itemsize


@pytest.fixture(scope="session")
def tail_logits() -> Callable[[Braid, Composition], torch.Tensor]:
    """Logits after a composition's tail, [vocab_size]."""

    def computed(braid: Braid, composition: Composition) -> torch.Tensor:
        engine = braid._engine
        request = Request(
            priority=Priority.QUESTION,
            submitted=0.0,
            decodes=False,
            namespace=engine.namespace,
            composition=composition,
            keys=engine.keys(composition),
            then=lambda _, logits: logits[0].clone(),
        )
        return engine.run(request)  # type: ignore[return-value]

    return computed


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint shared by all tests; do not write to it."""
    return save_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Path]:
    """`save_random_checkpoint`, for fixtures that choose the folder."""
    return save_random_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """braid-tiny's folder; do not write to it."""
    return TINY


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Processes that a test starts take SIGINT: where this one ignores it, as a script's background job does, so would
    they."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`save_random_checkpoint` into a folder of this test."""

    def make(name: str = "made", **changes: object) -> Path:
        return save_random_checkpoint(tmp_path / name, **changes)

    return make


@pytest.fixture
def random_braid(random_checkpoint: Path, tmp_path: Path) -> Iterator[Braid]:
    """A Braid on the random checkpoint, in float32 on the CPU."""
    with Braid(random_checkpoint, store=tmp_path / "store", device="cpu", dtype="float32") as braid:
        yield braid


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Braid]:
    """A Braid on braid-tiny, on the CPU."""
    with Braid("braid-tiny", store=tmp_path / "store", device="cpu") as braid:
        yield braid


@pytest.fixture
def other(random_checkpoint: Path, tmp_path: Path) -> Callable[..., Braid]:
    """Opens a Braid on the random checkpoint or another one, over one store."""

    def opened(folder: Path = random_checkpoint, **settings: Any) -> Braid:
        return Braid(folder, store=tmp_path / "store", device="cpu", **{"dtype": "float32", **settings})

    return opened
