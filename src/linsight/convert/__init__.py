"""Our mechanisms in other people's models: torch's and torchvision's, timm's, diffusers', and convolutional networks.

>>> import torchvision
>>> from linsight.convert import replace_attention
>>> vit = torchvision.models.vit_b_16()
>>> names = replace_attention(vit, "inline", grid=(14, 14), prefix=1)
"""

from ._attention import replace_attention
from ._image import Attention2d
from ._multihead import MultiheadAttention
from ._timm import attention_class
from .flux import FluxProcessor

__all__ = ["Attention2d", "FluxProcessor", "MultiheadAttention", "attention_class", "replace_attention"]
