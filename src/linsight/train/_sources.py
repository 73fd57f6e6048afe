"""The former name of `linsight.data.sources`, for scripts that import from there."""

from linsight.data.sources import images_under

__all__ = ["images_under"]
