"""Models of videos `(B, C, T, H, W)`: backbones with a published way through time, and any mechanism in space."""

from .create import VIDEO_MODELS, VideoModel, add_video_models, create_video_model
from .flax import from_flax
from .recurrent import RGLRU, TemporalBlock
from .trecvit import TRecViT
from .videomamba import VideoMamba

__all__ = [
    "RGLRU",
    "VIDEO_MODELS",
    "TRecViT",
    "TemporalBlock",
    "VideoMamba",
    "VideoModel",
    "add_video_models",
    "create_video_model",
    "from_flax",
]
