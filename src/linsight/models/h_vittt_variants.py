"""H-ViT^3: the sizes of the host and the published variants, as data."""

from ._registry import Host, Variant, add_hosts, add_variants, figures
from ._stages import StageSize
from .h_vittt import HierarchicalViT

_CFG = {"first_conv": "stages.0.downsample.first.conv", "classifier": "head.fc", "crop_mode": "center"}
_FEATURES = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


def _stages(widths: tuple[int, ...], depths: tuple[int, ...]) -> tuple[StageSize, ...]:
    """Heads are 32 wide."""
    return tuple(StageSize(width, depth, width // 32) for width, depth in zip(widths, depths, strict=True))


_SIZES = {
    "tiny": _stages((64, 128, 320, 512), (1, 3, 9, 4)),
    "small": _stages((64, 128, 320, 512), (2, 6, 18, 8)),
    "base": _stages((96, 192, 448, 640), (2, 6, 18, 8)),
}
# The best published top-1, those of training with MESA.
_FIGURES = {
    "tiny": figures(84.0, 28.70, 4.90),
    "small": figures(84.9, 54.36, 8.73),
    "base": figures(85.5, 94.37, 16.68),
}
_OWN = {"rotary": True}

for _size, _rows in _SIZES.items():
    _host = f"h_vit_{_size}"
    add_hosts(Host(_host, HierarchicalViT, {"stages": _rows}, _CFG, _FEATURES))
    add_variants(
        Variant(f"h_vittt_{_size}", _host, "ttt", options=_OWN, published=_FIGURES[_size]),
        Variant(f"h_vittt_{_size}_dense", _host, "ttt", options=_OWN, dense="normed"),
    )
