"""`linearize`: a trained softmax model whose attention becomes one of ours, and keeps its weights.

Nothing is trained here. What then brings the quality back is in `transfer` (layer by layer) and `recovery` (the whole
model); what was replaced by what is told by `converted_layers`.
"""

import copy
import dataclasses
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from linsight.errors import LinsightError, UnknownNameError

from ._place import GridLike, table_grid
from .hybrid import Hybrid, HybridMixing
from .mixing import Mixing, mixings
from .place import Place
from .seams import SEAMS, Images, Part, Seam, locate_images

Layers: TypeAlias = "int | str | Iterable[int | str] | Callable[[str], bool] | None"
Inherit: TypeAlias = Mapping[str, Literal["copy", "freeze", "skip"]]
_WAYS = ("copy", "freeze", "skip")
_ROLES = ("q", "k", "v", "out", "norm")
_SHOWN = 6  # names in a message


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """How an attention was converted.

    Args:
        attention, options: the mechanism and its options.
        index: the layer's place among those converted, from 0.
        neutral, centred: see `Mixing`.
        inherit: what was not simply copied, by its role.
        grid, prefix: where tokens lie, if it was said; else it is read from the model's images.
        hybrid: softmax that stayed beside the mechanism.
    """

    attention: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    index: int = 0
    neutral: bool = True
    centred: bool = False
    inherit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: GridLike | None = None
    prefix: int = 0
    hybrid: Hybrid | None = None


def linearize(
    model: nn.Module,
    attention: str = "hedgehog",
    *,
    layers: Layers = None,
    inherit: Inherit | None = None,
    grid: GridLike | None = None,
    prefix: int = 0,
    neutral: bool = True,
    centred: bool = False,
    hybrid: Hybrid | None = None,
    in_place: bool = False,
    **options: Any,
) -> nn.Module:
    """A copy of a trained model with the mechanism `attention` in the place of its softmax attention.

    Projections, norms of queries and keys, position embeddings and all else are those of the model. With "softmax" it
    computes the same as before.

    >>> teacher = timm.create_model("vit_tiny_patch16_224", pretrained=True)
    >>> student = linsight.linearize(teacher, "hedgehog")

    Args:
        model: of timm, transformers or diffusers, or of linsight.
        layers: which attentions: places among those found (from 0, or from the end below 0), names, patterns as
            "blocks.1?.*", or a function of the name. All, if None.
        inherit: for "q", "k", "v", "out" and "norm" whether weights are taken ("copy"), taken and held ("freeze"), or
            drawn anew ("skip"). What is not named is copied.
        grid, prefix: where tokens lie, as of `replace_attention`, for models that it cannot be read from.
        neutral, centred: see `Mixing`.
        hybrid: softmax that stays beside the mechanism.
        in_place: change `model` itself.
        options: of the mechanism.

    Raises:
        UnknownNameError: no such mechanism, option, or layer.
        CapabilityError: the model asks for something of its attention that the mechanism's formula does not define.
        LinsightError: the model has no attention that can be replaced, or one of those chosen cannot.
    """
    ways = _checked(inherit or {})
    chosen = choose(list(attentions(model)), layers)
    if not in_place:
        model = copy.deepcopy(model)
    convert(
        model,
        {
            name: ConvertedLayer(attention, options, index, neutral, centred, ways, grid, prefix, hybrid)
            for index, name in enumerate(chosen)
        },
    )
    return model


def convert(model: nn.Module, rows: Mapping[str, ConvertedLayer]) -> None:
    """Convert attentions of `model`, in place, each by its row. Nothing is changed unless all of them can be.

    Raises:
        LinsightError: see `linearize`.
    """
    found = attentions(model)
    places: dict[nn.Module, Place] = {}
    made: dict[str, tuple[Seam, Mixing, Images | None]] = {}
    for name, row in rows.items():
        if name not in found:
            raise UnknownNameError("attention layer", name, list(found))
        module, seam = found[name]
        try:
            made[name] = seam, _mixing(seam, module, row), seam.images(model, name) if row.grid is None else None
            seam.check(model, name, made[name][1])
        except UnknownNameError:
            raise
        except LinsightError as error:
            error.args = (f"{name}: {error}",)
            raise
    _warn_of_dropout({found[name][1].dropout(found[name][0]) for name, row in rows.items()})
    for seam in {id(seam): seam for seam, *_ in made.values()}.values():
        seam.prepare(model)
    for name, (seam, mixing, images) in made.items():
        module, row = found[name][0], rows[name]
        for role, way in row.inherit.items():
            for part in seam.parts(module).get(role, ()):
                _inherit(model, name, part, role, way)
        place = Place(row.grid or "1d", row.prefix) if images is None else locate_images(images, places)
        seam.put(model, name, mixing, place)


def _mixing(seam: Seam, module: nn.Module, row: ConvertedLayer) -> Mixing:
    heads, weight = seam.heads(module), next(module.parameters())
    if row.hybrid is not None and not seam.calls:
        raise LinsightError("layers of linsight hold one mechanism: a hybrid is for models of other libraries")
    build = Mixing if row.hybrid is None else functools.partial(HybridMixing, hybrid=row.hybrid)
    made = build(
        row.attention,
        heads.dim,
        heads.number,
        width=heads.width,
        scale=heads.scale,
        neutral=row.neutral,
        centred=row.centred,
        place={"grid": table_grid(row.grid), "query_grid": table_grid(row.grid), "index": row.index},
        device=weight.device,
        dtype=weight.dtype,
        **row.options,
    )
    made.row = row
    return made


def attentions(model: nn.Module) -> dict[str, tuple[nn.Module, Seam]]:
    """The attentions of a model that have a seam, by name, with that.

    Raises:
        LinsightError: there is none; classes whose name has "attention" in it are told.
    """
    if not isinstance(model, nn.Module):
        raise LinsightError(
            f"the model is a {type(model).__name__}, not a module: make it first, as by timm.create_model(NAME)"
        )
    found: dict[str, tuple[nn.Module, Seam]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or isinstance(module, Mixing):
            continue
        seam = next((seam for seam in SEAMS if seam.knows(module)), None)
        if name and seam is not None:
            found[name] = module, seam
    if not found:
        done = [mixing.row.attention for mixing in mixings(model).values() if mixing.row is not None]
        if done:
            names = ", ".join(dict.fromkeys(done))
            raise LinsightError(
                f"the {len(done)} attentions of this {type(model).__name__} are converted already, to {names}: convert "
                f"the softmax model that it was made of"
            )
        others = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        told = f"; it has {', '.join(others[:_SHOWN])}" if others else ", and nothing that is called so"
        libraries = ", ".join(dict.fromkeys(seam.library for seam in SEAMS))
        raise LinsightError(
            f"{type(model).__name__} has no softmax attention of {libraries} to take over{told}: models of your own "
            f"take a layer of linsight.create_attention"
        )
    return found


def choose(names: list[str], layers: Layers) -> list[str]:
    """The names that `layers` means, see `linearize`, in the order of the model.

    Raises:
        UnknownNameError: a name, or a pattern, that fits none.
        LinsightError: a place that there is not, or nothing at all is chosen.
    """
    if layers is None:
        return names
    if callable(layers):
        chosen = {name for name in names if layers(name)}
    else:
        chosen = set()
        for which in [layers] if isinstance(layers, int | str) else layers:
            if isinstance(which, str):
                fits = [name for name in names if fnmatch.fnmatchcase(name, which)]
                if not fits:
                    raise UnknownNameError("attention layer", which, names)
                chosen.update(fits)
            elif isinstance(which, int) and -len(names) <= which < len(names):
                chosen.add(names[which])
            else:
                raise LinsightError(f"layers has {which!r}: there are {len(names)} attentions, 0 to {len(names) - 1}")
    if not chosen:
        raise LinsightError(f"layers={layers!r} chooses none of the {len(names)} attentions: {', '.join(names[:3])}...")
    return [name for name in names if name in chosen]


def converted_layers(model: nn.Module) -> dict[str, ConvertedLayer]:
    """How the attentions of a model were converted, by name; those that kept their softmax are not there."""
    return {name: mixing.row for name, mixing in mixings(model).items()}


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that mechanisms brought to a converted model, by name."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Mixing))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}


def _checked(inherit: Inherit) -> dict[str, str]:
    if not isinstance(inherit, Mapping):
        raise LinsightError(f"inherit={inherit!r} must be a mapping of parts to ways, as {{'q': 'skip'}}")
    for role, way in inherit.items():
        if role not in _ROLES:
            raise UnknownNameError("part of an attention in inherit", role, _ROLES)
        if way not in _WAYS:
            raise UnknownNameError(f"way to inherit {role}", str(way), _WAYS)
    return {role: way for role, way in inherit.items() if way != "copy"}


def _inherit(model: nn.Module, name: str, part: Part, role: str, way: str) -> None:
    """Freeze a part, or draw it anew.

    Raises:
        LinsightError: rows of a tensor are to be frozen alone, or the tensor is not there.
    """
    for _ in range(part.above):
        name = name.rpartition(".")[0]
    try:
        tensor = model.get_submodule(name).get_parameter(part.tensor)
    except AttributeError:
        raise LinsightError(f"inherit: {role}='{way}', but {name or 'the model'} has no {part.tensor}") from None
    if way == "freeze":
        if part.rows is not None:
            raise LinsightError(
                f"inherit: {role}='freeze', but q, k and v are rows of one tensor, {part.tensor}: hold all three by "
                f"requires_grad_(False) of it, or take 'copy'"
            )
        tensor.requires_grad_(False)
        return
    with torch.no_grad():
        rows = tensor if part.rows is None else tensor[part.rows]
        if rows.ndim > 1:
            nn.init.trunc_normal_(rows, std=0.02)
        else:
            rows.fill_(float(role == "norm" and part.tensor.endswith("weight")))


def _warn_of_dropout(rates: set[float]) -> None:
    if rates - {0.0}:
        warnings.warn(
            f"attention dropout ({', '.join(map(str, sorted(rates - {0.0})))}) is gone: there are no scores to drop",
            stacklevel=4,
        )
