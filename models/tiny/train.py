"""Train braid-tiny from scratch on one GPU: `python -m braidsdk.models.tiny.train --out FOLDER`.

Training uses plain full attention only: the model never sees a composed cache, so what composition costs stays visible.
When training ends the folder is complete: it holds bfloat16 tensors and a config that asks for float32.
"""

import argparse
import itertools
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from braidsdk.models.tiny import branches
from braidsdk.models.tiny.data import KINDS, Batch, Rows
from braidsdk.models.tiny.tokenizer import VOCAB_SIZE, build_tokenizer, save_tokenizer

__all__ = ["Settings", "make_config", "save_checkpoint", "train"]

log = logging.getLogger(__name__)


MAX_POSITIONS = 5120
"""Room for the longest training row and a little more."""


@dataclass(frozen=True)
class Settings:
    """The settings of one training run. It ends after `steps` or `seconds`, whichever comes first.

    The first lessons (see `draw_sample`) are a share `lesson_mix` of the samples, until a share `lesson_goal` of the
    tokens of alias and chain answers is right, or a share `lesson_share` of the run is over. Then the mixture replaces
    them, and they stay one in twenty. With a `lesson_share` of 0 the run begins with the mixture.
    """

    steps: int = 30_000
    seconds: float = 640.0
    batch_tokens: int = 65_536
    learning_rate: float = 1.0e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    rest_weight: float = 0.1
    lesson_mix: float = 1.0
    lesson_share: float = 0.25
    lesson_goal: float = 0.98
    save_seconds: float = 60.0
    seed: int = 0
    workers: int = 12
    compile: bool = True


def make_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The architecture: Qwen3 at 4.98 million parameters."""
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
    )


def save_checkpoint(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the weights, rounded to bfloat16, and the configs. The model itself does not change."""
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    config = model.config
    GenerationConfig(
        do_sample=False,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def _optimizer(model: Qwen3ForCausalLM, settings: Settings) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=parameters[0].is_cuda,
    )


def _loss(logits: torch.Tensor, batch: Batch, rest_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss on answers + `rest_weight` x mean loss on the rest, `[kinds]` share of answer tokens predicted)."""
    targets, counted = batch.targets()
    scores = logits[:, :-1].float()
    losses = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    kinds = batch.answer[:, 1:] * counted
    answers = (kinds > 0).float()
    rest = counted.float() - answers
    loss = (losses * answers).sum() / answers.sum() + rest_weight * (losses * rest).sum() / rest.sum()
    right = scores.argmax(-1) == targets
    of_kind = torch.stack([kinds == 1 + kind for kind in range(len(KINDS))])
    return loss, ((of_kind & right).sum((1, 2)) / of_kind.sum((1, 2)).clamp(min=1)).detach()


def _learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from the peak to a hundredth of it at `progress` 1."""
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return settings.learning_rate * min(1.0, step / settings.warmup_steps) * (0.01 + 0.99 * cosine)


def _step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.AdamW, batch: Batch, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one update. Returns what `_loss` returns."""
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16):
        logits = model(
            batch.ids,
            attention_mask={"full_attention": batch.mask(torch.bfloat16)},
            position_ids=batch.positions,
            use_cache=False,
        ).logits
    loss, right = _loss(logits, batch, settings.rest_weight)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.detach(), right


class _Lessons:
    """Decides the share of first lessons from how many alias answers are right. It looks every 25 steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.average = 0.0
        self.ended: float | None = None if settings.lesson_share else -1.0

    def share(self, step: int, progress: float, right: torch.Tensor) -> float:
        """The share of first lessons from now on. It is constant until the goal, then it falls to 0.05."""
        if self.ended is None and step % 25 == 0:
            renamed = right[[KINDS.index("alias"), KINDS.index("chain")]].min().item()
            self.average += 0.2 * (renamed - self.average)
            if self.average >= self.settings.lesson_goal or progress >= self.settings.lesson_share:
                self.ended = progress
                log.info("step %d: first lessons end, alias and chain answer tokens %.4f", step, self.average)
        mix = self.settings.lesson_mix
        return mix if self.ended is None else max(0.05, mix - (progress - self.ended) / 0.1)


def train(out: Path, settings: Settings, device: torch.device, start: Path | None = None) -> Qwen3ForCausalLM:
    """Write tokenizer, weights and `training.json` into `out`. Returns the model with its unrounded weights.

    `start` is a checkpoint with the same tokenizer to go on from. Give another seed then, or it reads the same texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, out)
    model = Qwen3ForCausalLM.from_pretrained(start) if start else Qwen3ForCausalLM(make_config(tokenizer))
    model.config.max_position_embeddings = MAX_POSITIONS
    model.set_attn_implementation(branches.NAME)
    model.to(device).train()  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    if settings.compile and device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    optimizer = _optimizer(model, settings)
    rows = Rows(out / "tokenizer.json", settings.batch_tokens, settings.seed)
    stream = DataLoader(rows, batch_size=None, num_workers=settings.workers, pin_memory=device.type == "cuda")
    lessons = _Lessons(settings)
    rows.easy.fill_(settings.lesson_mix if settings.lesson_share else 0.05)
    saved = 0.0
    tokens, elapsed, step = 0, 0.0, 0
    began = time.monotonic()
    for step, packed in zip(itertools.count(1), stream):
        elapsed = time.monotonic() - began
        progress = max(step / settings.steps, elapsed / settings.seconds)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step, progress)
        loss, right = _step(model, optimizer, Batch.unpack(packed, device), settings)
        rows.easy.fill_(lessons.share(step, progress, right))
        tokens += packed[0].shape[1] * packed[0].shape[2]
        if step % 200 == 0 or step <= 2:
            shares = ", ".join(f"{kind} {share:.3f}" for kind, share in zip(KINDS, right.tolist(), strict=True))
            size = "x".join(map(str, packed[0].shape[1:]))
            log.info("step %d, %.0f s, %d tokens: %s, loss %.4f, right: %s", step, elapsed, tokens, size, loss, shares)
        if progress >= 1.0:
            break
        if elapsed > saved + settings.save_seconds:
            saved = elapsed
            save_checkpoint(model, out)
    save_checkpoint(model, out)
    record = {
        "settings": asdict(settings),
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "tokens": tokens,
        "lessons_ended_at": lessons.ended,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "went_on_from": json.loads((start / "training.json").read_text()) if start else None,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return model


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {name: value for name, value in vars(arguments).items() if name in Settings.__annotations__}
    return Settings(**{name: value for name, value in given.items() if value is not None})


def main() -> None:
    """The command line. A setting that is not given keeps its default from `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--steps", type=int, help="most steps")
    parser.add_argument("--seconds", type=float, help="most seconds; the learning rate falls to its end by then")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one step, padding counted")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate")
    parser.add_argument("--rest-weight", type=float, help="weight of the loss on everything except answers")
    parser.add_argument("--lesson-share", type=float, help="most of the run that the first lessons may take")
    parser.add_argument("--lesson-mix", type=float, help="share of first lessons while they last")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--workers", type=int, help="processes that write text; 0 writes it in this one")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_float32_matmul_precision("high")
    train(arguments.out, _settings(arguments), torch.device(arguments.device), arguments.start)


if __name__ == "__main__":
    main()
