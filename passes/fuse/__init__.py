"""Passes that make the graph faster and change nothing else."""
