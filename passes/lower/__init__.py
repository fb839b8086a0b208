"""Passes that spell canonical nodes for a target."""
