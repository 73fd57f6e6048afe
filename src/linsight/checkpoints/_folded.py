"""Weights that a checkpoint holds in parts: pruned, normed, or with adapters. Read as what they are, or refused."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from linsight.errors import CheckpointError

_PARAMETRIZED = re.compile(r"(?P<owner>.*?)parametrizations\.(?P<name>\w+)\.(?P<part>.+)")
_PARTS = re.compile(r"(?P<owner>(?:.*\.)?)(?P<name>\w+?)_(?P<part>orig|mask|g|v|u)")
_QUANTISED = re.compile(r"(.*\.)?(_packed_params.*|qweight|qzeros|weight\.(absmax|quant_map)|SCB|weight_format)")


def refuse_adapters(keys: Collection[str], own: Collection[str], source: str) -> None:
    """Raise, naming the way out, for keys of adapters and of quantised weights that the model itself lacks."""
    lora = [key for key in keys if ".lora_" in f".{key}"]
    if lora and not any(".lora_" in f".{key}" for key in own):
        raise CheckpointError(
            f"{source} holds LoRA adapters ('{lora[0]}'), whose scale it does not tell: merge them in the model that "
            f"wrote it, as peft's merge_and_unload() does, and save that"
        )
    packed = next((key for key in keys if _QUANTISED.fullmatch(key)), None)
    if packed is not None and packed not in own:
        raise CheckpointError(
            f"{source} holds quantised weights ('{packed}'): save the state dict of the model before quantisation"
        )


def fold(tensors: Mapping[str, Tensor], own: Collection[str], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` with whole weights in the place of their parts, and a line for each kind that was folded.

    A model with such parts of its own gets them as they are.

    Raises:
        CheckpointError: the parts of a parametrization that is not known.
    """
    if any(_PARAMETRIZED.fullmatch(key) or key.endswith("_orig") for key in own):
        return dict(tensors), []
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        found = _PARAMETRIZED.fullmatch(key) or _PARTS.fullmatch(key)
        if found and key not in own:
            groups.setdefault(f"{found['owner']}{found['name']}", {})[found["part"]] = (key, tensor)
    done, counts = dict(tensors), dict[str, int]()
    for key, parts in groups.items():
        named = {part: tensor for part, (_, tensor) in parts.items()}
        folded = _folded(named)
        if folded is None:
            if any("parametrizations." in name for name, _ in parts.values()):
                raise CheckpointError(
                    f"{source} holds '{key}' in parts ({', '.join(sorted(named))}): make it whole in the model that "
                    f"wrote it, torch.nn.utils.parametrize.remove_parametrizations(module, "
                    f"'{key.rpartition('.')[2]}'), and save that"
                )
            continue  # names that only look like parts
        kind, whole = folded
        for name, _ in parts.values():
            del done[name]
        done[key] = whole
        counts[kind] = counts.get(kind, 0) + 1
    return done, [f"{kind} (weights made whole: {count})" for kind, count in counts.items()]


def _folded(parts: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """The kind of some parts and the weight that they make; None where they make none."""
    given = set(parts)
    if given == {"orig", "mask"} and parts["orig"].shape == parts["mask"].shape:
        return "pruned by their masks", parts["orig"] * parts["mask"].to(parts["orig"].dtype)
    for length, direction in (("g", "v"), ("original0", "original1")):
        if given == {length, direction} and _lengths_of(parts[length], parts[direction]):
            return "weight norm", _weight_norm(parts[length], parts[direction])
    for weight, left, right in (("orig", "u", "v"), ("original", "0._u", "0._v")):
        if given == {weight, left, right} and parts[left].ndim == parts[right].ndim == 1:
            matrix = parts[weight].flatten(1) if parts[weight].ndim > 1 else parts[weight][None]
            if matrix.shape == (len(parts[left]), len(parts[right])):
                sigma = parts[left].double() @ matrix.double() @ parts[right].double()
                return "spectral norm", (parts[weight].double() / sigma).to(parts[weight].dtype)
    return None


def _lengths_of(length: Tensor, direction: Tensor) -> bool:
    """True where `length` may hold the norms of the slices of `direction`, along one axis or in all."""
    if not length.ndim:
        return True
    pairs = list(zip(length.shape, direction.shape, strict=False))
    return length.ndim == direction.ndim and all(one in (1, all_) for one, all_ in pairs)


def _weight_norm(length: Tensor, direction: Tensor) -> Tensor:
    axes = [i for i, n in enumerate(length.shape) if n == 1] if length.ndim else list(range(direction.ndim))
    norm = torch.linalg.vector_norm(direction.double(), dim=axes, keepdim=True)
    return (direction * (length / norm)).to(direction.dtype)
