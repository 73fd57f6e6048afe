"""OverLoCK (arXiv 2502.20087): convolutional networks whose late kernels are made of an overview.

Parameters are those of training, with all branches and the second head, GMACs are counted here with all branches; the
paper has 16, 33, 56 and 95 million, and 2.6, 5.5, 9.7 and 16.7 GMACs, of merged ones.
"""

from collections.abc import Sequence
from typing import Any

from linsight.attention import mechanism

from ..hosts.overlock import OverLoCK
from ..registry import add_architectures
from ..rows import FOUR_MAPS, Architecture, figures, trained

_CFG = {
    "first_conv": "stages.0.downsample.convs.0.conv",
    "classifier": ("head.fc", "aux_head.fc"),
    "pool_size": (7, 7),
    "crop_mode": "center",
}
_WEIGHTS = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{}_in1k_224.pth"


def _overlock(
    size: str,
    dims: Sequence[int],
    depths: Sequence[int],
    focus: Sequence[tuple[int, int]],
    known: dict[str, Any],
    drop_path: float,
    crop_pct: float,
) -> Architecture:
    # at a batch of 2048, with which only the peak scales
    rates: dict[str, Any] = {"lr": 1e-3, "lr_base_batch": 1024, "warmup_lr": 5e-7, "min_lr": 5e-6}
    course: dict[str, Any] = {"warmup_epochs": 5, "cooldown_epochs": 10, "ema": 0.9999}
    return Architecture(
        f"overlock_{size}",
        OverLoCK,
        {"overview": tuple(zip(dims, depths, (17, 15, 13, 7), strict=True)), "focus": tuple(focus)},
        {**_CFG, "crop_pct": crop_pct},
        published={**known, "ema": True},
        feature_cfg=FOUR_MAPS,
        training=(trained("imagenet", 256, drop_path, **rates, **course),),
        weights=_WEIGHTS.format(size),
    )


add_architectures(
    _overlock("xt", (56, 112, 256, 336), (2, 2, 3, 2), ((6, 4), (2, 6)), figures(82.7, 17.307, 2.86), 0.1, 0.925),
    _overlock("t", (64, 128, 256, 512), (4, 4, 6, 2), ((12, 4), (2, 8)), figures(84.2, 34.990, 5.99), 0.15, 0.95),
    _overlock("s", (64, 128, 320, 512), (6, 6, 8, 3), ((16, 8), (3, 16)), figures(84.8, 58.310, 10.43), 0.4, 0.95),
    _overlock("b", (80, 160, 384, 576), (8, 8, 10, 4), ((20, 6), (4, 9)), figures(85.1, 98.013, 17.96), 0.5, 0.975),
    code="LMMMEng/OverLoCK",
    paper=mechanism("contmix").paper,
)
