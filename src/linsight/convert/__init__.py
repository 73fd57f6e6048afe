"""Our mechanisms in other people's models: torch's and torchvision's, timm's, diffusers', and convolutional networks.

`linearize` makes a trained softmax model a linear one, and what follows it brings its quality back.

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
from .linearize import ConvertedLayer, converted_layers, linearize, new_parameters
from .mixing import Mixing
from .recovery import Recovery, distil
from .saved import load_linearized, save_linearized
from .transfer import distil_layers, layer_errors

__all__ = [
    "Attention2d",
    "ConvertedLayer",
    "FluxProcessor",
    "Mixing",
    "MultiheadAttention",
    "Recovery",
    "attention_class",
    "converted_layers",
    "distil",
    "distil_layers",
    "layer_errors",
    "linearize",
    "load_linearized",
    "new_parameters",
    "replace_attention",
    "save_linearized",
]
