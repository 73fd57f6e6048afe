"""The former name of `linsight.data.images`, for scripts that import from there."""

from linsight.data.images import decode

__all__ = ["decode"]
