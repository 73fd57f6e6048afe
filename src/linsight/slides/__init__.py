"""Whole slides: a slide becomes a bag of features of its tiles, and a bag an answer and a picture of what it is of."""

from .bag import Bag, embed_slide, load_bag
from .labelled import LabelledBags, open_bags
from .learn import Learned, judge_bags, train_bags
from .model import Seen, load_bag_model, see_slide
from .picture import attention_map, attention_picture

__all__ = [
    "Bag",
    "LabelledBags",
    "Learned",
    "Seen",
    "attention_map",
    "attention_picture",
    "embed_slide",
    "judge_bags",
    "load_bag",
    "load_bag_model",
    "open_bags",
    "see_slide",
    "train_bags",
]
