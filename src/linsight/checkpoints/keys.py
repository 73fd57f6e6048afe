"""Two-way key maps, collected from the modules of a model.

Any module may declare `published`, a tuple of `Rename`: a host for its stages, a block for what it
owns, a mechanism (on its Core, or on its own Layer) for the layer. Rules are relative to their
module, and the outer ones come first, so a host's rules lead to the names that the layers published.

One may also declare `in_copies`: keys of tensors that it has once as published, and here once in each
of several parts, whose keys have {} for the number of the part.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from linsight.attention import Attention, Core, Rename
from linsight.models import published_keys

from .unwrap import unwrapped_key

# Not the mechanism's but the layer's own: PVT's spatial reduction.
REDUCTION = (Rename("sr.", "reduction.sr."), Rename("norm.", "reduction.norm."))
# Published buffers that follow from shapes alone, and counters that no result depends on; models have their own.
CONSTANTS = ("relative_position_index", "relative_coords_table", "attn_mask", "rotations", "num_batches_tracked")


class Rules(NamedTuple):
    """The rules of one module, whose keys start with `prefix`."""

    prefix: str
    renames: tuple[Rename, ...]

    def ours(self, key: str) -> str:
        """One step from a published key to ours."""
        rest = key.removeprefix(self.prefix)
        rule = longest(self.renames, rest, 0) if key.startswith(self.prefix) else None
        return self.prefix + rule.ours + rest[len(rule.published) :] if rule else key

    def published(self, key: str) -> tuple[str, int]:
        """One step back, and the trailing axes of size 1 that a weight has there."""
        rest = key.removeprefix(self.prefix)
        rule = longest(self.renames, rest, 1) if key.startswith(self.prefix) else None
        return (self.prefix + rule.published + rest[len(rule.ours) :], rule.ones) if rule else (key, 0)


def longest(renames: Iterable[Rename], key: str, side: int) -> Rename | None:
    """The most specific rule for `key`; of equals, the first."""
    fitting = [rule for rule in renames if key.startswith(rule[side])]  # type: ignore[arg-type]
    return max(fitting, key=lambda rule: len(rule[side]), default=None)  # type: ignore[arg-type]


def key_map(model: nn.Module) -> list[Rules]:
    """The rules of `model`, outermost first."""
    found = []
    inside = {id(getattr(module, "core", None)) for module in model.modules()}
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules:  # torch.compile's, which tells the rules of what it holds
            continue
        prefix = unwrapped_key(f"{path}.") if path else ""
        renames = published_keys(module)
        core = getattr(module, "core", None)
        if isinstance(core, Core):  # its rules are those of what it stands in
            renames += core.published
            if isinstance(module, Attention) and module.reduction is not None:
                renames += REDUCTION
        elif isinstance(module, Core):
            if id(module) in inside:
                continue
            renames = tuple(
                r._replace(ours=r.ours.removeprefix("core.")) for r in renames if r.ours.startswith("core.")
            )
        if renames:
            found.append(Rules(prefix, renames))
    return found


def to_ours(key: str, rules: Iterable[Rules]) -> str:
    """Our name for a published key."""
    for step in rules:
        key = step.ours(key)
    return key


def to_published(key: str, tensor: Tensor, rules: Iterable[Rules]) -> tuple[str, Tensor]:
    """The published name of one of our keys, and the tensor in its published shape."""
    axes = 0
    for step in reversed(list(rules)):
        key, ones = step.published(key)
        axes = ones or axes
    if axes > 0 and tensor.ndim > 1:
        tensor = tensor[(..., *[None] * axes)]
    return key, tensor


def copies(model: nn.Module) -> dict[str, list[str]]:
    """Keys of what is one tensor as published, by the rules, and the keys of its copies in `model`."""
    own = [unwrapped_key(key) for key in model.state_dict()]
    found = {}
    for path, module in model.named_modules():
        prefix = unwrapped_key(f"{path}.") if path else ""
        for one, pattern in getattr(module, "in_copies", {}).items():
            fitting = re.compile(r"\d+".join(map(re.escape, f"{prefix}{pattern}".split("{}"))))
            found[prefix + one] = [key for key in own if fitting.fullmatch(key)]
    return found


def is_constant(key: str) -> bool:
    """True where the key is that of a buffer that models rebuild."""
    return key.rpartition(".")[2] in CONSTANTS
