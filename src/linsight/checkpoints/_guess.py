"""What a checkpoint that does not fit seems to be, in one line."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linsight.models import HOSTS, VARIANTS, create_model

from ._fit import Fitted, fit, in_classifier
from ._report import Mismatch


def describe(model: nn.Module, tensors: Mapping[str, Tensor], fitted: Fitted) -> str:
    """How much does not fit, why, and which model it is from."""
    rows = fitted.problems
    heads = [row for row in rows if in_classifier(model, row.key)]
    clues = [f"{len(rows)} of {len(rows) + len(fitted.ready)} tensors differ", *_head_clues(heads)]
    if len(heads) < len(rows):
        vectors = [row for row in rows if row.checkpoint.isdecimal() and row.model.isdecimal() and row not in heads]
        if vectors:
            given, wanted = Counter((row.checkpoint, row.model) for row in vectors).most_common(1)[0][0]
            clues.append(f"width {given} in the checkpoint, {wanted} in the model")
        # Few that differ are another fault, and building every model takes seconds.
        name = guess(model, tensors) if len(rows) > len(fitted.ready) / 10 else ""
        if name:
            clues.append(f"it fits '{name}'")
    return "; ".join(clues)


def _head_clues(heads: list[Mismatch]) -> list[str]:
    """What is wrong with the classifier, if it is the number of classes."""
    if not heads:
        return []
    way = "pass head=False to leave the head of the model as it is"
    given, wanted = (shape.partition("x")[0] for shape in heads[0][1:3])
    if not (given and wanted):
        return [f"{'the model' if given else 'the checkpoint'} has no head: {way}"]
    return [] if given == wanted else [f"{given} classes in the checkpoint, {wanted} in the model: {way}"]


def guess(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The first registered model that the checkpoint fits, built without memory; empty if there is none."""
    config = getattr(model, "pretrained_cfg", None)
    if not config:  # a single layer
        return ""
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    for name in (*VARIANTS, *HOSTS):
        if name != config.get("architecture"):
            fitted = fit(create_model(name, device="meta"), shapes, head=False)
            if fitted.ready and not fitted.problems:
                return name
    return ""
