"""The attention of other libraries, each by its `Seam`."""

from .diffusers_models import Diffusers
from .huggingface import Transformers
from .ours import Ours
from .seam import Heads, Images, Part, Seam, check_causal, keys_and_pairs, locate_images
from .timm_pyramids import PVTv2, Swin
from .timm_vits import TimmViT

SEAMS: tuple[Seam, ...] = (Ours(), TimmViT(), Swin(), PVTv2(), Transformers(), Diffusers())

__all__ = ["SEAMS", "Heads", "Images", "Part", "Seam", "check_causal", "keys_and_pairs", "locate_images"]
