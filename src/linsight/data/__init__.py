"""Pictures: one reader for training, evaluation, prediction and streams."""

from ._layout import role
from .kinds import extensions, is_picture, left_out
from .pictures import Decoded, Picture, decode, opened

__all__ = ["Decoded", "Picture", "decode", "extensions", "is_picture", "left_out", "opened", "role"]
