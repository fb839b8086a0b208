"""Mask files that ship with dispc."""
