"""MoH (arXiv 2410.11842) in TransNeXt: of the heads of a stage some are shared, of the others each token keeps some.

Names tell the share of heads that are kept, in percent; all heads are computed, so two of a size cost the same.
Multiply-adds are counted here, where sums over windows are no products of matrices: in the published code, the small
one has 10.32. The accuracies are published as a picture only.
"""

from typing import Any

from linsight.attention import mechanism

from ..registry import add_variants
from ..rows import Variant, figures, trained


def _moh(
    host: str, kept: int, shared: tuple[int, ...], routed: tuple[int, ...], known: dict[str, Any], drop_path: float
) -> Variant:
    name = f"moh_transnext_{host}_{kept}"
    return Variant(
        name,
        f"transnext_{host}",
        "transnext",
        options={"sr_ratio": [8, 4, 2, 1], "shared_heads": list(shared), "routed_heads": list(routed)},
        published=known,
        training=(
            trained(
                "imagenet",
                128,
                drop_path,
                lr=1e-3,
                lr_base_batch=0,
                warmup_epochs=5,
                warmup_lr=1e-6,
                min_lr=1e-5,
                clip_grad=1.0,
            ),
        ),
        weights=f"Chat-UniVi/MoH-ViT-{host[0].upper()}-{kept} on the Hugging Face Hub",
    )


add_variants(
    _moh("small", 80, (3, 6, 3, 8), (0, 0, 6, 12), figures(None, 49.910548, 10.292), 0.45),
    _moh("small", 75, (3, 6, 3, 4), (0, 0, 6, 12), figures(None, 49.910548, 10.292), 0.45),
    _moh("base", 75, (4, 8, 4, 5), (0, 0, 8, 16), figures(None, 90.020632, 18.314), 0.6),
    _moh("base", 50, (2, 2, 2, 4), (2, 4, 6, 8), figures(None, 90.023512, 18.319), 0.6),
    code="SkyworkAI/MoH",
    paper=mechanism("moh").paper,
)
