"""The version of dispc."""

__version__ = "0.1.0"
