"""The mechanisms, the contract that they meet, and the layers around them."""

import importlib
import pkgutil

from . import mechanisms
from .block import Block
from .capabilities import FLAGS, Capabilities, Cost, Structure
from .checks import check_asked, check_beside, check_kind, entered, held
from .core import Additive, Core, Rename, Renews
from .create import create_attention, create_block, create_core, is_block
from .fusing import INFERENCE_FORMS, Fusable, recast
from .layer import Attention, Layer
from .losses import LayerLosses, add_loss, collect_losses
from .nodes import Node, one_node
from .on_grid import OnGrid
from .packed import each_image
from .parts.token_conv import TokenConv
from .projections import PROJECTIONS, PUBLISHED_PROJECTIONS, Projection
from .registry import Mechanism, Option, Paper, list_attentions, mechanism, register, require, unregister
from .rounds import Progress, Round, drive, scan
from .tiled import run_rounds
from .tokens import Tokens, merge_heads, split_heads
from .ways import WAYS, check_way, why_not

for _module in pkgutil.iter_modules(mechanisms.__path__):
    importlib.import_module(f"{mechanisms.__name__}.{_module.name}")

__all__ = [
    "FLAGS",
    "INFERENCE_FORMS",
    "PROJECTIONS",
    "PUBLISHED_PROJECTIONS",
    "WAYS",
    "Additive",
    "Attention",
    "Block",
    "Capabilities",
    "Core",
    "Cost",
    "Fusable",
    "Layer",
    "LayerLosses",
    "Mechanism",
    "Node",
    "OnGrid",
    "Option",
    "Paper",
    "Progress",
    "Projection",
    "Rename",
    "Renews",
    "Round",
    "Structure",
    "TokenConv",
    "Tokens",
    "add_loss",
    "check_asked",
    "check_beside",
    "check_kind",
    "check_way",
    "collect_losses",
    "create_attention",
    "create_block",
    "create_core",
    "drive",
    "each_image",
    "entered",
    "held",
    "is_block",
    "list_attentions",
    "mechanism",
    "merge_heads",
    "one_node",
    "recast",
    "register",
    "require",
    "run_rounds",
    "scan",
    "split_heads",
    "unregister",
    "why_not",
]
