"""How hosts cut a grid into rectangles, which is an operation: see `linsight.ops.Partition`."""

from linsight.ops import Partition, half_shift, to_multiple, within

__all__ = ["Partition", "half_shift", "to_multiple", "within"]
