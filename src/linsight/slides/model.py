"""A bag model from a file, and its answer to a slide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linsight.checkpoints import load_published
from linsight.checkpoints.read import read
from linsight.checkpoints.unwrap import unwrap
from linsight.errors import CheckpointError, LinsightError
from linsight.models.bags import Acmil
from linsight.runtime.places import located

from .bag import Bag


class Seen(NamedTuple):
    """The answer to a slide: probabilities `(classes,)`, and the share `(N,)` of each tile in it, whose sum is 1."""

    probabilities: Tensor
    weights: Tensor


def load_bag_model(source: str | Path | Mapping[str, object], *, num_heads: int | None = None) -> Acmil:
    """An `Acmil` in evaluation mode, of the sizes that its weights tell; its `classes` are named where the file does.

    Args:
        source: as of `load_published`, ours or as published.
        num_heads: heads of a multihead model; None: as the file tells, or else 8, as published.

    Raises:
        CheckpointError: the source cannot be read safely, or is no such model.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    state = unwrap(source if isinstance(source, Mapping) else read(source), name, ema=None).tensors
    reduced, head = (state.get(key) for key in ("dimreduction.fc1.weight", "Slide_classifier.fc.weight"))
    if reduced is None or head is None or reduced.ndim != 2 or head.ndim != 2:
        raise CheckpointError(f"{name} holds no bag model: no dimreduction.fc1.weight and Slide_classifier.fc.weight")
    gate, query = state.get("attention.attention_weights.weight"), state.get("q")
    if gate is None and query is None:
        raise CheckpointError(f"{name} holds no bag model that is known here: neither gated nor multihead branches")
    told = {} if isinstance(source, Mapping) else _told(source)
    try:
        heads, classes = int(told.get("num_heads", 8)), tuple(map(str, json.loads(told.get("classes", "[]"))))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name} does not tell its classes and heads as a bag model does: {error}") from error
    model = Acmil(
        reduced.shape[1],
        head.shape[0],
        kind="multihead" if gate is None else "gated",
        branches=query.shape[1] if gate is None else gate.shape[0],  # type: ignore[union-attr]
        inner_dim=reduced.shape[0],
        hidden_dim=128 if gate is None else gate.shape[1],
        num_heads=num_heads or heads,
    )
    load_published(model, state)
    if classes and len(classes) != model.num_classes:
        raise CheckpointError(f"{name} names {len(classes)} classes, and has weights of {model.num_classes}")
    model.classes = classes
    return model.eval()


def _told(source: str | Path) -> dict[str, str]:
    """The words beside the weights of a file of safetensors; none of another kind of file, or of an address."""
    try:
        with safe_open(located(source), "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def see_slide(model: Acmil, bag: Bag) -> Seen:
    """The answer of a bag model, in evaluation mode, to a slide.

    Raises:
        LinsightError: the features are of another width, or the model is in training mode.
    """
    if model.training:
        raise LinsightError("the bag model is in training mode, where patches are left out: call model.eval()")
    width = bag.features.shape[1]
    if width != model.in_features:
        raise LinsightError(
            f"the bag has features of {width} channels, and the bag model takes {model.in_features}: "
            f"give the backbone that it was trained with"
        )
    with torch.inference_mode():
        out = model(bag.features.to(next(model.parameters()))[None])
        return Seen(out.logits[0].float().softmax(0).cpu(), out.weights[0].float().cpu())
