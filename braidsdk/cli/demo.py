"""`braid demo` does the main job on the sample documents, end to end.

The first process registers. The second one, `python -m braidsdk.cli.demo`, reloads from the store and answers. For
comparison it times a full prefill of the same ids by transformers.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from braidsdk.errors import BraidError
from braidsdk.settings import store_folder

NAMESPACE = "demo"
MODES = ("exact", "anchored")


@dataclass(frozen=True)
class Question:
    """One sample question, and the documents that it is asked over, in order.

    `alias` marks a question that needs two documents together. Composing may make its answer wrong.
    """

    question: str
    expected: str
    documents: tuple[str, ...]
    alias: bool = False


@dataclass(frozen=True)
class Samples:
    """The sample documents and questions that ship with the package."""

    system: str
    documents: dict[str, str]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Result:
    """One answered question, with times in ms."""

    question: str
    expected: str
    answer: str
    ok: bool
    mode: str
    cached_tokens: int
    computed_tokens: int
    ttft_ms: float
    full_prefill_ms: float


def load_samples() -> Samples:
    """Load the samples from the package's data."""
    raw = tomllib.loads(files("braidsdk").joinpath("samples.toml").read_text(encoding="utf-8"))
    return Samples(
        system=raw["system"],
        documents={document["name"]: document["text"] for document in raw["documents"]},
        questions=tuple(Question(**{**q, "documents": tuple(q["documents"])}) for q in raw["questions"]),
    )


def run_demo(store: Path | None, *, device: str, model: str, as_json: bool, quiet: bool = False) -> bool:
    """Register here, answer in a second process, and print. Returns whether every question that needs only one document
    was answered right.

    Raises:
        BraidError: the second process failed.
    """
    folder, console = store_folder(store), Console(stderr=True, quiet=quiet)
    computed = _register(folder, device, model, progress=not quiet)
    console.print(f"{computed} tokens computed into {folder}. Answering in a second process ...", soft_wrap=True)
    child = [sys.executable, "-P", "-m", "braidsdk.cli.demo", "--store", str(folder), "--device", device]
    done = subprocess.run([*child, "--model", model], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BraidError(f"The second process failed with exit code {done.returncode}. Its message is above.")
    report = json.loads(done.stdout)
    results = [Result(**answer) for answer in report["answers"]]
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        Console().print(_table(results))
        Console().print(_summary(results, reloaded=report["reloaded"]))
    single = {q.question for q in load_samples().questions if not q.alias}
    return bool(report["reloaded"]) and all(result.ok for result in results if result.question in single)


def _register(folder: Path, device: str, model: str, *, progress: bool) -> int:
    """Register the samples and compute what the questions need; returns the tokens computed."""
    from braidsdk import Braid

    samples = load_samples()
    with Braid(model, store=folder, device=device, namespace=NAMESPACE) as braid:
        rules = braid.register_system(samples.system, name="rules", replace=True)
        texts, names = list(samples.documents.values()), list(samples.documents)
        braid.register_many(texts, names=names, anchor=rules, replace=True, progress=progress)
        return sum(
            braid.compose([rules, *question.documents], mode=mode, keep=True).prepare()
            for question in samples.questions
            for mode in MODES
        )


def _answer_all(folder: Path, device: str, model: str) -> dict[str, object]:
    """Reload, answer, and time transformers for comparison. Runs in the second process."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from braidsdk import Braid
    from braidsdk.models.registry import find_checkpoint

    logging.disable_progress_bar()
    with Braid(model, store=folder, device=device, namespace=NAMESPACE) as braid:
        peer: torch.nn.Module = AutoModelForCausalLM.from_pretrained(find_checkpoint(model), dtype=braid.dtype)
        peer.to(braid.device).eval()

        @torch.inference_mode()
        def full_prefill_ms(prompt_ids: tuple[int, ...]) -> float:
            started = perf_counter()
            ids = torch.tensor([prompt_ids], device=braid.device)
            int(peer(ids, logits_to_keep=1).logits[0, -1].argmax())
            return (perf_counter() - started) * 1e3

        # Both run once before they are timed, because thread pools and lazy imports are not part of a first token.
        full_prefill_ms(braid.ask("Ready?", chunks=[], keep=False, max_new_tokens=1).prompt_ids)
        results, reloaded = [], True
        for question in load_samples().questions:
            for mode in MODES:
                context = braid.compose(["rules", *question.documents], mode=mode)
                answer = context.ask(question.question, max_new_tokens=24)
                reloaded = reloaded and answer.usage.cached_tokens == len(context.input_ids)
                results.append(
                    Result(
                        question=question.question,
                        expected=question.expected,
                        answer=answer.text,
                        ok=answer.text.strip().rstrip(".") == question.expected,
                        mode=mode,
                        cached_tokens=answer.usage.cached_tokens,
                        computed_tokens=answer.usage.computed_tokens,
                        ttft_ms=round(answer.timings.first_token_ms, 2),
                        full_prefill_ms=round(full_prefill_ms(answer.prompt_ids), 2),
                    )
                )
    answers = [asdict(result) for result in results]
    return {"answers": answers, "reloaded": reloaded, "store": str(folder), "model": model}


def _table(results: list[Result]) -> Table:
    """A row for each question. If the modes gave different answers, both are shown."""
    table = Table(title="Answers from reloaded caches", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("question", ratio=1)
    table.add_column("answer", max_width=16)
    table.add_column("tokens\ncached + new", justify="right")
    for heading in ("exact\nms", "anchored\nms", "full\nprefill\nms"):
        table.add_column(heading, justify="right")
    for exact, anchored in zip(results[::2], results[1::2], strict=True):
        answers = dict.fromkeys((exact.answer, anchored.answer))
        table.add_row(
            escape(exact.question),
            "\n".join(map(escape, answers))
            if exact.ok
            else f"{escape(' / '.join(answers))}\n(expected {exact.expected})",
            f"{exact.cached_tokens} + {exact.computed_tokens}",
            *(
                f"[{'green' if r.ok else 'red'}]{'right' if r.ok else 'wrong'}[/] {r.ttft_ms:.0f}"
                for r in (exact, anchored)
            ),
            f"{exact.full_prefill_ms:.0f}",
        )
    return table


def _summary(results: list[Result], *, reloaded: bool) -> str:
    right = sum(result.ok for result in results)
    ratios = sorted(result.full_prefill_ms / result.ttft_ms for result in results)
    source = "every context token came from the store" if reloaded else "some context tokens were computed again"
    return (
        f"{right} of {len(results)} right; {source}. Times are TTFT, time to the first token: "
        f"{ratios[len(ratios) // 2]:.1f} times faster in the median than a full prefill of the same ids by "
        f"transformers, {ratios[0]:.1f} times in the worst case."
    )


def _child() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--store", "--device", "--model"):
        parser.add_argument(option, required=True)
    options = parser.parse_args()
    sys.stdout.write(json.dumps(_answer_all(Path(options.store), options.device, options.model)))


if __name__ == "__main__":
    _child()
