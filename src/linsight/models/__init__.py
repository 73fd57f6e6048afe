"""Floor 3: hosts that take any mechanism, and their variants as tables, registered in timm."""

from . import hosts as hosts
from . import papers as papers
from .dense import create_detector, create_segmenter
from .parts.windows import fit_bias_table
from .plan import Choice, plan
from .registry import (
    ARCHITECTURES,
    HOSTS,
    VARIANTS,
    add_architectures,
    add_hosts,
    add_variants,
    create_model,
    default_attention,
    default_config,
)
from .rows import Architecture, Host, Training, Variant
from .steps import Decode, MapEnd, Mix, Sample, StreamPlan, Streams, sampled
from .timm import takeover as takeover
from .timm.keys import published_keys
from .video import VIDEO_MODELS, create_video_model
from .weights import load_pretrained_with

__all__ = [
    "ARCHITECTURES",
    "HOSTS",
    "VARIANTS",
    "VIDEO_MODELS",
    "Architecture",
    "Choice",
    "Decode",
    "Host",
    "MapEnd",
    "Mix",
    "Sample",
    "StreamPlan",
    "Streams",
    "Training",
    "Variant",
    "add_architectures",
    "add_hosts",
    "add_variants",
    "create_detector",
    "create_model",
    "create_segmenter",
    "create_video_model",
    "default_attention",
    "default_config",
    "fit_bias_table",
    "load_pretrained_with",
    "plan",
    "published_keys",
    "sampled",
]
