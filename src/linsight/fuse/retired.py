"""Names that `linsight.ops` had when plain forms were quick by themselves, for who still uses them."""

import torch
from torch import Tensor

from linsight.ops import MOVED, accumulator, autocasts

from .form import watched
from .inline import add_products

SMALL = 2**17


def unrecorded(compiled: bool = False) -> bool:
    """True where steps are only run, without gradients."""
    if torch.is_grad_enabled():
        return False
    return (compiled and not torch.compiler.is_exporting()) if torch.compiler.is_compiling() else True


def foldable(x: Tensor, weight: Tensor, compiled: bool = False) -> bool:
    """True where a linear step beside a convolution of `x` may be folded into its `weight`."""
    return unrecorded(compiled) and x.dtype == weight.dtype == accumulator(x.dtype) and not autocasts(x)


MOVED.update(SMALL=SMALL, add_products=add_products, foldable=foldable, unrecorded=unrecorded, watched=watched)
