"""PVT: the sizes of the host and the published variants, as data."""

import dataclasses
from typing import Any

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._stages import StageSize
from .pvt import PyramidVisionTransformer

_DIMS, _HEADS, _MLPS, _REDUCTIONS = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1)
DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}


def stages(size: str, heads: tuple[int, ...] = _HEADS) -> tuple[StageSize, ...]:
    """Those of PVT-Tiny to PVT-Large."""
    return tuple(map(StageSize, _DIMS, DEPTHS[size], heads, _MLPS, _REDUCTIONS))


# The heads of InLine's hosts are twice as many; neither family has a class token or applies a final norm.
_INLINE_HEADS = (2, 4, 10, 16)
_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}

# With softmax, as published.
_FIGURES = {
    "tiny": figures(75.1, 13.23, 1.93),
    "small": figures(79.8, 24.49, 3.82),
    "medium": figures(81.2, 44.21, 6.66),
    "large": figures(81.7, 61.37, 9.81),
}
_official = [
    Host(f"pvt_{size}", PyramidVisionTransformer, {"stages": stages(size)}, _CFG, _FEATURES, published=_FIGURES[size])
    for size in DEPTHS
]
_meanpool = [
    dataclasses.replace(
        host,
        name=f"{host.name}_meanpool",
        published={},
        args={"stages": stages(size, _INLINE_HEADS), "global_pool": "avg", "final_norm": "absent"},
    )
    for host, size in zip(_official, DEPTHS, strict=True)
]
add_hosts(*_official, *_meanpool)


def _inline(size: str, top1: float, params: float, gmacs: float) -> Variant:
    return Variant(f"inline_pvt_{size}", f"pvt_{size}_meanpool", "inline", published=figures(top1, params, gmacs))


def _focused(size: str, top1: float, params: float, gmacs: float, **more: Any) -> Variant:
    args = {"global_pool": "avg", "final_norm": "carried"}
    facts = figures(top1, params, gmacs, **more)
    return Variant(f"focused_pvt_{size}", f"pvt_{size}", "focused", args, published=facts)


add_variants(
    _inline("tiny", 78.2, 12.03, 1.98),
    _inline("small", 82.0, 21.56, 3.91),
    _inline("medium", 83.2, 37.62, 6.86),
    _inline("large", 83.6, 51.15, 10.13),
)
add_variants(
    _focused("tiny", 77.8, 12.15, 2.04),
    _focused("small", 81.7, 21.67, 4.03),
    _focused("medium", 83.0, 37.24, 7.04, plotted=True),
    _focused("large", 83.45, 50.65, 10.38, plotted=True),
)
