"""L2ViT (arXiv 2501.16182): softmax in windows and linear attention in turn.

Of the training the defaults of its script are known. The weights at 384 pixels are fine-tuned from ImageNet-22K; their
GMACs are counted here, the paper has 47.5.
"""

from functools import partial
from typing import Any

from linsight.attention import mechanism

from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

_CODE = "ChuanyangZheng/L2ViT"


# The defaults of the script, whose rate is that of ConvNeXt.
_TRAINING = partial(
    trained,
    "imagenet",
    512,
    note="batch and stochastic depth not published, so those of ConvNeXt, unverified",
    lr=4e-3,
    lr_base_batch=0,
    warmup_lr=0.0,
    min_lr=1e-6,
    clip_grad=0.0,
    ema=0.9999,
)


def _l2vit(size: str, known: dict[str, Any], training: Training) -> Variant:
    return Variant(
        f"l2vit_{size}",
        f"l2vit_pyramid_{size}",
        "softmax~l2vit_block",
        published={**known, "ema": True},
        training=(training,),
        weights=f"the releases of the repository {_CODE}",
    )


add_variants(
    _l2vit("tiny", figures(83.1, 28.597, 4.69), _TRAINING(drop_path=0.1)),
    _l2vit("small", figures(84.1, 50.20, 8.98), _TRAINING(drop_path=0.4)),
    _l2vit("base", figures(84.4, 88.58, 15.81), _TRAINING(drop_path=0.5)),
    _l2vit(
        "base_384",
        figures(87.0, 88.58, 47.32),
        trained(
            "swin_384",
            32,
            0.5,
            note="recipe not published, so that of Swin, unverified",
            start="weights of ImageNet-22K, at 384 pixels",
        ),
    ),
    code=_CODE,
    paper=mechanism("l2vit").paper,
)
