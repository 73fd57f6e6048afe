"""The mechanisms, the contract that they meet, and the layers around them."""

import importlib
import pkgutil

from . import mechanisms
from .block import Block, create_block, is_block
from .core import Capabilities, Core, Rename, Tokens, merge_heads, run_rounds, split_heads
from .layer import PROJECTIONS, Attention, Layer, Projection, check_asked, create_attention, create_core
from .packed import each_image
from .registry import Mechanism, Option, Paper, list_attentions, mechanism, register, require, unregister

for _module in pkgutil.iter_modules(mechanisms.__path__):
    importlib.import_module(f"{mechanisms.__name__}.{_module.name}")

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
