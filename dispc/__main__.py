"""`python -m dispc` is the `dispc` command."""

from dispc.cli import main

main()
