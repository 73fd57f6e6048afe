"""InLine (arXiv 2412.06590) in the four hosts it was published in, as data."""

from typing import Any

from ..hosts.cswin import stages
from ..registry import Variant, add_variants, figures


def _deit(size: str, width: int, side: int, top1: float, params: float, gmacs: float) -> Variant:
    """Widths, heads and image sizes of their own; heads are 32 wide."""
    args, cfg = {"embed_dim": width, "num_heads": width // 32}, {"input_size": (3, side, side)}
    return Variant(
        f"inline_deit_{size}", f"vit_{size}", "inline", args, cfg=cfg, published=figures(top1, params, gmacs)
    )


def _pvt(size: str, top1: float, params: float, gmacs: float) -> Variant:
    return Variant(f"inline_pvt_{size}", f"pvt_{size}_meanpool", "inline", published=figures(top1, params, gmacs))


def _swin(size: str, attention: str, top1: float | None, params: float, gmacs: float) -> Variant:
    return Variant(f"inline_swin_{size}", f"swin_{size}", attention, published=figures(top1, params, gmacs))


def _cswin(
    size: str, width: int, depths: tuple[int, ...], top1: float, params: float, gmacs: float, **more: Any
) -> Variant:
    return Variant(
        f"inline_cswin_{size}",
        f"cswin_{size}",
        "inline,inline,softmax,softmax",
        {"stages": stages(width, depths, **more)},
        published=figures(top1, params, gmacs, ema=True),
    )


# The first two blocks of the third stage in the base sizes of Swin.
_MIXED = "inline,inline,inline:2/softmax,softmax"

add_variants(
    _deit("tiny", 192, 224, 74.5, 6.48, 1.11),
    _deit("small", 320, 288, 80.2, 16.73, 4.97),
    _deit("base", 384, 448, 82.3, 23.80, 17.17),
    _pvt("tiny", 78.2, 12.03, 1.98),
    _pvt("small", 82.0, 21.56, 3.91),
    _pvt("medium", 83.2, 37.62, 6.86),
    _pvt("large", 83.6, 51.15, 10.13),
    _swin("tiny", "inline,inline,inline,softmax", 82.4, 29.22, 4.46),
    _swin("small", "inline,inline,softmax,softmax", 83.6, 49.79, 8.72),
    _swin("base", _MIXED, 84.1, 88.35, 15.40),
    _swin("base_384", _MIXED, None, 88.47, 46.20),
    _cswin("tiny", 64, (2, 4, 18, 1), 83.2, 20.60, 4.31),
    _cswin("small", 64, (3, 6, 29, 2), 83.8, 33.03, 6.77),
    _cswin("base", 96, (3, 6, 29, 2), 84.5, 73.41, 14.88),
    _cswin("base_384", 96, (3, 6, 29, 2), 85.7, 73.41, 46.22, widest=12),
)
