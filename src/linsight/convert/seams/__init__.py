"""The attention of other libraries, each by its `Seam`."""

from .seam import Heads, Images, Part, Seam, check_causal, keys_and_pairs, locate_images
from .timm_vits import TimmViT

SEAMS: tuple[Seam, ...] = (TimmViT(),)

__all__ = ["SEAMS", "Heads", "Images", "Part", "Seam", "check_causal", "keys_and_pairs", "locate_images"]
