"""linsight: linear-time attention for vision, every mechanism under one contract.

>>> import linsight, timm
>>> model = timm.create_model("inline_deit_tiny", num_classes=10)
>>> layer = linsight.create_attention("inline", dim=64, num_heads=4)
"""

import importlib
from typing import TYPE_CHECKING, Any

from .runtime.launch import is_command

if TYPE_CHECKING or not is_command():  # a command imports what it needs when it runs: its help needs none of this
    from .api import (
        Grid,
        Layout,
        LinsightError,
        create_attention,
        create_detector,
        create_model,
        create_segmenter,
        export_published,
        fuse,
        linearize,
        list_attentions,
        load_published,
        stream,
    )

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "Layout",
    "LinsightError",
    "__version__",
    "create_attention",
    "create_detector",
    "create_model",
    "create_segmenter",
    "export_published",
    "from_pretrained",
    "fuse",
    "linearize",
    "list_attentions",
    "load_published",
    "load_run",
    "stream",
]


def __getattr__(name: str) -> Any:
    """A name of `__all__` that was not imported at once: in a process of the command, and what training brings."""
    if name in ("from_pretrained", "load_run"):
        return getattr(importlib.import_module(".train", __name__), name)
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'linsight' has no attribute '{name}'")
