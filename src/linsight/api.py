"""The names of `linsight` itself; once this is imported, timm knows its models and how to load their weights."""

from linsight.attention import create_attention, list_attentions
from linsight.checkpoints import export_published, load_pretrained, load_published
from linsight.convert import linearize
from linsight.errors import LinsightError
from linsight.fuse import fuse
from linsight.models import create_detector, create_model, create_segmenter, load_pretrained_with
from linsight.ops import Grid, Layout
from linsight.streaming import stream

load_pretrained_with(load_pretrained)

__all__ = [
    "Grid",
    "Layout",
    "LinsightError",
    "create_attention",
    "create_detector",
    "create_model",
    "create_segmenter",
    "export_published",
    "fuse",
    "linearize",
    "list_attentions",
    "load_published",
    "stream",
]
