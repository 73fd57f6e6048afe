"""Memory and work grow with N as declared: counted, not timed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linsight.attention import Cost
from linsight.ops import Grid

from .subject import Subject


class Elements(TorchDispatchMode):
    """Counts the elements that operators write: the most of any one tensor, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
                self.written += leaf.numel()
        return out


def linear_memory_and_work(subject: Subject) -> None:
    """Twice the tokens: at most a little over twice the largest tensor, writes and multiplications.

    Of a mechanism that goes by whole rows and columns, four times the tokens: at most eight times.
    """
    if "N^2" in subject.entry.complexity:
        pytest.skip(f"{subject.name} declares {subject.entry.complexity}")
    layer = subject.layer(32, 4)
    largest, written, flops = [], [], []
    # N log N gives 2.2; blocks of windows at a rim are computed apart, and the others more than double
    grids, most = (Grid(64, 64), Grid(64, 128)), 2.4
    if subject.entry.structure.cost is Cost.N_ROOT_N:
        grids, most = (Grid(16, 16), Grid(32, 32)), 8.0
    for grid in grids:
        x = torch.randn(1, grid.tokens, 32, requires_grad=True)
        with Elements() as elements, FlopCounterMode(display=False) as counter:
            layer(x, grid).sum().backward()
        largest.append(elements.largest)
        written.append(elements.written)
        flops.append(counter.get_total_flops())
    for counts in (largest, written, flops):
        assert counts[1] <= most * counts[0]
    assert largest[0] < grids[0].tokens ** 2
