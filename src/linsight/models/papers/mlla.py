"""MLLA (arXiv 2405.16605), as data."""

from ..registry import Variant, add_variants, figures

for _size, _figures in (
    ("tiny", figures(83.5, 24.392, 4.131)),
    ("small", figures(84.4, 43.015, 7.249)),
    ("base", figures(85.3, 95.984, 16.114)),
):
    add_variants(
        Variant(f"mlla_{_size}", f"mlla_pyramid_{_size}", "mlla", published=_figures),
        Variant(f"mlla_{_size}_dense", f"mlla_pyramid_{_size}", "mlla", dense="normed"),
    )
