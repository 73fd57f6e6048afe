"""ViT and DeiT."""

from . import sizes as sizes
from .host import VisionTransformer as VisionTransformer
