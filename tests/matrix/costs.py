"""Memory and work grow with N as declared: counted, not timed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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
    """Twice the tokens: at most a little over twice the largest tensor, writes and multiplications."""
    if "N^2" in subject.entry.complexity:
        pytest.skip(f"{subject.name} declares {subject.entry.complexity}")
    layer = subject.layer(32, 4)
    largest, written, flops = [], [], []
    for grid in (Grid(32, 32), Grid(32, 64)):
        x = torch.randn(1, grid.tokens, 32, requires_grad=True)
        with Elements() as elements, FlopCounterMode(display=False) as counter:
            layer(x, grid).sum().backward()
        largest.append(elements.largest)
        written.append(elements.written)
        flops.append(counter.get_total_flops())
    for counts in (largest, written, flops):
        assert counts[1] <= 2.3 * counts[0]  # N log N gives 2.2
    assert largest[0] < 1024 * 1024
