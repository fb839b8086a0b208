"""`python -m dispc` is the `dispc` command."""

from dispc.cli.app import main

main()
