"""Decoders of segmentation, by name: the maps of any backbone to logits at the size of its finest map."""

from .base import Auxiliary, Decoder
from .mlp import MlpDecoder
from .table import DECODERS, DecoderRow, add_decoders, create_decoder

__all__ = [
    "DECODERS",
    "Auxiliary",
    "Decoder",
    "DecoderRow",
    "MlpDecoder",
    "add_decoders",
    "create_decoder",
]
