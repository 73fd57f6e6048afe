"""Randomness in training: whole branches are dropped alike on all ranks; what cannot be alike is refused."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from linsight.errors import CapabilityError

from ._ranks import Ranks


def same_draws(module: nn.Module, ranks: Ranks, device: torch.device) -> AbstractContextManager[None]:
    """A context in which all ranks draw the same numbers, where `module` drops branches.

    Raises:
        CapabilityError: a part of it, in training, would have to see or draw for tokens of other ranks.
    """
    paths = False
    for part in module.modules():
        if not part.training:
            continue
        if isinstance(part, _BatchNorm):
            raise CapabilityError(
                "batch norm in training needs the statistics of whole maps: call .eval() on the batch norms of a "
                "split model, or use a host without them"
            )
        if isinstance(part, _DropoutNd) and part.p:
            raise CapabilityError(
                "dropout draws for each token, and ranks share some of them: a split model drops paths, "
                "drop_path_rate=, and nothing else"
            )
        paths |= isinstance(part, DropPath) and part.drop_prob > 0
    return _seeded(ranks, device) if paths else nullcontext()


@contextmanager
def _seeded(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The generators start from a number that the first rank draws, and go on afterwards where they were."""
    drawn = torch.randint(2**62, (1,)).to(device)
    seed = int(ranks.gather(drawn)[0])
    if device.type == "cpu":
        forked = torch.random.fork_rng(devices=())
    else:
        forked = torch.random.fork_rng(devices=(device,), device_type=device.type)
    with forked:
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            own: Any = torch.get_device_module(device)
            with own.device(device):
                own.manual_seed(seed)
        yield
