"""Surgery: the one way by which a model that somebody else built is taken over, in place.

Modules are selected by class and name, replacements built, weights inherited; nothing is replaced until all of them are
built. What became of it is a `Report`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from linsight.errors import LinsightError

# Makes the replacement of a module; the number is its place among those that are replaced.
Build = Callable[[nn.Module, int], nn.Module]
SHOWN = 4  # names of a row of a report


@dataclasses.dataclass(frozen=True)
class Report:
    """The full names of the modules that were replaced, of the tensors inside that kept their values, and of the
    parameters that are fresh.
    """

    replaced: tuple[str, ...]
    inherited: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(_row(label, names) for label, names in dataclasses.asdict(self).items())


def _row(label: str, names: tuple[str, ...]) -> str:
    more = ", ..." if names[SHOWN:] else ""
    return f"{label}: {len(names)}" + (f" ({', '.join(names[:SHOWN])}{more})" if names else "")


def select(
    model: nn.Module,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
    where: Callable[[str], bool] | None = None,
) -> dict[str, nn.Module]:
    """The modules inside `model` of these classes, by name, where `where(name)` is true; none inside another of them.

    A module that the model uses twice is there under both names.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and isinstance(module, kinds) and not inside and (where is None or where(name)):
            found[name] = module
    return found


def replace(model: nn.Module, found: Mapping[str, nn.Module], build: Build, *, keep_weights: bool = True) -> Report:
    """Put what `build` makes in the place of each module of `found`, in the same mode; one for all names of a module.

    keep_weights: replacements inherit, see `inherit`.

    Raises:
        LinsightError: one cannot be replaced; its name is told. Nothing has been then.
    """
    made: dict[nn.Module, nn.Module] = {}
    inherited: list[str] = []
    fresh: list[str] = []
    for name, old in found.items():
        if old in made:
            continue
        try:
            new = build(old, len(made))
        except LinsightError as error:
            error.args = (f"{name}: {error}",)
            raise
        kept = inherit(new, old.state_dict()) if keep_weights else set()
        trained = {key: parameter.requires_grad for key, parameter in old.named_parameters()}
        for key, parameter in new.named_parameters():
            if key not in kept:
                fresh.append(f"{name}.{key}")
            elif key in trained:
                parameter.requires_grad_(trained[key])
        inherited += [f"{name}.{key}" for key in sorted(kept)]
        made[old] = new.train(old.training)
    for name, old in found.items():
        model.set_submodule(name, made[old])
    return Report(tuple(found), tuple(inherited), tuple(fresh))


def inherit(new: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Copy the weights whose name and shape `new` has; their names."""
    own = new.state_dict()
    kept = {key: tensor for key, tensor in weights.items() if key in own and own[key].shape == tensor.shape}
    new.load_state_dict(kept, strict=False)
    return set(kept)
