"""FLatten (arXiv 2308.00442), focused attention in four hosts, as data."""

from typing import Any

from ..hosts.cswin import stages
from ..registry import Variant, add_variants, figures


def _pvt(size: str, top1: float, params: float, gmacs: float, **more: Any) -> Variant:
    """Without class token; the final norm is in the checkpoint only."""
    args = {"global_pool": "avg", "final_norm": "carried"}
    known = figures(top1, params, gmacs, **more)
    return Variant(f"focused_pvt_{size}", f"pvt_{size}", "focused", args, published=known)


def _pvt_v2(size: str, top1: float | None, params: float, gmacs: float, **more: Any) -> Variant:
    known = figures(top1, params, gmacs, **more)
    return Variant(f"focused_pvt_v2_{size}", f"pvt_v2_{size}", "focused", published=known)


def _swin(size: str, top1: float, params: float, gmacs: float) -> Variant:
    known = figures(top1, params, gmacs)
    return Variant(f"focused_swin_{size}", f"swin_{size}", "focused,focused,softmax,softmax", published=known)


def _cswin(
    size: str, width: int, depths: tuple[int, ...], top1: float, params: float, gmacs: float, **more: Any
) -> Variant:
    return Variant(
        f"focused_cswin_{size}",
        f"cswin_{size}",
        "focused,focused,softmax,softmax",
        {"stages": stages(width, depths, **more)},
        published=figures(top1, params, gmacs, ema=True),
    )


add_variants(
    _pvt("tiny", 77.8, 12.15, 2.04),
    _pvt("small", 81.7, 21.67, 4.03),
    _pvt("medium", 83.0, 37.24, 7.04, plotted=True),
    _pvt("large", 83.45, 50.65, 10.38, plotted=True),
    _pvt_v2("b0", 71.1, 3.59, 0.58),
    _pvt_v2("b1", 79.5, 12.93, 2.22),
    _pvt_v2("b2", 82.5, 22.55, 4.25),
    _pvt_v2("b3", 83.7, 38.27, 7.28, plotted=True),
    _pvt_v2("b4", 84.0, 51.84, 10.68, plotted=True),
    _pvt_v2("b5", None, 67.06, 12.44),
    _swin("tiny", 82.1, 29.19, 4.48),
    _swin("small", 83.5, 50.51, 8.73),
    _swin("base", 83.8, 88.97, 15.42),
    _swin("base_384", 85.0, 91.43, 46.38),
    _cswin("tiny", 64, (2, 4, 18, 1), 83.1, 21.20, 4.32),
    _cswin("small", 64, (2, 4, 32, 2), 83.8, 35.45, 6.78),
    _cswin("base", 96, (3, 6, 29, 2), 84.5, 74.87, 14.91),
    _cswin("base_384", 96, (3, 6, 29, 2), 85.5, 78.37, 46.30, widest=12),
)
