"""Models of dense tasks: backbones that give maps of images of any size, segmenters and detectors on them."""

from .backbone import Backbone, SimplePyramid, pyramid
from .decoders import DECODERS, Auxiliary, Decoder, DecoderRow, add_decoders, create_decoder
from .detector import METHODS, Detector, create_detector
from .graph import ObjectGraph
from .segmenter import Segmented, Segmenter, create_segmenter

__all__ = [
    "DECODERS",
    "METHODS",
    "Auxiliary",
    "Backbone",
    "Decoder",
    "DecoderRow",
    "Detector",
    "ObjectGraph",
    "Segmented",
    "Segmenter",
    "SimplePyramid",
    "add_decoders",
    "create_decoder",
    "create_detector",
    "create_segmenter",
    "pyramid",
]
