"""The command line: parse, call, print."""

from dispc.cli.app import main

__all__ = ["main"]
