"""What `braid doctor` looks at in a model: that it opens, its dtype, the seams of its prompts, and its numbers.

The model is opened over an empty store of its own, so that nothing of the checks stays in the user's.
"""

import warnings
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from braidsdk import Braid, Context
from braidsdk.cli.checks import Check, Finding, Subject, processor
from braidsdk.kernels import native
from braidsdk.kernels.selftest import Result
from braidsdk.models.base import read_json
from braidsdk.models.registry import find_checkpoint
from braidsdk.models.tiny.outside import OutsideWorldWarning
from braidsdk.types import size

RULES = "You answer questions from the documents."

DOCUMENTS = (
    "The capital of Aistonia is Flubarg.\n\nIts longest river is the Trone (412 km).",
    "def area(r):\n    return 3.14159 * r ** 2  # 東京 π ≈ 3,14 — naïve 🙂",
)

QUESTIONS = ("What is the capital of Aistonia?", "How long is the river, in km?", "¿Qué es π?")

LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far logits may be from transformers', RMS over RMS. In bfloat16 both sides round in every layer, which alone
makes 0.01 to 0.02 with few layers, as weights in int8 do: only gross errors show there. `--dtype float32` looks
closer."""

_NOT_OPEN = Finding("skip", "the model could not be opened")


def check_model(subject: Subject) -> Finding:
    """Whether the model opens, and whether it warned of something."""
    folder = find_checkpoint(subject.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.braid = Braid(
            subject.model,
            store=subject.scratch,
            device=subject.device,
            dtype=subject.dtype,
            weights=subject.weights,
        )
    weights = weight_bytes(folder)
    detail, facts = f"{folder}: {size(weights)} of weights", {"folder": str(folder), "weight_bytes": weights}
    if folder.is_dir():
        config = read_json(folder / "config.json")
        window = facts["window"] = config.get("max_position_embeddings")
        detail = f"{folder}: {config.get('num_hidden_layers')} layers, {size(weights)} of weights, window {window}"
    if caught:
        words = "; ".join(str(each.message) for each in caught)
        return Finding("warn", f"{detail}; it warned: {words}", "See what the warnings ask for.", facts)
    return Finding("ok", detail, facts=facts)


def check_dtype(subject: Subject) -> Finding:
    """What the model is computed in, and whether the device is quick at it."""
    braid = subject.braid
    if braid is None:
        return _NOT_OPEN
    dtype = str(braid.dtype).removeprefix("torch.")
    detail = f"{dtype} on {braid.device}"
    facts = {"dtype": dtype, "device": str(braid.device)}
    _, flags = processor()
    slow = flags and not flags & {"avx512_bf16", "amx_bf16", "bf16"} and "torch" in braid.kernels.backends.values()
    if braid.device.type == "cpu" and braid.dtype == torch.bfloat16 and slow:
        remedy = "Try --dtype float32: it takes twice the memory, and may be several times faster here."
        return Finding("warn", f"{detail}; this processor has no bfloat16 instructions", remedy, facts)
    return Finding("ok", detail, facts=facts)


def check_seams(subject: Subject) -> Finding:
    """Whether composed prompts are, id for id, what the model's chat template gives."""
    if subject.braid is None:
        return _NOT_OPEN
    tokenizer = AutoTokenizer.from_pretrained(find_checkpoint(subject.model), trust_remote_code=False)
    context = _context(subject.braid)
    differing = []
    for question in QUESTIONS:
        messages = [
            {"role": "system", "content": RULES},
            {"role": "user", "content": "\n".join((*DOCUMENTS, question))},
        ]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if tuple(tokenizer.encode(str(text), add_special_tokens=False)) != context.prompt_ids(question):
            differing.append(question)
    facts = {"prompts": len(QUESTIONS), "differing": len(differing)}
    if differing:
        remedy = (
            "Answers may differ a little from a plain prompt's. Use the chat template that came with the checkpoint."
        )
        return Finding(
            "warn", f"{len(differing)} of {len(QUESTIONS)} prompts differ from the template's", remedy, facts
        )
    return Finding(
        "ok",
        f"{len(QUESTIONS)} prompts of {len(context.input_ids)} tokens and more agree with the chat template",
        facts=facts,
    )


def check_numerics(subject: Subject) -> Finding:
    """How far logits over composed caches are from those of transformers' full prefill."""
    braid = subject.braid
    if braid is None:
        return _NOT_OPEN
    folder = find_checkpoint(subject.model)
    if folder.is_file():
        return Finding("skip", "a GGUF file is not compared with transformers; check the checkpoint it was made of")
    needed, free = 2 * weight_bytes(folder), free_memory(braid.device)
    if needed > free:
        detail = f"a second copy of the model needs about {size(needed)}; {size(free)} are free"
        return Finding("skip", detail, "Close other programs, or check a smaller model of the same family.")
    peer: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=braid.dtype)
    peer.to(braid.device).eval()
    context = _context(braid)
    errors = [_error(context, peer, question) for question in QUESTIONS]
    worst, limit = max(errors), LIMITS[torch.bfloat16 if subject.weights == "int8" else braid.dtype]
    facts = {"error": worst, "limit": limit, "prompts": len(QUESTIONS)}
    detail = f"logits differ from transformers' by {worst:.1e} at most (RMS over RMS; limit {limit:.0e})"
    if not worst <= limit:  # NaN is no success
        remedy = "Answers can't be trusted here. Try --device cpu --dtype float32, and report the output."
        return Finding("fail", detail, remedy, facts)
    return Finding("ok", detail, facts=facts)


def check_kernels(subject: Subject) -> Finding:
    """Whether each Triton kernel is right at the model's shapes, and how near to the device's bandwidth it comes."""
    braid = subject.braid
    if braid is None:
        return _NOT_OPEN
    kernels, on_cpu = braid.kernels, braid.device.type == "cpu"
    if reason := kernels.obstacle("triton"):
        if on_cpu and set(kernels.backends.values()) != {"torch"}:
            level = native.level().name
            detail = f"the model runs on {kernels}; the C kernels are compiled for {level}"
            return Finding("ok", detail, facts={"backends": str(kernels), "level": level})
        reason = f"{reason}; {kernels.obstacle('native') or 'torch was requested'}" if on_cpu else reason
        return Finding("skip", f"the model runs on torch: {reason}")
    results = kernels.self_test(timed=True)
    braid.warm_up(progress=False)
    launches = kernels.launches()
    facts = {"backends": str(kernels), "launches": launches, "cases": [asdict(result) for result in results]}
    passes = ", ".join(f"{name}: {count}" for name, count in launches.items() if "," not in name)
    graphs = f"in CUDA graphs; kernels of each: {passes}" if passes else "no CUDA graphs"
    lines = [
        f"the model runs on {kernels}, {graphs}",
        "each kernel, caches cold: relative error against float64, time, and bandwidth as a share of a large copy's",
    ]
    widths = [max(len(getattr(result, name)) for result in results) for name in ("op", "case")]
    lines += [f"{result.op:<{widths[0]}}  {result.case:<{widths[1]}}  {_measured(result)}" for result in results]
    if all(result.ok for result in results):
        return Finding("ok", "\n      ".join(lines), facts=facts)
    remedy = "Set BRAID_KERNELS=torch for now; newer versions of torch and triton together may help."
    return Finding("fail", "\n      ".join(lines), remedy, facts)


def _measured(result: Result) -> str:
    if result.trouble or result.us is None:
        return f"FAIL: {result.trouble}"
    return f"{result.error:.1e}  {result.us:8.1f} us  {result.bandwidth:5.0%}"


CHECKS: tuple[Check, ...] = (check_model, check_dtype, check_seams, check_numerics, check_kernels)


def _context(braid: Braid) -> Context:
    """The sample documents after the system prompt, in mode exact: equal to a full prefill but for rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideWorldWarning)
        rules = braid.register_system(RULES)
        documents = braid.register_many(DOCUMENTS, progress=False)
    return braid.compose([rules, *documents], mode="exact")


@torch.inference_mode()
def _error(context: Context, peer: torch.nn.Module, question: str) -> float:
    ours = context.next_token_logits(question).double()
    ids = torch.tensor([context.prompt_ids(question)], device=next(peer.parameters()).device)
    theirs = peer(ids, logits_to_keep=1).logits[0, -1].double().cpu()
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights as stored."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model would lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
