"""PolaFormer (arXiv 2501.15061) in PVT and in Swin, and PolaFormer++ in RAVLT.

All stages of PVT are linear, the first two of the others, which in Swin see the whole grid. The published repositories
are not known to hold weights of them. Of PolaFormer++ the paper has 7, 9, 16, 27, 50 and 97 million parameters, and
0.7, 1.0, 2.7, 5.1, 11 and 18 GMACs; the published code has those of this definition where it was counted, b0 and b2.
"""

from typing import Any

from ..registry import add_variants
from ..rows import Training, Variant, figures, trained

# Without class token; the final norm is in the checkpoint only.
_PVT = {"global_pool": "avg", "final_norm": "carried"}


def _pvt(size: str, known: dict[str, Any], training: Training) -> Variant:
    cfg = {"pool_size": (7, 7)}  # without class token
    host = f"pvt_{size}"
    return Variant(f"polaformer_{host}", host, "polaformer", _PVT, cfg=cfg, published=known, training=(training,))


def _swin(size: str, known: dict[str, Any], training: Training) -> Variant:
    host, attention = f"swin_{size}", "polaformer,polaformer,softmax,softmax"
    return Variant(f"polaformer_{host}", host, attention, published=known, training=(training,))


# Of PVT, parameters are those with the final norm.
add_variants(
    _pvt("tiny", figures(78.8, 12.92, 2.26), trained("pvt", 128, 0.1)),
    _pvt("small", figures(81.9, 23.16, 4.47), trained("pvt", 64, 0.1)),
    _pvt("medium", figures(None, 39.966, 7.81), trained("pvt_deep", 64, 0.3)),
    _pvt("large", figures(None, 54.37, 11.52), trained("pvt_deep", 32, 0.3)),
    _swin("tiny", figures(82.6, 29.29, 4.66), trained("imagenet", 128, 0.2)),
    _swin("small", figures(83.6, 50.60, 8.91), trained("imagenet", 128, 0.3)),
    _swin("base", figures(83.8, 89.14, 15.71), trained("imagenet", 64, 0.5)),
    _swin(
        "base_384",
        figures(None, 91.60, 47.22),
        trained("swin_384", 64, 0.5, start="the weights of polaformer_swin_base, at 384 pixels"),
    ),
    code="ZacharyMeng/PolaFormer",
)


def _plus(size: str, known: dict[str, Any], drop_path: float) -> Variant:
    return Variant(
        f"polaformerpp_{size}",
        f"ravlt_linear_{size}",
        "polaformerpp,polaformerpp,rala_softmax,rala_softmax",
        published=known,
        training=(trained("imagenet", 256, drop_path, min_lr=1e-7, ema=0.99982),),
    )


add_variants(
    _plus("b0", figures(76.9, 7.549, 0.66), 0.1),
    _plus("b1", figures(79.1, 9.227, 1.00), 0.1),
    _plus("b2", figures(82.8, 16.45, 2.72), 0.1),
    _plus("b3", figures(84.3, 27.146, 5.05), 0.15),
    _plus("b4", figures(85.4, 49.799, 11.02), 0.4),
    _plus("b5", figures(85.6, 97.773, 17.70), 0.55),
    code="ZacharyMeng/PolaFormerPP",
)
