"""ViT^3 (arXiv 2512.01643), test-time training in a plain and in a hierarchical ViT, as data.

No class token: the head takes the mean of the normed tokens. The plain ones know positions by a convolution in front
of each block.
"""

from collections.abc import Mapping
from typing import Any

from ..registry import Variant, add_variants, figures

_MEAN: Mapping[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_VIT3: Mapping[str, Any] = {**_MEAN, "pos_embed": "none", "cpe": True}
_CENTRE = {"crop_mode": "center"}  # of an image whose aspect ratio is kept

add_variants(
    Variant(
        "vittt_tiny", "vit_tiny", "ttt", {**_VIT3, "num_heads": 6}, cfg=_CENTRE, published=figures(76.5, 6.15, 1.22)
    ),
    Variant("vittt_small", "vit_small", "ttt", _VIT3, cfg=_CENTRE, published=figures(81.6, 23.80, 4.81)),
    Variant("vittt_base", "vit_base", "ttt", _VIT3, cfg=_CENTRE, published=figures(82.6, 90.06, 17.94)),
)


def _h_vit(size: str, top1: float, params: float, gmacs: float) -> tuple[Variant, Variant]:
    """The best published top-1, those of training with MESA."""
    host, own = f"h_vit_{size}", {"rotary": True}
    return (
        Variant(f"h_vittt_{size}", host, "ttt", options=own, published=figures(top1, params, gmacs)),
        Variant(f"h_vittt_{size}_dense", host, "ttt", options=own, dense="normed"),
    )


add_variants(
    *_h_vit("tiny", 84.0, 28.70, 4.90),
    *_h_vit("small", 84.9, 54.36, 8.73),
    *_h_vit("base", 85.5, 94.37, 16.68),
)
