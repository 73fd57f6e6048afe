"""SiameseNorm: two residual streams that share every branch, one normed after it is added to, one before it is read.

"SiameseNorm: Breaking the Barrier to Reconciling Pre/Post-Norm", ICML 2026 (arXiv 2602.08064). A host's
block keeps its branches (attention, MLP) and reads and writes the streams through a `Junction` for each; the
tensor that two streams stand for is their `Merge`. Nothing here knows what is in a branch: an adaptive norm and
a gate are the branch's own.

The published code keeps both streams in the model's dtype. Here y is float32 in a model of half precision
(under autocast it always is): it sums the branches of all blocks, so rounding would add up, while x is normed
behind every add, so it does not.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from linsight.ops import accumulator


class Pair(NamedTuple):
    """Two residual streams `(B, N, C)`. x: normed at each entrance, as Post-Norm; y: only added to, as Pre-Norm."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Pair":
        """Both streams start as the same tokens."""
        return cls(x, x.to(accumulator(x.dtype)))


class Junction(nn.Module):
    """Where one branch of the block `index`, from 0, meets the streams; the same for each of its branches.

    x <- norm_x(x);  r = branch(x + norm_y(y));  x <- x + r / sqrt(2 (index + 1));  y <- y + r
    """

    def __init__(self, norm_x: nn.Module, norm_y: nn.Module, index: int) -> None:
        super().__init__()
        self.norm_x, self.norm_y = norm_x, norm_y
        self.scale = math.sqrt(2 * (index + 1))

    def forward(self, pair: Pair, branch: Callable[[Tensor], Tensor]) -> Pair:
        """`branch` is given `(B, N, C)` and returns what is added, to both streams."""
        x = self.norm_x(pair.x)
        added = branch(x + self.norm_y(pair.y.to(x.dtype)))
        return Pair(x + added / self.scale, pair.y + added)


class Merge(nn.Module):
    """The tensor that two streams stand for, at the end or between blocks: norm_x(x) + norm_y(y)."""

    def __init__(self, norm_x: nn.Module, norm_y: nn.Module) -> None:
        super().__init__()
        self.norm_x, self.norm_y = norm_x, norm_y

    def forward(self, pair: Pair) -> Tensor:
        """Streams of `(B, N, C)` -> `(B, N, C)`."""
        x = self.norm_x(pair.x)
        return x + self.norm_y(pair.y.to(x.dtype))
