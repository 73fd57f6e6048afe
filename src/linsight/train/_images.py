"""The former name of `linsight.train.images`, for scripts that import from there."""

from .images import decode

__all__ = ["decode"]
