"""NaLaFormer (arXiv 2506.21137): linear in the first two stages, softmax in the same layer in the last two.

Parameters and multiply-adds are those of the published code; the paper has 8 million and 1.0 G for the smallest. No
weights are published.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_LATE = "nalaformer_softmax"


def _nalaformer(size: str, known: dict[str, Any], drop_path: float) -> Variant:
    return Variant(
        f"nalaformer_{size}",
        f"nala_{size}",
        f"nalaformer,nalaformer,{_LATE},{_LATE}",
        published=known,
        training=(trained("rala", 128, drop_path, ema=0.99996),),
    )


add_variants(
    _nalaformer("xt", figures(79.1, 6.142, 0.64), 0.1),
    _nalaformer("t", figures(82.6, 15.91, 2.86), 0.1),
    _nalaformer("s", figures(84.3, 25.65, 5.04), 0.15),
    _nalaformer("b", figures(85.2, 52.00, 11.74), 0.4),
    _nalaformer("l", figures(85.7, 95.43, 17.68), 0.55),
    code="ZacharyMeng/NaLaFormer",
)
