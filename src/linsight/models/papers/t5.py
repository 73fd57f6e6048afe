"""T5 (arXiv 2605.02772): a softmax DeiT goes on, with new weights inside its attention.

No class token: the head takes the mean of the normed tokens. The table of positions of the pretrained DeiT stays, on
the patches alone.
"""

from ..registry import add_variants
from ..rows import Variant, figures, trained

_MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False}

# At the published batch of 2048 the warm-up begins at 2e-8 and the rate ends at 2e-7. The authors kept an average too
# (0.99996), which after these 18,780 updates is still half of what it began with, and evaluated the weights themselves.
_TRAINING = trained(
    "deit",
    256,
    0.0,
    start="the weights of a softmax DeiT, whose class token is left out",
    epochs=30,
    lr=2e-5,
    warmup_lr=2e-8 / 4,
    min_lr=2e-7 / 4,
    init_partial=True,
    new_lr_scale=20,
)


def _t5(name: str, size: tuple[int, int, int], top1: float | None, params: float, gmacs: float) -> Variant:
    """`size` is width, depth and heads."""
    return Variant(
        f"t5_{name}",
        "vit_tiny",
        "t5",
        {**_MEAN, **dict(zip(("embed_dim", "depth", "num_heads"), size, strict=True))},
        cfg={"crop_mode": "center"},  # of an image whose aspect ratio is kept
        published=figures(top1, params, gmacs),
        training=(_TRAINING,),
    )


add_variants(
    _t5("tiny", (192, 12, 3), 71.19, 6.21, 1.34),
    _t5("small", (384, 12, 6), 79.00, 23.03, 4.76),
    _t5("small_b12", (384, 12, 6), None, 23.03, 4.76),
    _t5("small_b48", (192, 48, 3), None, 23.69, 5.26),
    # Published under four names, which differ in an argument that nothing reads.
    *(_t5(f"small_l{i}", (256, 24, 4), None, 20.76, 4.45) for i in (1, 2, 4, 5)),
    _t5("base", (512, 24, 8), None, 79.27, 16.31),
    code="LeapLabTHU/Transformer-to-TTT",
)
