"""Swin: the sizes of the host, which are timm's, and the published variants, as data."""

from typing import Any

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._timm_hosts import add_timm_host
from .swin import SwinTransformer

_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": _BASE,
    "base_384": {**_BASE, "window_size": 12},
}
_CFG = {"first_conv": "patch_embed.proj", "classifier": "head.fc"}
_CFG_384 = {**_CFG, "input_size": (3, 384, 384), "crop_pct": 1.0}  # evaluated without a crop
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}

# With softmax, as published; with window 12 at 384.
_FIGURES = {
    "tiny": figures(81.3, 28.29, 4.49),
    "small": figures(83.0, 49.61, 8.74),
    "base": figures(83.5, 87.77, 15.43),
    "base_384": figures(84.5, 87.90, 47.08),
}

add_hosts(
    *(
        Host(
            f"swin_{size}",
            SwinTransformer,
            args,
            _CFG_384 if size.endswith("384") else _CFG,
            _FEATURES,
            published=_FIGURES[size],
        )
        for size, args in _SIZES.items()
    )
)


def _variant(family: str, size: str, attention: str, top1: float | None, params: float, gmacs: float) -> Variant:
    return Variant(f"{family}_swin_{size}", f"swin_{size}", attention, published=figures(top1, params, gmacs))


# InLine, arXiv 2412.06590: II M S, the first two blocks of the third stage in the base sizes.
_MIXED = "inline,inline,inline:2/softmax,softmax"
add_variants(
    _variant("inline", "tiny", "inline,inline,inline,softmax", 82.4, 29.22, 4.46),
    _variant("inline", "small", "inline,inline,softmax,softmax", 83.6, 49.79, 8.72),
    _variant("inline", "base", _MIXED, 84.1, 88.35, 15.40),
    _variant("inline", "base_384", _MIXED, None, 88.47, 46.20),
)

# FLatten, arXiv 2308.00442.
_LLSS = "focused,focused,softmax,softmax"
add_variants(
    _variant("focused", "tiny", _LLSS, 82.1, 29.19, 4.48),
    _variant("focused", "small", _LLSS, 83.5, 50.51, 8.73),
    _variant("focused", "base", _LLSS, 83.8, 88.97, 15.42),
    _variant("focused", "base_384", _LLSS, 85.0, 91.43, 46.38),
)

add_timm_host(
    "timm.models.swin_transformer",
    SwinTransformer.adopt,
    depths=lambda model: [len(stage.blocks) for stage in model.layers],
    extra=("attention_window",),
    strict_img_size=False,
)
