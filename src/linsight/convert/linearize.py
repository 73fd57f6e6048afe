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
from .seams import SEAMS, Part, Seam, check_causal, locate_images

Layers: TypeAlias = "int | str | Iterable[int | str] | Callable[[str], bool] | None"
Inherit: TypeAlias = Mapping[str, Literal["copy", "freeze", "skip"]]
_WAYS = ("copy", "freeze", "skip")
_ROLES = ("q", "k", "v", "out", "norm")
_SHOWN = 6  # names in a message


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """What became of one attention.

    new: parameters that the mechanism brought.  inherit: what was not simply copied, by its role.  hybrid: softmax that
    stayed beside it.
    """

    attention: str
    options: Mapping[str, Any]
    neutral: bool
    centred: bool
    inherit: Mapping[str, str]
    new: int
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
        hybrid: softmax that stays beside the mechanism, in a window or to be selected; none, if None.
        in_place: change `model` itself.
        options: of the mechanism.

    Raises:
        UnknownNameError: no such mechanism, option, or layer.
        CapabilityError: the model asks for something of its attention that the mechanism's formula does not define.
        LinsightError: the model has no attention that can be replaced, or one of those chosen cannot.
    """
    ways = _checked(inherit or {})
    found = attentions(model)
    chosen = choose(list(found), layers)
    if not in_place:
        model = copy.deepcopy(model)
        found = attentions(model)
    places: dict[nn.Module, Place] = {}
    made: dict[str, tuple[Seam, Mixing, Place]] = {}
    build: Callable[..., Mixing] = Mixing if hybrid is None else functools.partial(HybridMixing, hybrid=hybrid)
    for index, name in enumerate(chosen):
        module, seam = found[name]
        try:
            images = seam.images(model, name) if grid is None else None
            heads = seam.heads(module)
            weight = next(module.parameters())
            mixing = build(
                attention,
                heads.dim,
                heads.number,
                width=heads.width,
                scale=heads.scale,
                neutral=neutral,
                centred=centred,
                place={"grid": table_grid(grid), "query_grid": table_grid(grid), "index": index},
                device=weight.device,
                dtype=weight.dtype,
                **options,
            )
            check_causal(seam.causal(module), mixing)
            mixing.inherit = {role: way for role, way in ways.items() if role in seam.parts(module)}
        except UnknownNameError:
            raise
        except LinsightError as error:
            error.args = (f"{name}: {error}",)
            raise
        made[name] = seam, mixing, Place(grid or "1d", prefix) if images is None else Place()
        if images is not None:
            made[name] = seam, mixing, locate_images(images, places)
    _warn_of_dropout(attention, (found[name][0] for name in chosen))
    for seam in {id(seam): seam for seam, *_ in made.values()}.values():
        seam.prepare(model)
    for name, (seam, mixing, place) in made.items():
        module = found[name][0]
        for role, way in mixing.inherit.items():
            for part in seam.parts(module)[role]:
                _inherit(module, part, role, way)
        seam.put(model, name, mixing, place)
    return model


def attentions(model: nn.Module) -> dict[str, tuple[nn.Module, Seam]]:
    """The attentions of a model that have a seam, by name, with that.

    Raises:
        LinsightError: there is none; classes whose name has "attention" in it are told.
    """
    found: dict[str, tuple[nn.Module, Seam]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or isinstance(module, Mixing):
            continue
        seam = next((seam for seam in SEAMS if seam.knows(module)), None)
        if name and seam is not None:
            found[name] = module, seam
    if not found:
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
    """What became of the attentions of a model, by name; those that kept their softmax are not there."""
    return {
        name: ConvertedLayer(
            mixing.attention,
            mixing.options,
            mixing.neutral,
            mixing.centred,
            mixing.inherit,
            sum(parameter.numel() for parameter in mixing.parameters()),
            mixing.hybrid if isinstance(mixing, HybridMixing) else None,
        )
        for name, mixing in mixings(model).items()
    }


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that mechanisms brought to a converted model, by name."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Mixing))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}


def _checked(inherit: Inherit) -> dict[str, str]:
    for role, way in inherit.items():
        if role not in _ROLES:
            raise UnknownNameError("part of an attention in inherit", role, _ROLES)
        if way not in _WAYS:
            raise UnknownNameError(f"way to inherit {role}", str(way), _WAYS)
    return {role: way for role, way in inherit.items() if way != "copy"}


def _inherit(module: nn.Module, part: Part, role: str, way: str) -> None:
    """Freeze a part, or draw it anew.

    Raises:
        LinsightError: rows of a tensor are to be frozen alone.
    """
    tensor = module.get_parameter(part.tensor)
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


def _warn_of_dropout(attention: str, modules: Iterable[nn.Module]) -> None:
    rates = {rate for module in modules for rate in _dropout(module) if rate}
    if rates and attention != "softmax":
        warnings.warn(
            f"attention dropout ({', '.join(map(str, sorted(rates)))}) is gone: '{attention}' is given no scores to "
            f"drop",
            stacklevel=3,
        )


def _dropout(module: Any) -> Iterable[float]:
    if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
        yield module.attn_drop.p
