"""FaViT (arXiv 2312.08614) in PVTv2.

The ratios of the host's reduced keys are those of the global head, and the dilation of the second local group. The
published repository names no place of the weights. Its last rate is 1e-5 at any batch; the batch itself and where the
warm-up begins are not published.
"""

from functools import partial
from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_TRAINING = partial(trained, "pvt", 128, 0.1, warmup_lr=5e-7, min_lr=5e-6, cooldown_epochs=0)


def _favit(size: str, width: int, depths: tuple[int, ...], known: dict[str, Any], note: str = "") -> Variant:
    widths = {"embed_dims": [width << i for i in range(4)], "num_heads": (1, 2, 4, 8), "mlp_ratios": (8, 6, 4, 4)}
    return Variant(
        f"favit_{size}",
        "pvt_v2_b0",
        "favit",
        {**widths, "depths": depths},
        options={"sr_ratio": [8, 4, 2, 1]},
        published=known,
        training=(_TRAINING(note=f"batch not published, so that of PVT{note}"),),
    )


_LIKE_B0 = "; recipe not published, so that of B0"

# Of the larger two the paper has 24 and 48 million parameters, and 8.5 GMACs: these are counted, not rounded down.
add_variants(
    _favit("b0", 32, (2, 2, 6, 2), figures(71.5, 3.43, 0.63)),
    _favit("b1", 64, (2, 2, 6, 2), figures(79.4, 12.96, 2.36), _LIKE_B0),
    _favit("b2", 64, (2, 3, 18, 3), figures(82.3, 24.92, 4.49), _LIKE_B0),
    _favit("b3", 96, (2, 3, 14, 3), figures(83.4, 48.746, 8.58), _LIKE_B0),
    code="q2479036243/FaViT",
)
