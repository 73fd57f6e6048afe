"""Decoders of segmentation, by name: the maps of any backbone to logits at the size of its finest map."""

from .base import Auxiliary, Decoder
from .mlp import MlpDecoder
from .semantic_fpn import SemanticFpn
from .table import DECODERS, DecoderRow, add_decoders, create_decoder
from .upernet import UPerNet
from .vwformer import VWFormer

__all__ = [
    "DECODERS",
    "Auxiliary",
    "Decoder",
    "DecoderRow",
    "MlpDecoder",
    "SemanticFpn",
    "UPerNet",
    "VWFormer",
    "add_decoders",
    "create_decoder",
]
