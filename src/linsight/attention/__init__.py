"""Floor 2: the mechanisms. One module, one mechanism; every module without an underscore is imported."""

import importlib
import pkgutil

from ._block import Block, create_block, is_block
from ._core import Capabilities, Core, Rename, Tokens, merge_heads, run_rounds, split_heads
from ._layer import PROJECTIONS, Attention, Layer, Projection, check_asked, create_attention, create_core
from ._packed import each_image
from ._registry import Mechanism, Option, Paper, list_attentions, mechanism, register, require, unregister

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "PROJECTIONS",
    "Attention",
    "Block",
    "Capabilities",
    "Core",
    "Layer",
    "Mechanism",
    "Option",
    "Paper",
    "Projection",
    "Rename",
    "Tokens",
    "check_asked",
    "create_attention",
    "create_block",
    "create_core",
    "each_image",
    "is_block",
    "list_attentions",
    "mechanism",
    "merge_heads",
    "register",
    "require",
    "run_rounds",
    "split_heads",
    "unregister",
]
