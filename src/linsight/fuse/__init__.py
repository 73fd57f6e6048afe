"""Inference forms, on request: modules replaced by others that fold linear maps, write in place, and keep tables.

The plain modules stay what the formulas say; what is quicker only where nothing is recorded and nobody looks is here.
"""

from . import retired as retired
from .model import fuse, fused, is_fused

__all__ = ["fuse", "fused", "is_fused"]
