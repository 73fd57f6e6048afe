"""The ViT host's sizes and its published variants, as data."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import nn

from linsight.errors import LinsightError

from ._plan import plan
from ._registry import TIMM_HOSTS, Host, Variant, add_hosts, add_variants, figures
from ._steps import block_widths
from ._vit_blocks import host_arguments
from .vit import VisionTransformer

_PATCH16 = {"patch_size": 16, "depth": 12}
_CFG = {"first_conv": "patch_embed.proj", "classifier": "head"}
_FEATURES = {"out_indices": 3, "feature_cls": "getter"}

add_hosts(
    Host("vit_tiny", VisionTransformer, {**_PATCH16, "embed_dim": 192, "num_heads": 3}, _CFG, _FEATURES),
    Host("vit_small", VisionTransformer, {**_PATCH16, "embed_dim": 384, "num_heads": 6}, _CFG, _FEATURES),
    Host("vit_base", VisionTransformer, {**_PATCH16, "embed_dim": 768, "num_heads": 12}, _CFG, _FEATURES),
)

# InLine-DeiT (arXiv 2412.06590): widths, heads and image sizes of their own, head width 32.
add_variants(
    Variant(
        "inline_deit_tiny",
        "vit_tiny",
        "inline",
        {"embed_dim": 192, "num_heads": 6},
        published=figures(74.5, 6.48, 1.11),
    ),
    Variant(
        "inline_deit_small",
        "vit_small",
        "inline",
        {"embed_dim": 320, "num_heads": 10},
        cfg={"input_size": (3, 288, 288)},
        published=figures(80.2, 16.73, 4.97),
    ),
    Variant(
        "inline_deit_base",
        "vit_base",
        "inline",
        {"embed_dim": 384, "num_heads": 12},
        cfg={"input_size": (3, 448, 448)},
        published=figures(82.3, 23.80, 17.17),
    ),
)


def _timm_vit(
    name: str, attention: str, options: Mapping[str, Any] | None, *, pretrained: bool, **kwargs: Any
) -> nn.Module:
    """timm's own ViT `name`, its weights too where asked, on our host."""
    extra = {key: kwargs.pop(key) for key in ("cpe", "norm", "steps") if key in kwargs}
    if pretrained and extra:
        raise LinsightError(f"the weights of '{name}' are those of timm's blocks: pass pretrained=False")
    if extra.get("steps") is not None:
        kwargs["depth"] = len(block_widths(extra["steps"]))
    shape = {key: value for key, value in kwargs.items() if key in ("img_size", "patch_size", "depth")}
    plain = timm.create_model(name, device="meta", **shape)
    (choices,) = plan(attention, [len(plain.blocks)], options)
    features, indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", 3)
    ours = host_arguments(choices, plain.patch_embed.grid_size, **extra)
    extra.pop("cpe", None)
    model = VisionTransformer.adopt(timm.create_model(name, pretrained=pretrained, **{**kwargs, **ours}), **extra)
    if not features:
        return model
    wrapped = FeatureGetterNet(model, indices)
    wrapped.pretrained_cfg = wrapped.default_cfg = model.pretrained_cfg
    return wrapped


TIMM_HOSTS["timm.models.vision_transformer"] = _timm_vit
TIMM_HOSTS["timm.models.deit"] = _timm_vit
