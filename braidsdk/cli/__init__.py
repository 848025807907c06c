"""The `braid` command."""

from braidsdk.cli.app import main

__all__ = ["main"]
