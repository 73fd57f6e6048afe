"""Weights of timm's own models, as their authors published them: timm renames those itself."""

import sys
from collections.abc import Mapping

from torch import Tensor, nn


def as_timm_has(model: nn.Module, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The `tensors` renamed by timm's filter for checkpoints of this model; None where that fits no better, or is none.

    own: the state of the model.
    """
    module = type(model).__module__
    rename = getattr(sys.modules.get(module), "checkpoint_filter_fn", None)
    if rename is None or not module.startswith("timm.models.") or own.keys() <= tensors.keys():
        return None
    try:
        found: dict[str, Tensor] = rename(dict(tensors), model)
    except Exception:  # of whatever kind: it was made for other keys, and what these lack is told by the loader
        return None
    return found if len(own.keys() & found.keys()) > len(own.keys() & tensors.keys()) else None
