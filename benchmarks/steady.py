"""Whether an open Braid stays as fast as it was: many questions over changing subsets of the same chunks.

    python benchmarks/steady.py                     # 1,000 questions over 200 chunks of braid-tiny, a CPU; minutes

Each question is asked over 6 chunks in an order of its own. Memory holds a third of all chunks, so entries are evicted
and loaded again throughout. Of each fifth of the questions: the share of entries that were in memory or in the store,
the time to the first token, the decode rate, and the anonymous memory of the process. Questions before them fill the
memory; they do not count.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from ttft import cpu_name

from braidsdk import Answer, Braid
from braidsdk.models.tiny.evaluate import held_out_sample

CHUNKS, TAKEN, PARTS, NEW_TOKENS = 200, 6, 5, 8

FILLING = 30
"""Questions until memory is full."""


def part(answers: list[Answer], hits: int, misses: int) -> dict[str, float]:
    """The figures of some answers, whose entries were found and not found so often."""
    return {
        "hit_rate": hits / (hits + misses),
        "load_ms": statistics.median(answer.timings.load_ms for answer in answers),
        "first_token_ms": statistics.median(answer.timings.first_token_ms for answer in answers),
        "decode_tokens_per_s": statistics.median(answer.timings.decode_tokens_per_s for answer in answers),
        "anonymous_mib": resident_mib(),
    }


def resident_mib() -> float:
    """Anonymous memory of this process, as Linux counts it."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--modes", nargs="+", default=["anchored", "guided(0.15)+shift"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "steady.json")
    options = parser.parse_args()
    samples = [held_out_sample(2, "direct", number) for number in range(CHUNKS // 2)]
    texts = [text for sample in samples for text in sample.documents]
    report: dict[str, object] = {
        "benchmark": "steady",
        "command": " ".join(["python benchmarks/steady.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "questions": options.questions,
        "chunks": CHUNKS,
        "modes": {},
    }
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as store:
            with Braid("braid-tiny", store=store, device="cpu") as braid:
                rules = braid.register_system(samples[0].system or "")
                chunks = braid.register_many(texts, anchor=rules, progress=False)
                held = braid.stats().pool_used_bytes
            with Braid("braid-tiny", store=store, device="cpu", pool_bytes=held // 3) as braid:
                rng, parts = random.Random(0), []
                for count in (FILLING, *[options.questions // PARTS] * PARTS):
                    before, answers = braid.stats(), []
                    for _ in range(count):
                        question = samples[rng.randrange(len(samples))].questions[0].text
                        context = braid.compose([rules, *rng.sample(list(chunks), TAKEN)], mode=mode)
                        answers.append(context.ask(question, max_new_tokens=NEW_TOKENS))
                    after = braid.stats()
                    parts.append(part(answers, after.hits - before.hits, after.misses - before.misses))
                report["modes"][mode] = parts[1:]
        sys.stderr.write(f"{mode}: {json.dumps(report['modes'][mode])}\n")
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
