"""ViT^3 (arXiv 2512.01643), test-time training in a plain and in a hierarchical ViT.

No class token: the head takes the mean of the normed tokens. The plain ones know positions by a convolution in front
of each block.
"""

from collections.abc import Iterator
from typing import Any

from ..registry import add_variants
from ..rows import AVERAGED, Variant, figures, trained

_MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False, "pos_embed": "none", "cpe": True}


def _vit(size: str, known: dict[str, Any], drop_path: float, **args: Any) -> Variant:
    return Variant(
        f"vittt_{size}",
        f"vit_{size}",
        "ttt",
        {**_MEAN, **args},
        cfg={"crop_mode": "center"},  # of an image whose aspect ratio is kept
        published=known,
        training=(trained("imagenet", 512, drop_path),),
    )


def _h_vit(size: str, known: dict[str, Any], plain: float | None, drop_path: float, mesa: float) -> Iterator[Variant]:
    """The best published top-1 is that of training with MESA, `plain` that of training without."""
    name, host, own = f"h_vittt_{size}", f"h_vit_{size}", {"rotary": True}
    training = (
        trained("imagenet", 512, drop_path, best=False, top1=plain, **AVERAGED),
        trained("imagenet", 512, drop_path, name=f"{name}_mesa", mesa=mesa, **AVERAGED),
    )
    yield Variant(name, host, "ttt", options=own, published=known, training=training)
    yield Variant(f"{name}_dense", host, "ttt", options=own, dense="normed")


add_variants(
    _vit("tiny", figures(76.5, 6.15, 1.22), 0.0, num_heads=6),
    _vit("small", figures(81.6, 23.80, 4.81), 0.1),
    _vit("base", figures(82.6, 90.06, 17.94), 0.4),
    *_h_vit("tiny", figures(84.0, 28.70, 4.90), 83.5, 0.2, 1.0),
    *_h_vit("small", figures(84.9, 54.36, 8.73), None, 0.4, 1.5),
    *_h_vit("base", figures(85.5, 94.37, 16.68), 84.9, 0.6, 2.0),
    code="LeapLabTHU/ViTTT",
)
