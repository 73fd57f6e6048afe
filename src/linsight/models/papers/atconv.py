"""AttNet (arXiv 2510.20092): attentive convolution in its own host.

The settings of the published runs are not in the repository. The accuracy of T2 is that of the abstract; figures beside
it are counted here.
"""

from ..registry import add_variants
from ..rows import Variant, figures

add_variants(
    *(
        Variant(f"attnet_{size}", f"attnet_pyramid_{size}", "atconv", published=figures(top1, params, gmacs))
        for size, top1, params, gmacs in (
            ("xxs", None, 2.854, 0.535),
            ("xs", None, 5.555, 1.010),
            ("s", None, 7.681, 1.335),
            ("t1", None, 13.715, 2.431),
            ("t2", 84.4, 27.011, 5.106),
            ("t3", None, 49.176, 9.410),
            ("t4", None, 87.320, 16.766),
        )
    ),
    code="price112/Attentive-Convolution",
)
