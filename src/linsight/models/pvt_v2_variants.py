"""PVTv2: the sizes of the host, which are timm's, and the published variants, as data."""

from typing import Any

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._timm_hosts import add_timm_host
from .pvt_v2 import PyramidVisionTransformerV2

_DIMS, _HEADS = (64, 128, 320, 512), (1, 2, 5, 8)
_SIZES: dict[str, dict[str, Any]] = {
    "b0": {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "b1": {"embed_dims": _DIMS, "depths": (2, 2, 2, 2)},
    "b2": {"embed_dims": _DIMS, "depths": (3, 4, 6, 3)},
    "b2_li": {"embed_dims": _DIMS, "depths": (3, 4, 6, 3), "linear": True},
    "b3": {"embed_dims": _DIMS, "depths": (3, 4, 18, 3)},
    "b4": {"embed_dims": _DIMS, "depths": (3, 8, 27, 3)},
    "b5": {"embed_dims": _DIMS, "depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
}
_CFG = {"first_conv": "patch_embed.proj", "classifier": "head"}
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}

# With softmax, as published.
_FIGURES = {
    "b0": figures(70.5, 3.67, 0.57),
    "b1": figures(78.7, 14.01, 2.11),
    "b2": figures(82.0, 25.36, 4.03),
    "b2_li": figures(82.1, 22.55, 3.89),
    "b3": figures(83.1, 45.24, 6.90),
    "b4": figures(83.6, 62.56, 10.10),
    "b5": figures(83.8, 81.96, 11.72),
}

add_hosts(
    *(
        Host(
            f"pvt_v2_{size}",
            PyramidVisionTransformerV2,
            {"num_heads": _HEADS, **args},
            _CFG,
            _FEATURES,
            published=_FIGURES[size],
        )
        for size, args in _SIZES.items()
    )
)


def _focused(size: str, top1: float | None, params: float, gmacs: float, **more: Any) -> Variant:
    facts = figures(top1, params, gmacs, **more)
    return Variant(f"focused_pvt_v2_{size}", f"pvt_v2_{size}", "focused", published=facts)


# FLatten, arXiv 2308.00442; the accuracy of b5 was not published.
add_variants(
    _focused("b0", 71.1, 3.59, 0.58),
    _focused("b1", 79.5, 12.93, 2.22),
    _focused("b2", 82.5, 22.55, 4.25),
    _focused("b3", 83.7, 38.27, 7.28, plotted=True),
    _focused("b4", 84.0, 51.84, 10.68, plotted=True),
    _focused("b5", None, 67.06, 12.44),
)

add_timm_host(
    "timm.models.pvt_v2",
    PyramidVisionTransformerV2.adopt,
    depths=lambda model: [len(stage.blocks) for stage in model.stages],
    sized=False,
)
