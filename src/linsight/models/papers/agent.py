"""Agent attention (arXiv 2312.08874) in the four hosts it was published in."""

from functools import partial
from typing import Any

from ..hosts.cswin import stages
from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

# Of each stage: agents, and what queries are pooled to in backbones for dense tasks. Where softmax stands, unused.
_AGENTS = {"agents": [9, 16, 49, 49]}
_DENSE_SWIN = {**_AGENTS, "agent_grid": [(9, 9), (12, 12), (14, 14), (7, 7)]}
_DENSE_PVT = {**_AGENTS, "agent_grid": [(12, 12), (16, 16), (28, 28), (28, 28)]}
# Without class token and final norm.
_PVT = {"global_pool": "avg", "final_norm": "absent"}
_SWIN = {
    "tiny": "agent,agent,agent,softmax",
    "small": "agent,agent,softmax,softmax",
    "base": "agent,agent,agent:2/softmax,softmax",
}

_trained = partial(trained, amp="off")  # mixed precision was not used
Figures = dict[str, Any]


def _size(side: int) -> dict[str, Any]:
    return {} if side == 224 else {"input_size": (3, side, side)}


def _deit(name: str, attention: str, agents: int, known: Figures, training: Training, side: int = 224) -> Variant:
    return Variant(
        f"agent_deit_{name}",
        f"vit_{name.partition('_')[0]}",
        attention,
        options={"agents": agents, "prefix_bias": True},
        cfg=_size(side),
        published=known,
        training=(training,),
    )


def _pvt(name: str, known: Figures, training: Training, side: int = 224) -> Variant:
    host = f"pvt_{name.partition('_')[0]}"
    cfg = {**_size(side), "pool_size": (side // 32, side // 32)}
    return Variant(f"agent_pvt_{name}", host, "agent", _PVT, _AGENTS, cfg, known, training=(training,))


def _swin(name: str, known: Figures, training: Training, side: int = 224, window: int = 7) -> Variant:
    size = name.partition("_")[0]
    cfg = _size(side) and {**_size(side), "crop_pct": 1.0}  # the larger ones are evaluated without a crop
    args = {"window_size": window}
    return Variant(f"agent_swin_{name}", f"swin_{size}", _SWIN[size], args, _AGENTS, cfg, known, training=(training,))


def _cswin(name: str, args: Any, known: Figures, training: Training) -> Variant:
    """Depths of their own; the convolution of v is the host's."""
    return Variant(
        f"agent_cswin_{name}",
        f"cswin_{name}",
        "agent,agent,softmax,softmax",
        {"stages": args},
        {**_AGENTS, "local": False},
        published={**known, "ema": True},
        training=(training,),
    )


add_variants(
    _deit("tiny", "agent", 49, figures(74.9, 6.016, 1.17), _trained("imagenet", 512, 0.0)),
    _deit("small", "agent", 49, figures(80.5, 22.647, 4.43), _trained("imagenet", 128, 0.1)),
    _deit("small_448", "agent", 49, figures(83.1, 23.070, 17.64), _trained("imagenet", 64, 0.1), 448),
    _deit("base", "agent:4/softmax", 81, figures(82.0, 87.205, 17.53), _trained("imagenet", 128, 0.3)),
    _pvt("tiny", figures(78.4, 11.570, 1.99), _trained("pvt", 128, 0.1)),
    _pvt("small", figures(82.2, 20.635, 3.95), _trained("pvt", 128, 0.1)),
    _pvt("medium", figures(83.4, 35.922, 7.00), _trained("pvt_deep", 128, 0.3)),
    _pvt("medium_256", figures(83.8, 36.084, 9.14), _trained("pvt_deep", 64, 0.3), 256),
    _pvt("large", figures(83.7, 48.738, 10.34), _trained("pvt_deep", 64, 0.3)),
    _swin("tiny", figures(82.6, 28.903, 4.50), _trained("imagenet", 128, 0.2)),
    _swin("small", figures(83.7, 49.667, 8.70), _trained("imagenet", 128, 0.3)),
    _swin("small_288", figures(84.1, 49.708, 14.53), _trained("imagenet", 64, 0.3), 288, 9),
    _swin("base", figures(84.0, 88.095, 15.40), _trained("imagenet", 64, 0.5)),
    _swin(
        "base_384",
        figures(84.9, 88.305, 46.21),
        _trained("swin_384", 32, 0.5, start="the weights of agent_swin_base, at 384 pixels"),
        384,
        12,
    ),
    _cswin("tiny", stages(64, (2, 4, 18, 1)), figures(83.1, 20.459, 4.29), _trained("cswin", 128, 0.2, ema=0.99984)),
    _cswin("small", stages(64, (3, 6, 29, 2)), figures(83.9, 32.814, 6.74), _trained("cswin", 128, 0.4, ema=0.99984)),
    _cswin(
        "base", stages(96, (3, 6, 29, 2)), figures(84.7, 73.250, 14.87), _trained("cswin_base", 64, 0.5, ema=0.99992)
    ),
    _cswin(
        "base_384",
        stages(96, (3, 6, 29, 2), 12),
        figures(85.8, 73.328, 46.18),
        _trained("cswin_384", 32, 0.7, start="the weights of agent_cswin_base, at 384 pixels", ema=0.9998),
    ),
    *(
        Variant(f"agent_pvt_{size}_dense", f"pvt_{size}", "agent", _PVT, _DENSE_PVT, dense="plain")
        for size in ("tiny", "small", "medium", "large")
    ),
    *(
        Variant(
            f"agent_swin_{size}_dense", f"swin_{size}", attention, {"dense_windows": True}, _DENSE_SWIN, dense="normed"
        )
        for size, attention in _SWIN.items()
    ),
    code="LeapLabTHU/Agent-Attention",
)
