"""The published variants of circulant attention, as data.

CA-DeiT (arXiv 2512.21542): no class token and no position table, a convolution in front of each block in their
place, the mean of the normed tokens.
"""

from collections.abc import Mapping
from typing import Any

from ..registry import Variant, add_variants, figures

_MEAN: Mapping[str, Any] = {
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "pos_embed": "none",
    "cpe": True,
}
_CENTRE = {"crop_mode": "center"}  # of an image whose aspect ratio is kept

# The published code counts 1.197, 4.724 and 18.762 GMACs: it projects the 2*14*8 numbers of half a spectrum in place of
# the 14*14 tokens.
add_variants(
    Variant("ca_deit_tiny", "vit_tiny", "circulant", _MEAN, cfg=_CENTRE, published=figures(75.0, 6.140, 1.160)),
    Variant("ca_deit_small", "vit_small", "circulant", _MEAN, cfg=_CENTRE, published=figures(81.0, 23.781, 4.575)),
    Variant("ca_deit_base", "vit_base", "circulant", _MEAN, cfg=_CENTRE, published=figures(82.3, 93.567, 18.167)),
)
