"""The published variants of SiameseNorm (arXiv 2602.08064), as data: DeiT with two residual streams, else unchanged."""

from ..registry import Variant, add_variants, figures

_CENTRE = {"crop_mode": "center"}  # of an image whose aspect ratio is kept

add_variants(
    Variant(
        "siamese_deit_tiny",
        "vit_tiny",
        "softmax",
        {"norm": "siamese"},
        cfg=_CENTRE,
        published=figures(73.6, 5.737, 1.25),
    ),
    Variant(
        "siamese_deit_small",
        "vit_small",
        "softmax",
        {"norm": "siamese"},
        cfg=_CENTRE,
        published=figures(81.3, 22.089, 4.60),
    ),
)
