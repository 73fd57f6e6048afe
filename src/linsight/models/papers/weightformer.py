"""WeightFormer (arXiv 2605.01711).

No class token and no position table, a norm of the embedded patches, the mean of the normed tokens. The base model is
the small one at 448. Images are normalised as the training code does it, by the mean and deviation of ImageNet; the
published weights' page says 0.5 for both.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_MEAN = {
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "pos_embed": "none",
    "embed_norm_layer": "layernorm",
    "depth": 17,
}


def _wfm(size: str, host: str, side: int, known: dict[str, Any], drop_path: float, **changes: Any) -> Variant:
    return Variant(
        f"wfm_{size}",
        host,
        "weightformer",
        _MEAN,
        cfg={"crop_mode": "center", "input_size": (3, side, side)},  # the aspect ratio of an image is kept
        published={**known, "plotted": True},
        training=(trained("imagenet", 256, drop_path, **changes),),
        weights=f"https://huggingface.co/RuizeHe/weightformer-{size[0]}/resolve/main/model.safetensors",
    )


add_variants(
    _wfm("tiny", "vit_tiny", 224, figures(76.3, 7.07, 1.12), 0.0),
    _wfm("small", "vit_small", 224, figures(81.3, 27.49, 4.43), 0.2),
    _wfm("base", "vit_small", 448, figures(83.4, 27.49, 17.66), 0.2, amp="off"),
    code="LeapLabTHU/WeightFormer",
)
