"""Passes that give each block its own widths."""
