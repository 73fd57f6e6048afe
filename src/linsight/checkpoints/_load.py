"""`load_published` and `export_published`: a model or a layer, and the keys and shapes that it was published in."""

import dataclasses
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Attention
from linsight.attention.on_grid import GRIDS
from linsight.errors import CheckpointError
from linsight.fuse import is_fused
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS
from linsight.runtime.files import replacing, to_json

from ._fit import fit
from ._folded import fold, refuse_adapters
from ._grids import Grids, Made, check_sides
from ._merged import unmerge
from ._projections import Entry, published_projections, regroup
from ._timm import as_timm_has
from .guess import describe
from .keys import copies, key_map, to_published
from .read import read
from .report import LoadReport, shortened, table
from .unwrap import beneath, clean_state, in_lists, shared_prefix, unwrap, unwrapped_key

_LOG = logging.getLogger(__name__)


def load_published(
    model: nn.Module,
    source: str | Path | Mapping[str, object],
    *,
    strict: bool = True,
    head: bool = True,
    resize: bool = True,
    ema: bool | None = None,
    from_size: int | tuple[int, int] | None = None,
    from_grid: int | tuple[int, int] | None = None,
) -> LoadReport:
    """Fill a model, or a single layer, from a published checkpoint. All is checked before anything is copied.

    Position tables are resampled from the grid that they were made for, which the number of their rows does not tell.
    Files of linsight and of most training scripts record it; published models are for square images. Where nothing
    tells it, `from_size` or `from_grid` does.

    Args:
        model: a model or layer of linsight, or any module whose keys match; wrapped ones (compiled, DDP) too. Of a
            segmenter, a file of another library fills the backbone. Models of timm take what timm renames for them.
        source: a file (safetensors, or PyTorch's), an http(s) address (kept in PyTorch's hub folder), or a
            state dict; ours too. Pickled code is never run.
        strict: raise unless everything matches. Otherwise load what does, and report the rest.
        head: load the classifier; False leaves the model's as it is.
        resize: resample position tables to the model's grid.
        ema: the averaged weights (True) or the trained ones (False); None for what was published as the
            variant's result, which is the trained ones unless it says otherwise.
        from_size: height and width of the images that the weights were made for, or the side of square ones.
        from_grid: the same in tokens of the first grid, or of that of a layer.

    Raises:
        CheckpointError: the source cannot be read safely, or does not fit the model.
    """
    size, grid = check_sides("from_size", from_size), check_sides("from_grid", from_grid)
    if size and grid:
        raise CheckpointError(f"from_size={from_size} and from_grid={from_grid} say the same: pass one of them")
    if not isinstance(source, str | Path | Mapping):
        raise CheckpointError(f"'{type(source).__name__}' is no source: pass a path, an address or a state dict")
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read(source)
    found = unwrap(content, name, ema=ema, prefer_ema=_prefers_ema(model))
    inner = _unfused(model)
    own = clean_state(inner)
    by_timm = as_timm_has(inner, found.tensors, own)
    found = found if by_timm is None else found._replace(tensors=by_timm)
    part = getattr(inner, "published_part", "")
    beyond = [key for key in own if not key.startswith(f"{part}.")] if part else []
    if part and not found.tensors.keys() & set(beyond):
        asked = {"head": head, "resize": resize, "ema": ema, "from_size": from_size, "from_grid": from_grid}
        report = load_published(inner.get_submodule(part), content, strict=strict, **asked)  # type: ignore[arg-type]
        return _of_part(report, name, inner, part, beyond)
    if any(tensor.is_meta for tensor in own.values()):
        raise CheckpointError("the model is on the meta device: give it memory first, model.to_empty(device='cpu')")
    rules = key_map(inner)
    known = {*own, *(to_published(key, own[key], rules)[0] for key in own)}
    known |= {to_published(key, torch.empty(()), rules)[0] for key in copies(inner)}
    found, beside = beneath(in_lists(found, inner), known, name)
    refuse_adapters([*found.tensors, *found.others], own, name)
    tensors, folded = fold(found.tensors, own, name)
    tensors, unmerged = unmerge(inner, tensors, rules)
    made = Made(found.tables, found.size, size, grid)
    pruned = any(isinstance(module, FeatureGetterNet | FeatureDictNet) for module in model.modules())
    fitted = fit(inner, tensors, head=head, resize=resize, pruned=pruned, made=made)
    if fitted.problems and (strict or not fitted.ready):
        summary = describe(inner, tensors, fitted, made)
        raise CheckpointError(f"{name} does not fit the model: {summary}\n{table(fitted.problems)}")
    infinite = _infinite(fitted.ready)
    if infinite:
        _LOG.warning("%s has values that are nan or infinite: %s", name, shortened(infinite, ", "))
    names = {unwrapped_key(key): key for key in inner.state_dict()}
    inner.load_state_dict({names[key]: tensor for key, tensor in fitted.ready.items()}, strict=False)
    for module in inner.modules():  # fill what `to_empty` left without values, by timm's convention
        rebuild = getattr(module, "init_non_persistent_buffers", None)
        if rebuild is not None:
            rebuild()
    return LoadReport(
        source=name,
        wrapper=found.wrapper,
        loaded=tuple(fitted.ready),
        resized=tuple(fitted.resized),
        dropped=(
            *fitted.dropped,
            *(f"{key} (beside the model)" for key in beside),
            *(f"{key} (not a tensor)" for key in found.others),
        ),
        kept=tuple(fitted.kept),
        mismatched=tuple(fitted.problems),
        adapted=(*(() if by_timm is None else ("keys, by timm",)), *folded, *unmerged, *fitted.adapted),
        converted=_converted(fitted.ready, own),
        infinite=infinite,
    )


def _of_part(report: LoadReport, source: str, model: nn.Module, part: str, beyond: list[str]) -> LoadReport:
    """A report on the module `part` of a model, by the keys of the model, which has those `beyond` it, too."""
    prefix = f"{part}.{shared_prefix(model.get_submodule(part).state_dict())}"
    loaded, kept = ([prefix + key for key in keys] for keys in (report.loaded, report.kept))
    return dataclasses.replace(report, source=source, loaded=tuple(loaded), kept=(*kept, *beyond))


def load_pretrained(model: nn.Module, source: str | Path | Mapping[str, object], *, head: bool = True) -> LoadReport:
    """Fill a model that `create_model` was asked for with `pretrained=True`: errors name it.

    Of weights that timm saved with a model, its arguments tell the size of images: timm leaves them on the new model.
    """
    cfg: Any = getattr(_inner(model), "pretrained_cfg", None) or {}
    saved: Any = getattr(_inner(model), "pretrained_model_args", None) or {}
    size = saved and (saved.get("img_size") or cfg.get("input_size", (None,))[-2:])
    try:
        return load_published(model, source, head=head, from_size=size or None)
    except CheckpointError as error:
        name = cfg.get("architecture", type(model).__name__)
        raise CheckpointError(f"the weights of '{name}': {error}") from error


def export_published(model: nn.Module, path: str | Path | None = None) -> dict[str, Tensor]:
    """A copy of the state of a model, or of a single layer, under its published keys and in their shapes.

    It tells the grids of its tables in its metadata, which `torch.save` keeps and `load_published` reads.

    path: where to write it too, a file of safetensors, which tells them as well.

    Raises:
        CheckpointError: the model is fused, or copies of what is one tensor as published differ.
    """
    inner = _unfused(model)
    own = clean_state(inner)
    entries = {key: Entry(key, tensor) for key, tensor in own.items()}
    for name, layer in inner.named_modules():
        if isinstance(layer, Attention):
            prefix = unwrapped_key(f"{name}.") if name else ""
            regroup(entries, prefix, published_projections(layer), layer.num_heads)
    rules, grids = key_map(inner), Grids(inner, Made())
    state: OrderedDict[str, Tensor] = OrderedDict()
    tables = {}
    once = {key: one for one, keys in copies(inner).items() for key in keys}
    for key, entry in entries.items():
        published, tensor = to_published(once.get(key, key), entry.tensor, rules)
        if key in once and published in state and not torch.equal(state[published], tensor):
            raise CheckpointError(
                f"'{published}' is one tensor as published, but '{key}' is another than that before it"
            )
        state[published] = tensor.detach().clone()
        if key in own and (grid := grids.own(key)):
            tables[published] = grid
    state._metadata = {"": {"version": 1, GRIDS: tables}}  # type: ignore[attr-defined]
    if path is not None:
        about = {"format": "pt", "linsight": to_json({GRIDS: tables})}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(to_bytes({key: tensor.contiguous() for key, tensor in state.items()}, about))
    return state


def _infinite(ready: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors that hold values that are nan or infinite, and how many."""
    counts = {key: int((~t.isfinite()).sum()) for key, t in ready.items() if t.is_floating_point()}
    return tuple(f"{key} ({count} of {ready[key].numel()})" for key, count in counts.items() if count)


def _converted(ready: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """How many tensors are of another precision than those of the model."""
    pairs = Counter((t.dtype, own[key].dtype) for key, t in ready.items() if t.dtype != own[key].dtype)
    return tuple(f"{count} tensors from {old} to {new}".replace("torch.", "") for (old, new), count in pairs.items())


def _inner(model: nn.Module) -> nn.Module:
    """The module itself, without DDP, torch.compile or timm's feature wrapper around it."""
    prefix = shared_prefix(model.state_dict())
    return model.get_submodule(prefix.rstrip(".")) if prefix else model


def _unfused(model: nn.Module) -> nn.Module:
    if is_fused(model):
        raise CheckpointError("the model is fused, its weights folded: load and export the one that it was made of")
    return _inner(model)


def _prefers_ema(model: nn.Module) -> bool:
    name = (getattr(_inner(model), "pretrained_cfg", None) or {}).get("architecture", "")
    known = VARIANTS.get(name) or HOSTS.get(name) or ARCHITECTURES.get(name)
    return bool(known and known.published.get("ema", False))
