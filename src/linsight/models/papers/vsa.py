"""VSA (arXiv 2204.08446) in Swin, in the place of windows and shifts.

Published are 82.24 % for Swin-T and 83.6 % for Swin-S on ImageNet-1K, but no parameters of theirs. The backbone of the
publication has a 7x7 convolution in front of each attention; whether its Swin has one is not told. These have none.
"""

from ..registry import add_variants
from ..rows import Variant

add_variants(
    Variant("vsa_swin_tiny", "swin_tiny", "vsa"),
    Variant("vsa_swin_small", "swin_small", "vsa"),
    code="ViTAE-Transformer/ViTAE-VSA",
)
