"""Torch to IR, and IR to files."""
