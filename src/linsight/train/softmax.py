"""Models of timm by their names, with the weights that timm has for them: "timm/NAME"."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from linsight.attention import Attention
from linsight.checkpoints import LoadReport, load_published
from linsight.errors import CheckpointError, UnknownNameError
from linsight.models.timm.fetch import create_fetched

PREFIX = "timm/"


def is_timm(source: str) -> bool:
    """True for "timm/NAME", unless a file or folder here is called so."""
    return source.startswith(PREFIX) and not pathlib.Path(source).exists()


def told(source: str) -> dict[str, Any]:
    """The fields of a recipe that the name tells: the model, and how images are prepared for it. Nothing is fetched.

    Raises:
        LinsightError: timm has no such model, or not with this tag.
    """
    name = _name(source)
    try:
        cfg = get_pretrained_cfg(name)
    except (RuntimeError, ValueError):  # fetching tells which tags there are
        cfg = None
    found: Mapping[str, Any] = cfg.to_dict() if cfg else {}
    return {"model": name} | {
        field: found[key]
        for field, key in (
            ("mean", "mean"),
            ("std", "std"),
            ("interpolation", "interpolation"),
            ("crop_pct", "crop_pct"),
            ("eval_crop", "crop_mode"),
        )
        if found.get(key) is not None
    }


def create_timm(source: str) -> nn.Module:
    """The model of timm that "timm/NAME" or "NAME" is, as timm makes it, with its weights.

    Raises:
        LinsightError: timm has no such model, or its weights cannot be had.
    """
    return create_fetched(_name(source), pretrained=True)


def start_from_timm(
    model: nn.Module, source: str, *, partial: bool, head: bool, from_size: tuple[int, int] | None
) -> LoadReport:
    """Fill a model of linsight from the softmax model "timm/NAME" of its host.

    The mechanism keeps as initialised what softmax attention lacks. partial: so does all else that does not fit.

    Raises:
        CheckpointError: `partial` is not asked for, and they differ outside of their attention, the classifier aside.
        LinsightError: see `create_timm`.
    """
    softmax: Any = create_timm(source)
    head = head and softmax.num_classes == getattr(model, "num_classes", None)
    size = from_size or tuple(softmax.pretrained_cfg["input_size"][-2:])
    try:
        report = load_published(model, softmax.state_dict(), strict=False, head=head, from_size=size)
    except CheckpointError as error:
        raise CheckpointError(f"the weights of '{source}': {error}") from error
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Attention))
    odd = [row for row in report.mismatched if not row.key.startswith(layers)]
    if odd and not partial:
        raise CheckpointError(
            f"'{source}' is of another host: {len(odd)} tensors differ outside of the attention, as {odd[0].key} "
            f"({odd[0].problem}); init_partial takes over what fits"
        )
    return dataclasses.replace(report, source=source)


def is_known(name: str) -> bool:
    """True for a name of a model that timm can make, with or without the tag of its weights."""
    return is_model(name.partition(".")[0])


def _name(source: str) -> str:
    name = source.removeprefix(PREFIX)
    if not is_known(name):
        raise UnknownNameError("model of timm", name, list_models())
    return name
