"""Make the tables of the README from the results in `benchmarks/results/`.

python benchmarks/tables.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def ttft_table(report: dict[str, Any]) -> str:
    """First tokens by context length, as Markdown."""
    head = (
        f"{report['model']}, on {report['cores']} cores ({report['cpu']}), {report['threads']} threads, torch "
        f"{report['versions']['torch']}, transformers {report['versions']['transformers']}. First token of a "
        f"{report['question_tokens']}-token question over chunks of {report['chunk_tokens']} tokens, medians:"
    )
    lines = [
        head,
        "",
        "| prompt tokens | full prefill, transformers | from disk, fresh process | resident | registering | decode |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        ratios = row["ratios"]
        lines.append(
            f"| {row['prompt_tokens']:,} | {row['full_prefill_ms']['median']:,.0f} ms "
            f"| {row['from_disk_ms']['median']:,.0f} ms ({ratios['from_disk']:.1f} x) "
            f"| {row['resident_ms']['median']:,.0f} ms ({ratios['resident']:.1f} x) "
            f"| {ratios['register_over_prefill']:.2f} x the time of a prefill "
            f"| {ratios['decode']:.2f} x transformers |"
        )
    return "\n".join(lines)


def fill(text: str, name: str, table: str) -> str:
    """Put a table between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of marks {name!r}, found {count}")
    return filled


def main() -> None:
    readme = ROOT / "README.md"
    report = json.loads((RESULTS / "ttft.json").read_text(encoding="utf-8"))
    readme.write_text(fill(readme.read_text(encoding="utf-8"), "ttft", ttft_table(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
