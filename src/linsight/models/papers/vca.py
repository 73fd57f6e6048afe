"""Visual-contrast attention (arXiv 2511.00833) in DeiT.

Unofficial: made from what was published without code or weights. Top-1 is the paper's; parameters and operations are
those of this definition, which the paper rounds to 6.0 M, 1.2 G and 22.6 M, 4.6 G. Of its other hosts, PVT, Swin
and CSwin, the number of contrast tokens of each stage is not known, so they are left out; the mechanism works in all.
"""

from ..registry import add_variants
from ..rows import Variant, figures, trained

_TRAINING = trained("deit", 128, 0.1, note="as its softmax baseline, details not published, so by DeiT's recipe")

add_variants(
    Variant("vca_deit_tiny", "vit_tiny", "vca", published=figures(75.6, 5.974, 1.26), training=(_TRAINING,)),
    Variant("vca_deit_small", "vit_small", "vca", published=figures(80.7, 22.556, 4.61), training=(_TRAINING,)),
    code="LeapLabTHU/LinearDiff",
)
