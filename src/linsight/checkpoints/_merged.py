"""Weights of models that were merged for inference: what is one convolution there has branches here."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .keys import Rules, to_published


def unmerge(
    model: nn.Module, tensors: Mapping[str, Tensor], rules: Iterable[Rules]
) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` with branches in the place of merged convolutions, by their published names, and a line on how many.

    A module that can be merged says by what names it is then, `MERGED`, and `unmerged` makes its state of those.
    """
    done, count = dict(tensors), 0
    for path, module in model.named_modules():
        merged = getattr(module, "MERGED", None)
        if merged is None:
            continue
        names = [to_published(f"{path}.{name}", torch.empty(()), rules)[0] for name in merged]
        if not all(name in done for name in names):
            continue
        state = module.unmerged(*(done.pop(name) for name in names))
        done |= {to_published(f"{path}.{name}", value, rules)[0]: value for name, value in state.items()}
        count += 1
    return done, [f"merged convolutions (branches made of them: {count})"] if count else []
