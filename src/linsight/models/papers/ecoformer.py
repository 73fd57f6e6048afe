"""EcoFormer (arXiv 2209.09004) in PVTv2: softmax stays in the last stage, no keys are reduced.

Parameters of b0 and b1 are those of the published code, of the others counted here, as GMACs are, with the hash: the
paper has 0.54, 2.03, 3.85, 6.54 and 9.57 billion multiplications, and a little more additions. The hash is no
parameter: training fits it to the tokens every 300 updates, see the mechanism. The published Twins-SVT-S has no host
here.
"""

from ..registry import add_variants
from ..rows import Variant, figures, trained


def _pvt(size: str, top1: float, params: float, gmacs: float) -> Variant:
    training = trained(
        "pvt",
        32,
        0.0,
        note="stochastic depth not published, so none",
        start=f"the weights of pvt_v2_{size}, trained on for 100 epochs at this rate",
        epochs=30,
        cooldown_epochs=0,
        lr=5e-5,
        lr_base_batch=0,
        warmup_lr=1e-7,
        min_lr=1e-6,
        init_partial=True,
    )
    return Variant(
        f"ecoformer_pvt_v2_{size}",
        f"pvt_v2_{size}",
        "ecoformer,ecoformer,ecoformer,softmax",
        {"joined": True},
        published=figures(top1, params, gmacs),
        training=(training,),
    )


add_variants(
    _pvt("b0", 70.44, 3.136, 0.573),
    _pvt("b1", 78.38, 11.89, 2.100),
    _pvt("b2", 81.28, 20.368, 3.989),
    _pvt("b3", 81.96, 34.084, 6.755),
    _pvt("b4", 81.90, 45.666, 9.884),
    code="ziplab/EcoFormer",
)
