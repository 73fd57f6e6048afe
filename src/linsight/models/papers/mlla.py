"""MLLA (arXiv 2405.16605), trained with MESA."""

from collections.abc import Iterator
from typing import Any

from ..registry import add_variants
from ..rows import AVERAGED, Variant, figures, trained


def _variants(size: str, known: dict[str, Any], batch: int, drop_path: float, mesa: float) -> Iterator[Variant]:
    host, training = f"mlla_pyramid_{size}", trained("imagenet", batch, drop_path, mesa=mesa, **AVERAGED)
    yield Variant(f"mlla_{size}", host, "mlla", published=known, training=(training,))
    yield Variant(f"mlla_{size}_dense", host, "mlla", dense="normed")


add_variants(
    *_variants("tiny", figures(83.5, 24.392, 4.131), 128, 0.2, 1.0),
    *_variants("small", figures(84.4, 43.015, 7.249), 64, 0.3, 1.5),
    *_variants("base", figures(85.3, 95.984, 16.114), 64, 0.5, 2.0),
    code="LeapLabTHU/MLLA",
)
