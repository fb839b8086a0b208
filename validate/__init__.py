"""Run an artifact and judge it."""
