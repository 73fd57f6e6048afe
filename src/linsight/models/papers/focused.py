"""FLatten (arXiv 2308.00442), focused attention in four hosts."""

from functools import partial
from typing import Any

from ..hosts.cswin import stages
from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

_CODE = "LeapLabTHU/FLatten-Transformer"
# The authors put the weights of some into their repository.
_RELEASED = {"pvt_tiny", "pvt_v2_b0", "swin_tiny", "swin_small", "swin_base", "swin_base_384", "cswin_tiny"}
_LLSS = "focused,focused,softmax,softmax"
# Without class token; the final norm is in the checkpoint only.
_PVT = {"global_pool": "avg", "final_norm": "carried"}

_trained = partial(trained, amp="off")  # mixed precision was not used


def _variant(host: str, known: dict[str, Any], training: Training, attention: str = "focused", **args: Any) -> Variant:
    return Variant(
        f"focused_{host}",
        host,
        attention,
        args,
        cfg={"pool_size": (7, 7)} if "global_pool" in args else {},  # without class token
        published=known,
        training=(training,),
        weights=f"the repository {_CODE}" if host in _RELEASED else "",
    )


def _swin(size: str, known: dict[str, Any], training: Training) -> Variant:
    return _variant(f"swin_{size}", known, training, _LLSS)


def _cswin(size: str, args: Any, known: dict[str, Any], training: Training) -> Variant:
    return _variant(f"cswin_{size}", {**known, "ema": True}, training, _LLSS, stages=args)


add_variants(
    _variant("pvt_tiny", figures(77.8, 12.15, 2.04), _trained("pvt", 128, 0.1), **_PVT),
    _variant("pvt_small", figures(81.7, 21.67, 4.03), _trained("pvt", 64, 0.1), **_PVT),
    _variant("pvt_medium", figures(83.0, 37.24, 7.04, plotted=True), _trained("pvt_deep", 64, 0.3), **_PVT),
    _variant("pvt_large", figures(83.45, 50.65, 10.38, plotted=True), _trained("pvt_deep", 32, 0.3), **_PVT),
    _variant("pvt_v2_b0", figures(71.1, 3.59, 0.58), _trained("pvt", 128, 0.1)),
    _variant("pvt_v2_b1", figures(79.5, 12.93, 2.22), _trained("pvt", 128, 0.1)),
    _variant("pvt_v2_b2", figures(82.5, 22.55, 4.25), _trained("pvt", 128, 0.1)),
    _variant("pvt_v2_b3", figures(83.7, 38.27, 7.28, plotted=True), _trained("pvt_deep", 128, 0.3)),
    _variant("pvt_v2_b4", figures(84.0, 51.84, 10.68, plotted=True), _trained("pvt_deep", 64, 0.3)),
    _variant(
        "pvt_v2_b5",
        figures(None, 67.06, 12.44),
        _trained("pvt_deep", 64, 0.3, note="no recipe published, so that of B4"),
    ),
    _swin("tiny", figures(82.1, 29.19, 4.48), _trained("imagenet", 128, 0.2)),
    _swin("small", figures(83.5, 50.51, 8.73), _trained("imagenet", 128, 0.3)),
    _swin("base", figures(83.8, 88.97, 15.42), _trained("imagenet", 64, 0.5)),
    _swin(
        "base_384",
        figures(85.0, 91.43, 46.38),
        _trained("swin_384", 32, 0.5, start="the weights of focused_swin_base, at 384 pixels"),
    ),
    _cswin("tiny", stages(64, (2, 4, 18, 1)), figures(83.1, 21.20, 4.32), _trained("cswin", 256, 0.2, ema=0.99984)),
    _cswin("small", stages(64, (2, 4, 32, 2)), figures(83.8, 35.45, 6.78), _trained("cswin", 128, 0.4, ema=0.99984)),
    _cswin(
        "base", stages(96, (3, 6, 29, 2)), figures(84.5, 74.87, 14.91), _trained("cswin_base", 64, 0.5, ema=0.99982)
    ),
    _cswin(
        "base_384",
        stages(96, (3, 6, 29, 2), 12),
        figures(85.5, 78.37, 46.30),
        _trained("cswin_384", 32, 0.7, start="the weights of focused_cswin_base, at 384 pixels", ema=0.99982),
    ),
    code=_CODE,
)
