"""MLLA: the sizes of the host and the published variants, as data."""

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._stages import StageSize
from .mlla import MLLATransformer

_CFG = {"first_conv": "stages.0.downsample.first.conv", "classifier": "head.fc", "crop_mode": "center"}
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


def _stages(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[StageSize, ...]:
    return tuple(StageSize(width * 2**i, depths[i], heads[i]) for i in range(4))


_SIZES = {
    "tiny": _stages(64, (2, 4, 8, 4), (2, 4, 8, 16)),
    "small": _stages(64, (3, 6, 21, 6), (2, 4, 8, 16)),
    "base": _stages(96, (3, 6, 21, 6), (3, 6, 12, 24)),
}
_FIGURES = {
    "tiny": figures(83.5, 24.392, 4.131),
    "small": figures(84.4, 43.015, 7.249),
    "base": figures(85.3, 95.984, 16.114),
}

for _size, _rows in _SIZES.items():
    _host = f"mlla_pyramid_{_size}"
    add_hosts(Host(_host, MLLATransformer, {"stages": _rows}, _CFG, _FEATURES))
    add_variants(
        Variant(f"mlla_{_size}", _host, "mlla", published=_FIGURES[_size]),
        Variant(f"mlla_{_size}_dense", _host, "mlla", dense="normed"),
    )
