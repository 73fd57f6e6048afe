"""Agent attention (arXiv 2312.08874) in the four hosts it was published in, as data."""

from typing import Any

from ..hosts.cswin import stages
from ..registry import Variant, add_variants, figures

# Of each stage: agents, and what queries are pooled to in backbones for dense tasks. Where softmax stands, unused.
_AGENTS = {"agents": [9, 16, 49, 49]}
_DENSE_SWIN = {**_AGENTS, "agent_grid": [(9, 9), (12, 12), (14, 14), (7, 7)]}
_DENSE_PVT = {**_AGENTS, "agent_grid": [(12, 12), (16, 16), (28, 28), (28, 28)]}


def _size(side: int, **more: Any) -> dict[str, Any]:
    return {"input_size": (3, side, side), **more}


def _deit(name: str, attention: str, agents: int, top1: float, params: float, gmacs: float, **cfg: Any) -> Variant:
    return Variant(
        f"agent_deit_{name}",
        f"vit_{name.partition('_')[0]}",
        attention,
        options={"agents": agents, "prefix_bias": True},
        cfg=cfg,
        published=figures(top1, params, gmacs),
    )


add_variants(
    _deit("tiny", "agent", 49, 74.9, 6.016, 1.17),
    _deit("small", "agent", 49, 80.5, 22.647, 4.43),
    _deit("small_448", "agent", 49, 83.1, 23.070, 17.64, **_size(448)),
    _deit("base", "agent:4/softmax", 81, 82.0, 87.205, 17.53),
)


_PVTS = ("tiny", "small", "medium", "large")
# Without class token and final norm.
_PVT = {"global_pool": "avg", "final_norm": "absent"}


def _pvt(name: str, top1: float, params: float, gmacs: float, **cfg: Any) -> Variant:
    host, facts = f"pvt_{name.partition('_')[0]}", figures(top1, params, gmacs)
    return Variant(f"agent_pvt_{name}", host, "agent", _PVT, _AGENTS, cfg, facts)


add_variants(
    _pvt("tiny", 78.4, 11.570, 1.99),
    _pvt("small", 82.2, 20.635, 3.95),
    _pvt("medium", 83.4, 35.922, 7.00),
    _pvt("medium_256", 83.8, 36.084, 9.14, **_size(256)),
    _pvt("large", 83.7, 48.738, 10.34),
    *(Variant(f"agent_pvt_{size}_dense", f"pvt_{size}", "agent", _PVT, _DENSE_PVT, dense="plain") for size in _PVTS),
)

_SWIN = {
    "tiny": "agent,agent,agent,softmax",
    "small": "agent,agent,softmax,softmax",
    "base": "agent,agent,agent:2/softmax,softmax",
}


def _swin(name: str, top1: float, params: float, gmacs: float, side: int = 224, window: int = 7) -> Variant:
    size = name.partition("_")[0]
    return Variant(
        f"agent_swin_{name}",
        f"swin_{size}",
        _SWIN[size],
        {"window_size": window},
        _AGENTS,
        {} if side == 224 else _size(side, crop_pct=1.0),  # the larger ones are evaluated without a crop
        figures(top1, params, gmacs),
    )


add_variants(
    _swin("tiny", 82.6, 28.903, 4.50),
    _swin("small", 83.7, 49.667, 8.70),
    _swin("small_288", 84.1, 49.708, 14.53, 288, 9),
    _swin("base", 84.0, 88.095, 15.40),
    _swin("base_384", 84.9, 88.305, 46.21, 384, 12),
    *(
        Variant(
            f"agent_swin_{size}_dense",
            f"swin_{size}",
            attention,
            {"dense_windows": True},
            _DENSE_SWIN,
            dense="normed",
        )
        for size, attention in _SWIN.items()
    ),
)


# Depths of their own; the convolution of v is the host's.
def _cswin(
    name: str, width: int, depths: tuple[int, ...], top1: float, params: float, gmacs: float, **more: Any
) -> Variant:
    return Variant(
        f"agent_cswin_{name}",
        f"cswin_{name}",
        "agent,agent,softmax,softmax",
        {"stages": stages(width, depths, **more)},
        {**_AGENTS, "local": False},
        published=figures(top1, params, gmacs, ema=True),
    )


add_variants(
    _cswin("tiny", 64, (2, 4, 18, 1), 83.1, 20.459, 4.29),
    _cswin("small", 64, (3, 6, 29, 2), 83.9, 32.814, 6.74),
    _cswin("base", 96, (3, 6, 29, 2), 84.7, 73.250, 14.87),
    _cswin("base_384", 96, (3, 6, 29, 2), 85.8, 73.328, 46.18, widest=12),
)
