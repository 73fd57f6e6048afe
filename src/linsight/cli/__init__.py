"""The command line; `main` is the entry point of `linsight`."""

from .app import main

__all__ = ["main"]
