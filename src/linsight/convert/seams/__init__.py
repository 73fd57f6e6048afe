"""The attention of other libraries, each by its `Seam`."""

from .diffusers_models import Diffusers
from .seam import Heads, Images, Part, Seam, check_causal, keys_and_pairs, locate_images
from .timm_pyramids import PVTv2, Swin
from .timm_vits import TimmViT

SEAMS: tuple[Seam, ...] = (TimmViT(), Swin(), PVTv2(), Diffusers())

__all__ = ["SEAMS", "Heads", "Images", "Part", "Seam", "check_causal", "keys_and_pairs", "locate_images"]
