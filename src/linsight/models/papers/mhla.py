"""MHLA (arXiv 2601.07832) in DeiT.

No class token; the head takes the normed mean of the tokens. An image of 224 pixels has a patch of zeros more on each
side, 16 x 16 in all, which 16 blocks divide. The weights of image classifiers are not released. MHLA in a pyramid (VLT:
82.6 % and 84.6 % top-1 with 16 and 27 million parameters) is not in the published code, which alone would tell its
stages, and so is not here.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_MEAN = {"class_token": False, "global_pool": "avg", "qkv_bias": False, "border": 1}

# By the repository, which trains for 200 epochs, the paper for 300.
_TRAINING = trained(
    "imagenet",
    128,
    0.1,
    note="the last rate not published",
    lr=1e-3,
    lr_base_batch=0,
    warmup_lr=1e-6,
    min_lr=0.0,
    warmup_epochs=10,
    epochs=200,
    clip_grad=0.0,
    mixup=0.2,
    ema=0.9996,
)


def _deit(size: str, known: dict[str, Any]) -> Variant:
    return Variant(
        f"mhla_deit_{size}",
        f"vit_{size}",
        "mhla",
        _MEAN,
        {"denominator": "published"},
        cfg={"crop_mode": "center"},  # of an image whose aspect ratio is kept
        published=known,
        training=(_TRAINING,),
    )


add_variants(
    _deit("tiny", figures(75.8, 5.79, 1.53)),
    _deit("small", figures(81.0, 22.20, 5.77)),
    _deit("base", figures(None, 86.86, 22.41)),
    code="DAGroup-PKU/MHLA",
)
