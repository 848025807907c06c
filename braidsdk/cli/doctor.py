"""`braid doctor`: looks for what may be wrong, and says what to do about it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from braidsdk.cli.exits import FAILED
from braidsdk.cli.options import TINY, DeviceOption, DtypeOption, ModelOption, StoreOption
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
) -> None:
    """Check this machine, the store and the model, and say what to do about each trouble.

    Versions, device, dtype, disk, store, the prompt's seams against the chat template, and logits against transformers.
    Ends with 1 if a check fails.
    """
    findings = []
    for name, finding in _findings(out, model, store_folder(store), device, dtype):
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


def _findings(out: Output, model: str, store: Path, device: str, dtype: str) -> Iterator[tuple[str, "Finding"]]:
    from transformers.utils import logging

    from braidsdk.cli import checks, model_checks

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory(prefix="braid-doctor-") as scratch:
        subject = checks.Subject(model, device, dtype, store, Path(scratch))
        try:
            for check in (*checks.CHECKS, *model_checks.CHECKS):
                yield checks.name_of(check), checks.look(check, subject, debug=out.debug)
        finally:
            if subject.braid is not None:
                subject.braid.close()
