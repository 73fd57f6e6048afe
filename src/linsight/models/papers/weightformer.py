"""The published variants of WeightFormer, as data.

arXiv 2605.01711: no class token and no position table, a norm of the embedded patches, the mean of the normed
tokens. The base model is the small one at 448. Images are normalised as the training code does it, by the mean and
deviation of ImageNet; the published weights' page says 0.5 for both.
"""

from collections.abc import Mapping
from typing import Any

from ..registry import Variant, add_variants, figures

_MEAN: Mapping[str, Any] = {
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "pos_embed": "none",
    "embed_norm_layer": "layernorm",
    "depth": 17,
}
_CENTRE = {"crop_mode": "center"}  # of an image whose aspect ratio is kept

add_variants(
    Variant(
        "wfm_tiny", "vit_tiny", "weightformer", _MEAN, cfg=_CENTRE, published=figures(76.3, 7.07, 1.12, plotted=True)
    ),
    Variant(
        "wfm_small", "vit_small", "weightformer", _MEAN, cfg=_CENTRE, published=figures(81.3, 27.49, 4.43, plotted=True)
    ),
    Variant(
        "wfm_base",
        "vit_small",
        "weightformer",
        _MEAN,
        cfg={**_CENTRE, "input_size": (3, 448, 448)},
        published=figures(83.4, 27.49, 17.66, plotted=True),
    ),
)
