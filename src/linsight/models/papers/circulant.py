"""Circulant attention (arXiv 2512.21542) in DeiT.

No class token and no position table, a convolution in front of each block in their place, the mean of the normed
tokens.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False, "pos_embed": "none", "cpe": True}


def _deit(size: str, known: dict[str, Any], drop_path: float) -> Variant:
    return Variant(
        f"ca_deit_{size}",
        f"vit_{size}",
        "circulant",
        _MEAN,
        cfg={"crop_mode": "center"},  # of an image whose aspect ratio is kept
        published=known,
        training=(trained("imagenet", 128, drop_path),),
    )


# The published code counts 1.197, 4.724 and 18.762 GMACs: it projects the 2*14*8 numbers of half a spectrum in place of
# the 14*14 tokens.
add_variants(
    _deit("tiny", figures(75.0, 6.140, 1.160), 0.0),
    _deit("small", figures(81.0, 23.781, 4.575), 0.1),
    _deit("base", figures(82.3, 93.567, 18.167), 0.4),
    code="LeapLabTHU/Circulant-Attention",
)
