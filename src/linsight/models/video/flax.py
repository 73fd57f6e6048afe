"""Weights of flax, as TRecViT's are released, by our layout."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linsight.errors import CheckpointError

_NORMS = ("LayerNorm", "encoder_norm")
_PROJECTED = ("query", "key", "value")


def from_flax(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays by paths of flax, of a `.npz` file or a dict, as a state dict that `load_published` reads.

    Paths are joined by dots. Kernels of dense layers are transposed, those of convolutions have their two channels
    first, and heads of attention are merged; scales of LayerNorm are weights. All else is as it is.

    Raises:
        CheckpointError: the file cannot be read, or a kernel has a number of axes that no layer here has.
    """
    if isinstance(source, Mapping):
        return dict(_entry(path, np.asarray(array)) for path, array in source.items())
    try:
        with np.load(source, allow_pickle=False) as arrays:
            return dict(_entry(path, arrays[path]) for path in arrays.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{source} cannot be read as arrays of NumPy: {error}") from error


def _entry(path: str, array: Any) -> tuple[str, Tensor]:
    *inner, name = path.strip("/").replace("/", ".").split(".")
    owner = inner[-1] if inner else ""
    if name == "kernel":
        array, name = _kernel(path, owner, array), "weight"
    elif name == "bias" and owner in _PROJECTED:
        array = array.reshape(-1)
    elif name == "scale" and owner.startswith(_NORMS):
        name = "weight"
    return ".".join([*inner, name]), torch.from_numpy(np.array(array))


def _kernel(path: str, owner: str, array: Any) -> Any:
    if array.ndim == 5:  # (t, h, w, in, out)
        return array.transpose(4, 3, 0, 1, 2)
    if array.ndim == 3 and owner in _PROJECTED:  # (C, H, d)
        return array.reshape(array.shape[0], -1).T
    if array.ndim == 3 and owner == "out":  # (H, d, C)
        return array.reshape(-1, array.shape[2]).T
    if array.ndim == 2:
        return array.T
    raise CheckpointError(f"'{path}' is a kernel of shape {array.shape}, which is of no layer that is known here")
