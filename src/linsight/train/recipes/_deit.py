"""What is trained as DeiT was (arXiv 2012.12877): SiameseNorm (arXiv 2602.08064) and VCA (arXiv 2511.00833)."""

from ._table import DEIT_PIPELINE, Row, published

SIAMESE = published(
    {
        "siamese_deit_tiny": Row({}, 128, 0.1, "73.6", "by DeiT's own recipe"),
        "siamese_deit_small": Row({}, 128, 0.1, "81.3", "by DeiT's own recipe"),
    },
    **DEIT_PIPELINE,
)

_BASELINE = "as its softmax baseline, details not published, so by DeiT's recipe"
VCA = published(
    {
        "vca_deit_tiny": Row({}, 128, 0.1, "75.6", _BASELINE),
        "vca_deit_small": Row({}, 128, 0.1, "80.7", _BASELINE),
    },
    **DEIT_PIPELINE,
)
