"""RALA (arXiv 2411.07635) in RAVLT: linear in the first two stages, softmax in the same layer in the last two.

The top-1 of RAVLT-T is as others cite it; that of RAVLT-L was not found in the publication.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained


def _ravlt(size: str, known: dict[str, Any], drop_path: float, note: str = "") -> Variant:
    return Variant(
        f"rala_ravlt_{size}",
        f"ravlt_{size}",
        "rala,rala,rala_softmax,rala_softmax",
        published=known,
        training=(trained("rala", 128, drop_path, note=note),),
        weights=f"https://huggingface.co/aldjalkdf/RAVLT/resolve/main/RAVLT_{size.upper()}.pth",
    )


add_variants(
    _ravlt("t", figures(82.8, 14.898, 2.61), 0.1, "as others cite it"),
    _ravlt("s", figures(84.4, 25.59, 4.88), 0.15),
    _ravlt("b", figures(85.5, 48.24, 10.58), 0.4),
    _ravlt("l", figures(None, 95.24, 17.21), 0.55, "others cite 86.1"),
    code="qhfan/RALA",
)
