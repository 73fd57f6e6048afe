"""Pictures: one reader for training, evaluation, prediction and streams."""

from .kinds import extensions, left_out

__all__ = ["extensions", "left_out"]
