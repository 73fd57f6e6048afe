"""SOFT (arXiv 2110.11945), and with a normalised kernel (arXiv 2207.03341).

In the last stage attention is softmax. The step of the normalised inverse is the published one, of the whole batch.
Checkpoints do not tell the two forms apart, so a file is loaded by the name of its form. Of the small model the papers
have 24 million parameters and its accuracy; the published code builds one of 20 blocks in the third stage, which is
`soft_small` here, and 24 million are those of `soft_small_shallow`, of 7.
"""

from collections.abc import Iterator
from typing import Any

from linsight.attention import Paper

from ..parts.stages import StageSize
from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

_SHALLOW = {"stages": tuple(map(StageSize, (64, 128, 320, 512), (1, 3, 7, 4), (2, 4, 10, 16)))}


def _training(batch: int, lr: float) -> Training:
    """Rates are for the batch of all GPUs, not scaled."""
    return trained(
        "imagenet",
        batch,
        0.1,
        lr=lr,
        lr_base_batch=0,
        warmup_epochs=10,
        warmup_lr=1e-6,
        min_lr=5e-5,
        cooldown_epochs=10,
        clip_grad=1.0,
        ema=0.99996,
    )


def _variants(normalised: bool) -> Iterator[Variant]:
    # Of each: batch, the rate of the plain and the normalised form, parameters, both accuracies and both GMACs,
    # counted here: the published code multiplies in another order, and its papers say 1.9, 3.3, 7.2, 11.0 and 16.3.
    for size, batch, rates, params, top1, gmacs in (
        ("tiny", 128, (1e-3, 1e-3), 13.069, (79.3, 79.4), (2.145, 2.149)),
        ("small", 128, (1e-3, 1e-3), 38.86, (None, None), (7.483, 7.508)),
        ("small_shallow", 128, (1e-3, 1e-3), 24.11, (82.2, 82.4), (3.788, 3.797)),
        ("medium", 32, (3.5e-4, 4e-4), 45.81, (82.9, 83.1), (8.786, 8.818)),
        ("large", 32, (3.3e-4, 3.3e-4), 64.70, (83.1, 83.3), (13.327, 13.376)),
        ("huge", 32, (2.7e-4, 2.7e-4), 87.11, (83.3, 83.4), (18.855, 18.921)),
    ):
        args: dict[str, Any] = _SHALLOW if size == "small_shallow" else {}
        yield Variant(
            f"soft_norm_{size}" if normalised else f"soft_{size}",
            f"soft_pyramid_{size.removesuffix('_shallow')}",
            "soft,soft,soft,softmax",
            args,
            options={
                "ratio": [8, 4, 2, 1],
                "kernel_size": [9, 5, 3, 0],
                **({"normalised": True, "start": "original"} if normalised else {}),
            },
            published=figures(top1[normalised], params, gmacs[normalised]),
            training=(_training(batch, rates[normalised]),),
        )


_CODE = "fudan-zvg/SOFT"
add_variants(*_variants(normalised=False), code=_CODE)
add_variants(
    *_variants(normalised=True),
    code=_CODE,
    paper=Paper("Softmax-free Linear Transformers", "2207.03341", "IJCV 2024"),
)
