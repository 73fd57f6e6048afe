"""linsight: linear-time attention for vision, every mechanism under one contract.

>>> import linsight, timm
>>> model = timm.create_model("inline_deit_tiny", num_classes=10)
>>> layer = linsight.create_attention("inline", dim=64, num_heads=4)
"""

from typing import TYPE_CHECKING, Any

from .runtime.launch import is_command

if TYPE_CHECKING or not is_command():  # a command imports what it needs when it runs: its help needs none of this
    from .api import (
        Grid,
        Layout,
        create_attention,
        create_model,
        export_published,
        fuse,
        list_attentions,
        load_published,
        stream,
    )

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "Layout",
    "__version__",
    "create_attention",
    "create_model",
    "export_published",
    "fuse",
    "list_attentions",
    "load_published",
    "stream",
]


def __getattr__(name: str) -> Any:
    """A name of `__all__` in a process of the command, which did not import it at once."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'linsight' has no attribute '{name}'")
