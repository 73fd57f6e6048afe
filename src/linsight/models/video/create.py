"""The models of videos by name. They are not among timm's, whose models are of images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from linsight.attention import Paper
from linsight.errors import LinsightError, UnknownNameError

from ..doors import building, checked


@dataclasses.dataclass(frozen=True)
class VideoModel:
    """A named model of videos.

    model_cls, args: the class, and its arguments for this size.
    published: figures, as of a `Variant`; top-1 by data set and frames.
    paper, code, weights: as of a `Variant`.
    """

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Paper | None = None
    code: str = ""
    weights: str = ""


VIDEO_MODELS: dict[str, VideoModel] = {}


def add_video_models(*rows: VideoModel) -> None:
    """Add models to `VIDEO_MODELS`.

    Raises:
        LinsightError: a name is taken.
    """
    for row in rows:
        if row.name in VIDEO_MODELS:
            raise LinsightError(f"the video model '{row.name}' is already there")
        VIDEO_MODELS[row.name] = row


def create_video_model(
    name: str, *, attention: str | None = None, attention_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """A model of videos, as "trecvit_base": clips `(B, C, T, H, W)` of any size and length to logits.

    Args:
        name: of `VIDEO_MODELS`.
        attention: a mechanism in the place of the model's own; a plan, as of `create_model`.
        attention_options: keyword arguments of that mechanism.
        kwargs: of the model's class, as `num_classes`, `img_size` and `frames`.

    Raises:
        UnknownNameError: no such model.
        LinsightError: an argument that the model does not take, or out of range.
    """
    if name not in VIDEO_MODELS:
        raise UnknownNameError("video model", str(name), VIDEO_MODELS)
    row = VIDEO_MODELS[name]
    given = checked(name, attention, attention_options, kwargs)
    own = {} if attention is None else {"attention": attention}
    with building(name, given):
        return row.model_cls(**{**row.args, **given, **own, "attention_options": attention_options})
