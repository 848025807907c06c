"""`braid doctor` looks for problems, and suggests what to do about them."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from braidsdk.cli.exits import FAILED
from braidsdk.cli.options import TINY, DeviceOption, DtypeOption, ModelOption, StoreOption, WeightsOption
from braidsdk.cli.output import Output, counted
from braidsdk.settings import store_folder

if TYPE_CHECKING:
    from braidsdk.cli.checks import Finding


def doctor(
    out: Output,
    model: ModelOption = TINY,
    store: StoreOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="MODEL", help="Compare each layer of this model with transformers' instead."),
    ] = None,
) -> None:
    """Check this machine, the store and the model, and suggest a fix for each problem.

    Checks versions, device, dtype, disk, store, prompts against the chat template, logits against transformers, and on
    CUDA the kernels. The exit code is 1 if a check fails.

    With --layers it prints a row for each layer instead: the largest magnitude among its K-norm weights; then, over the
    tokens of documents, of a question and of an answer, our error and its ratio to transformers' error in the same
    dtype. Errors are measured from transformers' layer in float64, relative to what the layer adds to its input. All
    get the input that transformers computed. The exit code is 1 if a ratio is too large. A last line says how far the
    next-token distributions are from transformers': with --weights int8, what that costs.
    """
    if layers is not None:
        _compare_layers(out, layers, device, dtype, weights)
        return
    findings = []
    for name, finding in _findings(out, model, store_folder(store), device, dtype, weights):
        findings.append((name, finding))
        if not out.json:
            out.text(f"{finding.status:<4}  {name}: {finding.detail}")
            if finding.remedy:
                out.text(f"      -> {finding.remedy}")
    failed = sum(finding.status == "fail" for _, finding in findings)
    if out.json:
        checks = [{"check": name, **asdict(finding)} for name, finding in findings]
        out.document({"ok": not failed, "checks": checks})
    else:
        warned = sum(finding.status == "warn" for _, finding in findings)
        out.note(f"{len(findings)} checks, {counted(warned, 'warning')}, {failed} failed.")
    if failed:
        raise typer.Exit(FAILED)


def _findings(
    out: Output, model: str, store: Path, device: str, dtype: str, weights: str
) -> Iterator[tuple[str, "Finding"]]:
    from transformers.utils import logging

    from braidsdk.cli import checks, model_checks

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory(prefix="braid-doctor-") as scratch:
        subject = checks.Subject(model, device, dtype, weights, store, Path(scratch))
        try:
            for check in (*checks.CHECKS, *model_checks.CHECKS):
                yield checks.name_of(check), checks.look(check, subject, debug=out.debug)
        finally:
            if subject.braid is not None:
                subject.braid.close()


def _compare_layers(out: Output, model: str, device: str, dtype: str, weights: str) -> None:
    from transformers.utils import logging

    from braidsdk.cli.layer_checks import check_layers

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = check_layers(model, device, dtype, weights)
    if out.json:
        out.document({"ok": not report.failed, **asdict(report)})
    else:
        kept = f", weights in {weights}" if weights != "auto" else ""
        out.note(f"{report.model} in {report.dtype}{kept} on {report.device}, kernels: {report.backends}")
        out.note("layer, largest K-norm weight; error and its ratio to transformers' over documents, question, answer:")
        names = [each.name for each in report.layers[0].passes]
        out.table(
            ["layer", "K-norm", *(heading for name in names for heading in (name, "ratio")), ""],
            [
                [
                    str(each.layer),
                    "-" if each.largest_k_norm is None else f"{each.largest_k_norm:.3g}",
                    *(cell for found in each.passes for cell in (f"{found.ours:.1e}", f"{found.ratio:.2f}")),
                    "ok" if each.ok else "FAIL",
                ]
                for each in report.layers
            ],
        )
        found = report.agreement
        out.note(
            f"Against transformers in {report.dtype} over {found.tokens} tokens: KL {found.kl:.1e}, "
            f"{found.top1:.1%} have the same likeliest token, perplexity {found.perplexity:.4g} "
            f"({found.perplexity / found.their_perplexity - 1:+.2%})."
        )
    if report.failed:
        out.error(
            f"{counted(len(report.failed), 'layer')} with more than {report.allowed}: "
            f"{', '.join(map(str, report.failed[:20]))}. BRAID_KERNELS=torch shows whether our kernels are the cause, "
            "--dtype float32 shows small faults. Please report the output."
        )
        raise typer.Exit(FAILED)
