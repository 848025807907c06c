"""Logs through `logging`, with the logger "braidsdk". It is silent until a handler is added.

`BRAID_LOG=info` (or debug, warning, error) sends the logs to stderr. Lines count tokens, bytes and milliseconds. No
line holds a user's text or names.
"""

import logging
import os
import warnings

from braidsdk.errors import did_you_mean, shown

LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("braidsdk")


def configure() -> None:
    """Keep the logger silent, or send its logs to stderr as `BRAID_LOG` says. Called when the package is imported. Safe
    to call twice."""
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    wanted = os.environ.get("BRAID_LOG", "").strip().lower()
    if not wanted:
        return
    if wanted not in LEVELS:
        warnings.warn(
            f"BRAID_LOG must be one of {', '.join(LEVELS)}; got {shown(wanted)}, so nothing is logged."
            f"{did_you_mean(wanted, LEVELS)}",
            stacklevel=3,
        )
        return
    if not any(handler.get_name() == _NAME for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.set_name(_NAME)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(wanted.upper())


_NAME = "BRAID_LOG"
