"""SiameseNorm (arXiv 2602.08064): DeiT with two residual streams, else unchanged."""

from typing import Any

from linsight.attention import Paper

from ..registry import add_variants
from ..rows import Variant, figures, trained


def _deit(size: str, known: dict[str, Any]) -> Variant:
    return Variant(
        f"siamese_deit_{size}",
        f"vit_{size}",
        "softmax",
        {"norm": "siamese"},
        cfg={"crop_mode": "center"},  # of an image whose aspect ratio is kept
        published=known,
        training=(trained("deit", 128, 0.1, note="by DeiT's own recipe"),),
    )


add_variants(
    _deit("tiny", figures(73.6, 5.737, 1.25)),
    _deit("small", figures(81.3, 22.089, 4.60)),
    code="Qwen-Applications/SiameseNorm",
    paper=Paper("SiameseNorm: Breaking the Barrier to Reconciling Pre/Post-Norm", "2602.08064", "ICML 2026"),
)
