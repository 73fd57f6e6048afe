"""Our mechanisms in other people's models: torch's and torchvision's, timm's, transformers' and diffusers'.

`linearize` makes a trained softmax model a linear one, what follows it brings its quality back; `merge_tokens` makes
a diffusion network cheaper without training.

>>> import torchvision
>>> from linsight.convert import replace_attention
>>> vit = torchvision.models.vit_b_16()
>>> names = replace_attention(vit, "inline", grid=(14, 14), prefix=1)
"""

from linsight.models.arguments import add_argument

from ._attention import replace_attention
from ._image import Attention2d
from ._multihead import MultiheadAttention
from ._timm import attention_class
from .conversion import ConvertedLayer, converted_layers, linearize, new_parameters
from .hybrid import Hybrid, annealed, round_selection, selection_loss, without
from .mixing import Mixing
from .profiles import LayerProfile, profile
from .published import load_converted
from .recovery import Recovery, distil
from .saved import convert_again, load_linearized, save_linearized
from .terms import terms_alone
from .training_free import TokenMerging, agent_sd, merge_tokens, remove_merging
from .transfer import distil_layers, layer_errors

add_argument("linearized", convert_again)  # of a saved model

__all__ = [
    "Attention2d",
    "ConvertedLayer",
    "Hybrid",
    "LayerProfile",
    "Mixing",
    "MultiheadAttention",
    "Recovery",
    "TokenMerging",
    "agent_sd",
    "annealed",
    "attention_class",
    "converted_layers",
    "distil",
    "distil_layers",
    "layer_errors",
    "linearize",
    "load_converted",
    "load_linearized",
    "merge_tokens",
    "new_parameters",
    "profile",
    "remove_merging",
    "replace_attention",
    "round_selection",
    "save_linearized",
    "selection_loss",
    "terms_alone",
    "without",
]
