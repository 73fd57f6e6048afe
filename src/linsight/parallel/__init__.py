"""One image over many devices, each of which holds a band of its rows."""

from ._split import gather, shard_image, split

__all__ = ["gather", "shard_image", "split"]
