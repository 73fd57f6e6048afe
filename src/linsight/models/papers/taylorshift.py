"""TaylorShift (arXiv 2403.02920) in ViT.

The class token has no place in the table of positions. At 224 pixels there are fewer tokens than features, so pairs are
what is computed; `_efficient` is the same model through its features, whatever the number of tokens.
"""

from collections.abc import Iterator
from typing import Any

from ..registry import add_variants
from ..rows import Variant, figures, trained

# By the defaults of the repository.
_TRAINING = trained(
    "imagenet",
    256,
    0.05,
    note="epochs not told",
    opt="lamb",
    lr=3e-3,
    lr_base_batch=0,
    weight_decay=0.02,
    warmup_lr=1e-6,
    min_lr=1e-5,
    warmup_epochs=5,
    clip_grad=1.0,
    color_jitter=0.3,
    auto_augment="3a",
    re_prob=0.0,
    mixup=0.0,
    model_args={"init_values": 1e-4},
)


def _vit(size: str, width: int, depth: int, heads: int, known: dict[str, Any] | None = None) -> Iterator[Variant]:
    """Figures are those of pairs."""
    for name, form in (("", {}), ("_efficient", {"form": "efficient"})):
        yield Variant(
            f"taylorshift_vit_{size}{name}",
            "vit_tiny",
            "taylorshift",
            {"embed_dim": width, "depth": depth, "num_heads": heads, "no_embed_class": True},
            {"output_normalized": True, **form},
            published={} if form else known or {},
            training=(_TRAINING,),
        )


add_variants(
    *_vit("na", 96, 2, 2),
    *_vit("mu", 144, 6, 3),
    *_vit("ti", 192, 12, 3, figures(None, 5.72, 1.25)),
    *_vit("s", 384, 12, 6, figures(None, 22.05, 4.60)),
    *_vit("b", 768, 12, 12, figures(None, 86.57, 17.56)),
    *_vit("l", 1024, 24, 16),
    code="tobna/TaylorShift",
)
