"""AttNet (arXiv 2510.20092): attentive convolution in its own host.

The settings of the published runs are not in the repository: rates are the defaults of its script, whose adaptive
clipping is not among ours; stochastic depth is the code's, all else is as in most papers. The accuracy of T2 is that of
the abstract; figures beside it are counted here.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

_NOTE = "settings of the published runs unknown, so the defaults of the script"
_RATES: dict[str, Any] = {
    "lr": 4e-3,
    "lr_base_batch": 0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-6,
    "warmup_epochs": 5,
    "clip_grad": 0.0,
}

add_variants(
    *(
        Variant(
            f"attnet_{size}",
            f"attnet_pyramid_{size}",
            "atconv",
            published=figures(top1, params, gmacs),
            training=(trained("imagenet", 128, drop_path, note=_NOTE, weight_decay=0.01, **_RATES),),
        )
        for size, top1, params, gmacs, drop_path in (
            ("xxs", None, 2.854, 0.535, 0.02),
            ("xs", None, 5.555, 1.010, 0.02),
            ("s", None, 7.681, 1.335, 0.1),
            ("t1", None, 13.715, 2.431, 0.1),
            ("t2", 84.4, 27.011, 5.106, 0.2),
            ("t3", None, 49.176, 9.410, 0.4),
            ("t4", None, 87.320, 16.766, 0.5),
        )
    ),
    code="price112/Attentive-Convolution",
)
