"""Bounds of models that a file describes, which anyone may have written: they are counted before they are made."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from linsight.errors import LinsightError
from linsight.runtime.memory import free_memory

MODULES = 20_000  # the largest models of timm have some thousands
_SPARE = 10**8  # values that a model may have beyond those in its file, as for more classes or larger images
_ACTIVE = threading.local()


def require_bounded(
    name: str, make: Callable[[], Any], weights: Path | None = None, *, told: str = "as its file describes it"
) -> None:
    """Raise unless the model that `make` gives is of a size that can be meant. It is made without memory.

    weights: the file that it is to be filled from, whose size tells its own; None: it is to fit into memory.
    told: who says what size it is.

    Raises:
        LinsightError: it has too many modules or values.
    """
    if getattr(_ACTIVE, "counts", False):
        return
    if weights is None:
        free = free_memory()
        most, reason = free.bytes / 4, f"of which the memory has room for {free.bytes / 4:.3g}"
    else:
        size = weights.stat().st_size
        most, reason = size + _SPARE, f"and its weights are a file of {size} bytes"
    try:
        with torch.device("meta"), _counted(f"'{name}' {told}", most, reason):
            make()
    except LinsightError:
        raise
    except Exception:
        pass


@contextlib.contextmanager
def _counted(name: str, most: float, reason: str) -> Iterator[None]:
    modules = values = 0

    def add_module(*given: Any) -> None:
        nonlocal modules
        modules += _counts()
        if modules > MODULES:
            raise LinsightError(f"{name} has more than {MODULES} modules: it is not made")

    def add_tensor(module: nn.Module, key: str, tensor: Tensor | None) -> None:
        nonlocal values
        values += tensor.numel() * _counts() if isinstance(tensor, Tensor) else 0
        if values > most:
            raise LinsightError(f"{name} has {values:.3g} values or more, {reason}")

    handles = (
        register_module_module_registration_hook(add_module),
        register_module_parameter_registration_hook(add_tensor),
        register_module_buffer_registration_hook(add_tensor),
    )
    _ACTIVE.counts = True
    try:
        yield
    finally:
        _ACTIVE.counts = False
        for handle in handles:
            handle.remove()


def _counts() -> bool:
    """True in the thread that counts: the hooks are those of all."""
    return getattr(_ACTIVE, "counts", False)
