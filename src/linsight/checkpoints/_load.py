"""`load_published` and `export_published`: a model or a layer, and the keys and shapes that it was published in."""

from collections.abc import Mapping
from pathlib import Path

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Attention
from linsight.errors import CheckpointError
from linsight.fuse import is_fused
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS

from ._fit import Fitted, fit
from ._projections import Entry, published_projections, regroup
from .guess import describe
from .keys import key_map, to_published
from .read import read
from .report import LoadReport, table
from .unwrap import shared_prefix, unwrap


def load_published(
    model: nn.Module,
    source: str | Path | Mapping[str, object],
    *,
    strict: bool = True,
    head: bool = True,
    resize: bool = True,
    ema: bool | None = None,
) -> LoadReport:
    """Fill a model, or a single layer, from a published checkpoint. All is checked before anything is copied.

    Args:
        model: a model or layer of linsight, or any module whose keys match; wrapped ones (compiled, DDP) too.
        source: a file (safetensors, or PyTorch's), an http(s) address (kept in PyTorch's hub folder), or a
            state dict; ours too. Pickled code is never run.
        strict: raise unless everything matches. Otherwise load what does, and report the rest.
        head: load the classifier; False leaves the model's as it is.
        resize: resample position tables to the model's grid.
        ema: the averaged weights (True) or the trained ones (False); None for what was published as the
            variant's result, which is the trained ones unless it says otherwise.

    Raises:
        CheckpointError: the source cannot be read safely, or does not fit the model.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read(source)
    found = unwrap(content, name, ema=ema, prefer_ema=_prefers_ema(model))
    inner = _unfused(model)
    if any(tensor.is_meta for tensor in inner.state_dict().values()):
        raise CheckpointError("the model is on the meta device: give it memory first, model.to_empty(device='cpu')")
    pruned = any(isinstance(module, FeatureGetterNet) for module in model.modules())
    fitted = fit(inner, found.tensors, head=head, resize=resize, pruned=pruned)
    if fitted.problems and (strict or not fitted.ready):
        summary = describe(inner, found.tensors, fitted)
        raise CheckpointError(f"{name} does not fit the model: {summary}\n{table(fitted.problems)}")
    inner.load_state_dict(fitted.ready, strict=False)
    for module in inner.modules():  # fill what `to_empty` left without values, by timm's convention
        rebuild = getattr(module, "init_non_persistent_buffers", None)
        if rebuild is not None:
            rebuild()
    return _report(name, found.wrapper, found.others, fitted)


def export_published(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a model, or of a single layer, under its published keys and in their shapes."""
    inner = _unfused(model)
    entries = {key: Entry(key, tensor) for key, tensor in inner.state_dict().items()}
    for path, layer in inner.named_modules():
        if isinstance(layer, Attention):
            regroup(entries, f"{path}." if path else "", published_projections(layer))
    rules = key_map(inner)
    renamed = (to_published(key, entry.tensor, rules) for key, entry in entries.items())
    return {key: tensor.detach().clone() for key, tensor in renamed}


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


def _report(name: str, wrapper: str, others: tuple[str, ...], fitted: Fitted) -> LoadReport:
    return LoadReport(
        source=name,
        wrapper=wrapper,
        loaded=tuple(fitted.ready),
        resized=tuple(fitted.resized),
        dropped=(*fitted.dropped, *(f"{key} (not a tensor)" for key in others)),
        kept=tuple(fitted.kept),
        mismatched=tuple(fitted.problems),
    )
