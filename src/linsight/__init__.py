"""linsight: linear-time attention for vision, every mechanism under one contract.

>>> import linsight, timm
>>> model = timm.create_model("inline_deit_tiny", num_classes=10)
>>> layer = linsight.create_attention("inline", dim=64, num_heads=4)
"""

import importlib
from typing import Any

from .attention import create_attention, list_attentions
from .checkpoints import export_published, load_pretrained, load_published
from .errors import LinsightError
from .fuse import fuse
from .models import create_model, load_pretrained_with
from .ops import Grid, Layout
from .streaming import stream

load_pretrained_with(load_pretrained)

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "Layout",
    "LinsightError",
    "__version__",
    "create_attention",
    "create_model",
    "export_published",
    "fuse",
    "list_attentions",
    "load_published",
    "load_run",
    "stream",
]


def __getattr__(name: str) -> Any:
    """`load_run`, imported when it is asked for: all that training needs comes with it."""
    if name == "load_run":
        return importlib.import_module(".train", __name__).load_run
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
