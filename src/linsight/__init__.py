"""linsight: linear-time attention for vision, every mechanism under one contract."""

from .attention import create_attention, list_attentions
from .ops import Grid, Layout

__version__ = "0.1.0"
