"""InLine (arXiv 2412.06590) in the four hosts it was published in."""

import dataclasses
from typing import Any

from ..hosts.cswin import stages
from ..registry import add_variants
from ..rows import AVERAGED, Training, Variant, figures, trained

_CODE = "LeapLabTHU/InLine"
Figures = dict[str, Any]


def _deit(size: str, width: int, side: int, known: Figures, training: Training) -> Variant:
    """Widths, heads and image sizes of their own; heads are 32 wide."""
    args, cfg = {"embed_dim": width, "num_heads": width // 32}, {"input_size": (3, side, side)}
    return Variant(f"inline_deit_{size}", f"vit_{size}", "inline", args, cfg=cfg, published=known, training=(training,))


def _pvt(size: str, known: Figures, training: Training) -> Variant:
    return Variant(f"inline_pvt_{size}", f"pvt_{size}_meanpool", "inline", published=known, training=(training,))


def _swin(size: str, attention: str, known: Figures, training: Training) -> Variant:
    return Variant(f"inline_swin_{size}", f"swin_{size}", attention, published=known, training=(training,))


def _cswin(size: str, args: Any, known: Figures, training: Training) -> Variant:
    attention, known = "inline,inline,softmax,softmax", {**known, "ema": True}
    return Variant(
        f"inline_cswin_{size}", f"cswin_{size}", attention, {"stages": args}, published=known, training=(training,)
    )


# The first two blocks of the third stage in the base sizes of Swin.
_MIXED = "inline,inline,inline:2/softmax,softmax"


def _linked(variant: Variant) -> Variant:
    """With the place of its weights: those for images of 384 pixels are not published."""
    return variant if variant.name.endswith("_384") else dataclasses.replace(variant, weights=f"the README of {_CODE}")


_VARIANTS = (
    _deit("tiny", 192, 224, figures(74.5, 6.48, 1.11), trained("imagenet", 512, 0.1)),
    _deit("small", 320, 288, figures(80.2, 16.73, 4.97), trained("imagenet", 128, 0.1)),
    _deit("base", 384, 448, figures(82.3, 23.80, 17.17), trained("imagenet", 64, 0.1)),
    _pvt("tiny", figures(78.2, 12.03, 1.98), trained("pvt", 128, 0.1)),
    _pvt("small", figures(82.0, 21.56, 3.91), trained("pvt", 128, 0.1)),
    _pvt("medium", figures(83.2, 37.62, 6.86), trained("pvt_deep", 128, 0.3)),
    _pvt("large", figures(83.6, 51.15, 10.13), trained("pvt_deep", 64, 0.3)),
    _swin("tiny", "inline,inline,inline,softmax", figures(82.4, 29.22, 4.46), trained("imagenet", 128, 0.2)),
    _swin("small", "inline,inline,softmax,softmax", figures(83.6, 49.79, 8.72), trained("imagenet", 128, 0.3)),
    _swin("base", _MIXED, figures(84.1, 88.35, 15.40), trained("imagenet", 64, 0.5)),
    _swin(
        "base_384",
        _MIXED,
        figures(None, 88.47, 46.20),
        trained("swin_384", 32, 0.5, start="the weights of inline_swin_base, at 384 pixels"),
    ),
    _cswin("tiny", stages(64, (2, 4, 18, 1)), figures(83.2, 20.60, 4.31), trained("cswin", 128, 0.2, **AVERAGED)),
    _cswin("small", stages(64, (3, 6, 29, 2)), figures(83.8, 33.03, 6.77), trained("cswin", 128, 0.4, **AVERAGED)),
    _cswin("base", stages(96, (3, 6, 29, 2)), figures(84.5, 73.41, 14.88), trained("cswin_base", 64, 0.5, **AVERAGED)),
    _cswin(
        "base_384",
        stages(96, (3, 6, 29, 2), 12),
        figures(85.7, 73.41, 46.22),
        trained("cswin_384", 32, 0.7, start="the weights of inline_cswin_base, at 384 pixels", **AVERAGED),
    ),
)
add_variants(*map(_linked, _VARIANTS), code=_CODE)
