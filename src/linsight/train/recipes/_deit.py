"""What has no recipe of its own but that of its host: SiameseNorm (arXiv 2602.08064), VCA (arXiv 2511.00833), StepsNet
(arXiv 2511.14329).
"""

from ._table import DEIT_PIPELINE, Row, published

SIAMESE = published(
    {
        "siamese_deit_tiny": Row({}, 128, 0.1, "73.6", "by DeiT's own recipe"),
        "siamese_deit_small": Row({}, 128, 0.1, "81.3", "by DeiT's own recipe"),
    },
    **DEIT_PIPELINE,
)

# Where the evaluation is not published either, it is that of our hosts.
_DEIT = {**DEIT_PIPELINE, "eval_crop": "squash"}
_BASELINE = "as its softmax baseline, details not published, so by DeiT's recipe"
VCA = published(
    {
        "vca_deit_tiny": Row({}, 128, 0.1, "75.6", _BASELINE),
        "vca_deit_small": Row({}, 128, 0.1, "80.7", _BASELINE),
    },
    **_DEIT,
)

_HOST = "recipe not published, so that of its host, unverified"
STEPS = published(
    {
        **{f"steps_deit_{size}": Row(_DEIT, 128, 0.1, note=_HOST) for size in ("tiny", "small", "base")},
        "steps_swin_tiny": Row({}, 128, 0.2, note=_HOST),
        "steps_swin_small": Row({}, 128, 0.3, note=_HOST),
        "steps_swin_base": Row({}, 128, 0.5, note=_HOST),
        **{
            f"steps_resnet{layers}": Row({}, 128, 0.0, top1, "recipe not published, so that of Swin, unverified")
            for layers, top1 in ((18, "71.6"), (34, "76.0"), (50, "79.9"))
        },
    }
)
