"""Models of dense tasks: backbones that give maps of images of any size, decoders, and segmenters of the two."""

from .backbone import Backbone, SimplePyramid, pyramid
from .decoders import DECODERS, Auxiliary, Decoder, DecoderRow, add_decoders, create_decoder
from .segmenter import Segmented, Segmenter, create_segmenter

__all__ = [
    "DECODERS",
    "Auxiliary",
    "Backbone",
    "Decoder",
    "DecoderRow",
    "Segmented",
    "Segmenter",
    "SimplePyramid",
    "add_decoders",
    "create_decoder",
    "create_segmenter",
    "pyramid",
]
