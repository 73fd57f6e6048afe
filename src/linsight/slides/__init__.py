"""Whole slides: a slide becomes a bag of features of its tiles, and a bag an answer and a picture of what it is of."""

from .bag import Bag, embed_slide, load_bag
from .model import Seen, load_bag_model, see_slide
from .picture import attention_map, attention_picture

__all__ = [
    "Bag",
    "Seen",
    "attention_map",
    "attention_picture",
    "embed_slide",
    "load_bag",
    "load_bag_model",
    "see_slide",
]
