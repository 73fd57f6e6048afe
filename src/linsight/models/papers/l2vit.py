"""L2ViT (arXiv 2501.16182): softmax in windows and linear attention in turn.

Of the training the defaults of its script are known. The weights at 384 pixels are fine-tuned from ImageNet-22K, by a
recipe that is not published.
"""

from typing import Any

from linsight.attention import mechanism

from ..registry import add_variants
from ..rows import Variant, figures, trained

_CODE = "ChuanyangZheng/L2ViT"


def _l2vit(size: str, known: dict[str, Any], drop_path: float | None) -> Variant:
    training = ()
    if drop_path is not None:
        training = (
            trained(
                "imagenet",
                512,
                drop_path,
                note="batch and stochastic depth not published, so those of ConvNeXt, unverified",
                lr=4e-3,
                lr_base_batch=0,
                warmup_lr=0.0,
                min_lr=1e-6,
                clip_grad=0.0,
                ema=0.9999,
            ),
        )
    return Variant(
        f"l2vit_{size}",
        f"l2vit_pyramid_{size}",
        "softmax+l2vit_block",
        published={**known, "ema": True},
        training=training,
        weights=f"the releases of the repository {_CODE}",
    )


add_variants(
    _l2vit("tiny", figures(83.1, 28.597, 4.69), 0.1),
    _l2vit("small", figures(84.1, 50.20, 8.98), 0.4),
    _l2vit("base", figures(84.4, 88.58, 15.81), 0.5),
    _l2vit("base_384", figures(87.0, 88.58, 47.32), None),
    code=_CODE,
    paper=mechanism("l2vit").paper,
)
