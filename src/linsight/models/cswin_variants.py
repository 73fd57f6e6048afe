"""CSwin: the sizes of the host and the published variants, as data."""

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._stages import StageSize
from .cswin import CSwinTransformer

_HEADS = {64: (2, 4, 8, 16), 96: (4, 8, 16, 32)}
_SPLIT, _SPLIT_384 = (1, 2, 7, 7), (1, 2, 12, 12)


def stages(width: int, depths: tuple[int, ...], split: tuple[int, ...] = _SPLIT) -> tuple[StageSize, ...]:
    """Those of a network whose first stage has `width` channels."""
    return tuple(StageSize(width * 2**i, depths[i], _HEADS[width][i], 4.0, split[i]) for i in range(4))


_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}
_CFGS = {"base_384": {**_CFG, "input_size": (3, 384, 384)}}
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
_OFFICIAL = {
    "tiny": stages(64, (1, 2, 21, 1)),
    "small": stages(64, (2, 4, 32, 2)),
    "base": stages(96, (2, 4, 32, 2)),
    "base_384": stages(96, (2, 4, 32, 2), _SPLIT_384),
}
# With softmax, as published: of averaged weights, as those of both families are.
_FIGURES = {
    "tiny": figures(82.8, 22.32, 4.32, ema=True),
    "small": figures(83.6, 34.64, 6.80, ema=True),
    "base": figures(84.2, 77.38, 14.96, ema=True),
    "base_384": figures(85.5, 77.38, 46.96, ema=True),
}
add_hosts(
    *(
        Host(
            f"cswin_{size}",
            CSwinTransformer,
            {"stages": sizes},
            _CFGS.get(size, _CFG),
            _FEATURES,
            published=_FIGURES[size],
        )
        for size, sizes in _OFFICIAL.items()
    )
)

# Both families have depths of their own.
_DEPTHS = {
    "inline": {"tiny": (2, 4, 18, 1), "small": (3, 6, 29, 2), "base": (3, 6, 29, 2), "base_384": (3, 6, 29, 2)},
    "focused": {"tiny": (2, 4, 18, 1), "small": (2, 4, 32, 2), "base": (3, 6, 29, 2), "base_384": (3, 6, 29, 2)},
}


def _variant(family: str, size: str, top1: float, params: float, gmacs: float) -> Variant:
    split = _SPLIT_384 if size == "base_384" else _SPLIT
    return Variant(
        f"{family}_cswin_{size}",
        f"cswin_{size}",
        f"{family},{family},softmax,softmax",
        {"stages": stages(_OFFICIAL[size][0].dim, _DEPTHS[family][size], split)},
        published=figures(top1, params, gmacs, ema=True),
    )


add_variants(
    # InLine, arXiv 2412.06590
    _variant("inline", "tiny", 83.2, 20.60, 4.31),
    _variant("inline", "small", 83.8, 33.03, 6.77),
    _variant("inline", "base", 84.5, 73.41, 14.88),
    _variant("inline", "base_384", 85.7, 73.41, 46.22),
    # FLatten, arXiv 2308.00442
    _variant("focused", "tiny", 83.1, 21.20, 4.32),
    _variant("focused", "small", 83.8, 35.45, 6.78),
    _variant("focused", "base", 84.5, 74.87, 14.91),
    _variant("focused", "base_384", 85.5, 78.37, 46.30),
)
