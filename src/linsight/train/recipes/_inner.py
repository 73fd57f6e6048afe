"""Weights that are made or trained in the forward: ViT^3 (arXiv 2512.01643), WeightFormer (arXiv 2605.01711) and T5
(arXiv 2605.02772).
"""

from ._table import AVERAGED, CENTRE, DEIT_PIPELINE, Row, published

VIT3 = published(
    {
        "vittt_tiny": Row({}, 512, 0.0, "76.5"),
        "vittt_small": Row({}, 512, 0.1, "81.6"),
        "vittt_base": Row({}, 512, 0.4, "82.6"),
        "h_vittt_tiny": Row(AVERAGED, 512, 0.2, "83.5"),
        "h_vittt_small": Row(AVERAGED, 512, 0.4),
        "h_vittt_base": Row(AVERAGED, 512, 0.6, "84.9"),
        "h_vittt_tiny_mesa": Row(AVERAGED | {"mesa": 1.0}, 512, 0.2, "84.0", model="h_vittt_tiny"),
        "h_vittt_small_mesa": Row(AVERAGED | {"mesa": 1.5}, 512, 0.4, "84.9", model="h_vittt_small"),
        "h_vittt_base_mesa": Row(AVERAGED | {"mesa": 2.0}, 512, 0.6, "85.5", model="h_vittt_base"),
    },
    **CENTRE,
)

WEIGHTFORMER = published(
    {
        "wfm_tiny": Row({}, 256, 0.0, "about 76.3"),
        "wfm_small": Row({}, 256, 0.2, "about 81.3"),
        "wfm_base": Row({"amp": "off"}, 256, 0.2, "about 83.4"),
    },
    **CENTRE,
)

# A softmax DeiT goes on, with new weights inside its attention. At the published batch of 2048 the warm-up begins at
# 2e-8 and the rate ends at 2e-7. The authors kept an average too (0.99996), which after these 18,780 updates is still
# half of what it began with, and evaluated the weights themselves.
_TUNED = {"epochs": 30, "lr": 2e-5, "warmup_lr": 2e-8 / 4, "min_lr": 2e-7 / 4, "init_partial": True, "new_lr_scale": 20}
_SOFTMAX = "the weights of a softmax DeiT, whose class token is left out"

T5 = published(
    {
        "t5_tiny": Row({}, 256, 0.0, "71.19", start=_SOFTMAX),
        "t5_small": Row({}, 256, 0.0, "79.00", start=_SOFTMAX),
        **{
            f"t5_{size}": Row({}, 256, 0.0, start=_SOFTMAX)
            for size in ("small_b12", "small_b48", "small_l1", "small_l2", "small_l4", "small_l5", "base")
        },
    },
    **{**DEIT_PIPELINE, **_TUNED},
)
