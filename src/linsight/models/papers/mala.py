"""MALA (arXiv 2507.00698) in MAViT: RAVLT, whose first two stages are of MALA, with a wider head.

All top-1 are as others cite them.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained


def _mavit(size: str, known: dict[str, Any], drop_path: float, projection: int = 2048) -> Variant:
    return Variant(
        f"mala_mavit_{size}",
        f"ravlt_{size}",
        "mala,mala,rala_softmax,rala_softmax",
        {"projection": projection},
        published=known,
        training=(trained("rala", 128, drop_path, note="as others cite it"),),
        weights="aldjalkdf/MAViT on the Hugging Face Hub",
    )


add_variants(
    _mavit("t", figures(82.9, 16.449, 2.64), 0.1),
    _mavit("s", figures(84.7, 27.14, 4.90), 0.15),
    _mavit("b", figures(85.7, 49.79, 10.60), 0.4),
    _mavit("l", figures(86.0, 97.77, 17.26), 0.55, 2560),
    code="qhfan/MALA",
)
