"""A mechanism's formula and its local terms, each alone: copies of a converted model that lack the other.

A local term, as the convolution of v in InLine or MLLA, can carry a model whose formula does little: then the accuracy
says nothing of the mechanism. Layers of a hybrid have `without` for their window.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Core

from .mixing import mixings


def terms_alone(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of a converted model in evaluation mode, with the same weights: "formula" and "local".

    In "formula" what mechanisms add locally is nothing. In "local" a core gives what that changes: its output less that
    of the formula for the same tokens. It is the local term where that is added to the output; those of queries and
    keys are seen by what they make of it.

    Returns:
        No copy where no mechanism of the model has local terms that it has learned.
    """
    formula, local = (copy.deepcopy(model).eval() for _ in range(2))
    changed = False
    for bare, whole in zip(mixings(formula).values(), mixings(local).values(), strict=True):
        bare.core.start_neutral()
        trained = whole.core.state_dict()
        changed |= any(not torch.equal(tensor, trained[key]) for key, tensor in bare.core.state_dict().items())
        whole.core.register_forward_hook(_less(bare.core), with_kwargs=True)
    return {"formula": formula, "local": local} if changed else {}


def _less(bare: Core) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Tensor) -> Tensor:
        # past `Core.__call__`, which turned q and k before: the rotary option turns them once
        return out - nn.Module.__call__(bare, *args, **named)

    return hook
