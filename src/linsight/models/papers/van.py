"""VAN (arXiv 2202.09741): large kernel attention in its own host.

Accuracy and weights are published up to b3. The published code has larger ones, too, without a recipe; their figures
are counted here.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_WEIGHTS = "https://huggingface.co/Visual-Attention-Network/VAN-{}-original/resolve/main/van_{}.pth.tar"


def _van(size: str, known: dict[str, Any], drop_path: float, weights: tuple[str, str] | None = None) -> Variant:
    rates: dict[str, Any] = {
        "lr": 1e-3,
        "lr_base_batch": 0,
        "warmup_lr": 1e-6,
        "min_lr": 1e-6,
    }  # not scaled by the batch
    course: dict[str, Any] = {"warmup_epochs": 5, "cooldown_epochs": 10, "clip_grad": 0.0}
    note = "" if weights else "no recipe published, so that of B3"
    return Variant(
        f"van_{size}",
        f"van_pyramid_{size}",
        "lka",
        published=known,
        training=(trained("imagenet", 128, drop_path, note=note, **rates, **course),),
        weights=_WEIGHTS.format(*weights) if weights else "",
    )


add_variants(
    _van("b0", figures(75.4, 4.106, 0.864), 0.1, ("Tiny", "tiny_754")),
    _van("b1", figures(81.1, 13.862, 2.495), 0.1, ("Small", "small_811")),
    _van("b2", figures(82.8, 26.578, 4.993), 0.1, ("Base", "base_828")),
    _van("b3", figures(83.9, 44.766, 8.925), 0.2, ("Large", "large_839")),
    _van("b4", figures(None, 60.283, 12.144), 0.2),
    _van("b5", figures(None, 89.968, 17.129), 0.2),
    _van("b6", figures(None, 199.829, 38.710), 0.2),
    code="Visual-Attention-Network/VAN-Classification",
)
