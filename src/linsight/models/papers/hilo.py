"""HiLo (arXiv 2205.13213) in LITv2.

In the third stage windows are 2 x 2 and 0.9 of the heads are low, in the fourth attention is softmax; the others have
none. The published weights of other shares load with `attention_options={"window_size": [2, 2, 2, 1], "alpha": 0.5}`.
"""

from typing import Any

from linsight.attention import mechanism

from ..hosts.litv2 import LITv2
from ..registry import add_variants, credit_hosts
from ..rows import Training, Variant, figures, trained

_CODE = "ziplab/LITv2"


def _litv2(name: str, known: dict[str, Any], training: Training, side: int = 224) -> Variant:
    return Variant(
        f"litv2_{name}",
        f"litv2_pyramid_{name.partition('_')[0]}",
        "hilo",
        options={"window_size": [2, 2, 2, 1], "alpha": 0.9},
        cfg={"input_size": (3, side, side), "crop_pct": 1.0 if side > 224 else 0.875},  # fine-tuned ones see all
        published=known,
        training=(training,),
        weights=f"the releases of the repository {_CODE}",
    )


def _training(drop_path: float) -> Training:
    return trained("imagenet", 128, drop_path, note="there with 0.01 of the rate for the convolutions of offsets")


# Parameters and GMACs are counted; the paper says 28, 49 and 87 million, and 3.7, 7.5, 13.2 and 39.7.
add_variants(
    _litv2("small", figures(82.0, 27.844, 3.72), _training(0.2)),
    _litv2("medium", figures(83.3, 48.83, 7.46), _training(0.3)),
    _litv2("base", figures(83.6, 86.521, 13.17), _training(0.5)),
    _litv2(
        "base_384",
        figures(84.7, 86.521, 39.65),
        trained("swin_384", 32, 0.5, start="the weights of litv2_base, at 384 pixels"),
        384,
    ),
    code=_CODE,
)
credit_hosts(LITv2, mechanism("hilo").paper, _CODE)
