"""Our mechanisms in other people's models: torch's and torchvision's, timm's, and convolutional networks.

>>> import torchvision
>>> from linsight.convert import replace_attention
>>> vit = torchvision.models.vit_b_16()
>>> names = replace_attention(vit, "inline", grid=(14, 14), prefix=1)
"""

from ._attention import replace_attention
from ._image import Attention2d
from ._multihead import MultiheadAttention
from ._timm import attention_class
from .training_free import TokenMerging, agent_sd, merge_tokens, remove_merging

__all__ = [
    "Attention2d",
    "MultiheadAttention",
    "TokenMerging",
    "agent_sd",
    "attention_class",
    "merge_tokens",
    "remove_merging",
    "replace_attention",
]
