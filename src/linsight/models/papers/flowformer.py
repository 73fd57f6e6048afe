"""The vision model of Flowformer (arXiv 2202.06258)."""

from ..registry import add_variants
from ..rows import Variant, figures, trained

# The published batch of 768 is of 6 GPUs; warm-up begins at 1e-6 there, and the rate ends at 1e-5.
_TRAINING = trained(
    "imagenet",
    96,
    0.2,
    note="published for 6 GPUs of 128",
    warmup_epochs=5,
    warmup_lr=1e-6 / 1.5,
    min_lr=1e-5 / 1.5,
    clip_grad=1.0,
    re_prob=0.0,
)

add_variants(
    Variant(
        "flowformer_cv",
        "flow_pyramid",
        "flowformer",
        published=figures(80.6, 43.311, 6.87),
        training=(_TRAINING,),
        weights="a share of Tsinghua University that the repository thuml/Flowformer names",
    ),
    code="thuml/Flowformer",
)
