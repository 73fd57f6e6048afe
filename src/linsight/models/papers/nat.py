"""NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001): neighbourhoods in their own pyramid, in Swin and in ViT.

Dilations take turns with 1 inside a stage and are those for images of 224 or 384 pixels; on smaller ones they shrink to
what fits. `dinat_s_*` are Swin with neighbourhoods in the place of its windows, isotropic models a ViT without class
token and position table, whose published keys are not known here. GMACs are counted here: the papers round them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from linsight.attention import Paper

from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

_CODE = "SHI-Labs/Neighborhood-Attention-Transformer"
_DILATED = Paper("Dilated Neighborhood Attention Transformer", "2209.15001")
_224 = {"dilation": ["1~8", "1~4", "1~2", 1]}
_384 = {"dilation": ["1~13", "1~6", "1~3", 1]}
_AT_384 = {"input_size": (3, 384, 384), "crop_pct": 1.0}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_ISOTROPIC = {
    "class_token": False,
    "global_pool": "avg",
    "pos_embed": "none",
    "fc_norm": False,
    "embed_norm_layer": "layernorm",
    "norm_layer": "layernorm",
}

_TRAINING = partial(
    trained,
    "imagenet",
    128,
    lr=1e-3,
    lr_base_batch=0,
    warmup_lr=1e-6,
    cooldown_epochs=10,
)
_TUNING = partial(
    trained,
    "imagenet",
    64,
    start="weights of ImageNet-22K",
    note="warm-up not published, so that of Swin",
    lr=5e-5,
    lr_base_batch=0,
    epochs=30,
    warmup_epochs=5,
    weight_decay=1e-10,
    mixup=0.0,
    cutmix=0.0,
    sched="poly",
    sched_args={"decay_rate": 1.0},
    amp="off",
)
_FROM_22K = partial(
    _TRAINING, note="recipe of the fine-tuning not published, so that of training", start="weights of ImageNet-22K"
)
_WEIGHTS = "shi-labs.com/projects/{}/checkpoints"


def _nat(size: str, known: Mapping[str, Any], drop_path: float) -> Variant:
    training = (_TRAINING(drop_path),)
    return Variant(
        f"nat_{size}",
        f"nat_pyramid_{size}",
        "nat",
        published=known,
        training=training,
        weights=_WEIGHTS.format("nat"),
    )


def _dinat(
    name: str,
    known: Mapping[str, Any],
    training: Training,
    options: Mapping[str, Any] = _224,
    args: Mapping[str, Any] | None = None,
    **more: Any,
) -> Variant:
    host = f"nat_pyramid_{name.partition('_')[0]}"
    return Variant(
        f"dinat_{name}",
        host,
        "nat",
        args or {},
        options,
        published=known,
        training=(training,),
        weights=_WEIGHTS.format("dinat"),
        **more,
    )


def _dinat_s(
    name: str,
    host: str,
    known: Mapping[str, Any],
    training: Training,
    options: Mapping[str, Any] = _224,
    args: Mapping[str, Any] | None = None,
    **more: Any,
) -> Variant:
    return replace(_dinat(f"s_{name}", known, training, options, args, **more), host=f"swin_{host}")


def _isotropic(family: str, size: str, known: Mapping[str, Any]) -> Variant:
    options = {"dilation": "1~2"} if family == "dinat" else {}
    training = _TRAINING(
        0.1, note="" if size == "small" else "stochastic depth not published, so that of the small one"
    )
    heads = {"num_heads": 12} if size == "small" else {}
    return Variant(
        f"{family}_isotropic_{size}",
        f"vit_{size}",
        "nat",
        {**_ISOTROPIC, **heads},
        options,
        published=known,
        training=(training,),
    )


add_variants(
    _nat("mini", figures(81.8, 19.984, 2.695), 0.2),
    _nat("tiny", figures(83.2, 27.902, 4.295), 0.2),
    _nat("small", figures(83.7, 50.743, 7.772), 0.3),
    _nat("base", figures(84.3, 89.770, 13.677), 0.5),
    _isotropic("nat", "small", figures(80.0, 22.000, 4.308)),
    _isotropic("nat", "base", figures(81.6, 86.441, 16.941)),
    code=_CODE,
)
add_variants(
    _dinat("mini", figures(81.8, 19.984, 2.695), _TRAINING(0.2)),
    _dinat("tiny", figures(82.7, 27.902, 4.295), _TRAINING(0.2)),
    _dinat("small", figures(83.8, 50.720, 7.772), _TRAINING(0.3), args={"init_values": None}),
    _dinat("base", figures(84.4, 89.770, 13.677), _TRAINING(0.5)),
    _dinat("large", figures(86.6, 200.944, 30.458), _FROM_22K(0.35)),
    _dinat("large_384", figures(87.4, 200.944, 89.505), _TUNING(0.35), _384, cfg=_AT_384),
    _dinat(
        "large_384_kernel11", figures(87.5, 201.144, 92.085), _TUNING(0.35), {**_224, "kernel_size": 11}, cfg=_AT_384
    ),
    _dinat_s("tiny", "tiny", figures(81.8, 28.288, 4.491), _TRAINING(0.2)),
    _dinat_s("small", "small", figures(83.5, 49.606, 8.741), _TRAINING(0.3)),
    _dinat_s("base", "base", figures(83.8, 87.768, 15.431), _TRAINING(0.5)),
    _dinat_s("large", "base", figures(86.5, 196.532, 34.476), _FROM_22K(0.35), args=_LARGE),
    _dinat_s("large_384", "base", figures(87.4, 196.532, 101.314), _TUNING(0.35), _384, args=_LARGE, cfg=_AT_384),
    _isotropic("dinat", "small", figures(80.8, 22.000, 4.308)),
    _isotropic("dinat", "base", figures(82.1, 86.441, 16.941)),
    code=_CODE,
    paper=_DILATED,
)
