"""The shipped recipes: ours, and those of the papers' tables. `about` says what to expect, on what, and the command."""

from typing import TYPE_CHECKING, Any

from ._base import Shipped, published
from ._detect import OBJECTS, OWN_DETECTORS, published_detectors
from ._own import FINETUNE
from ._own import OWN as _OWN
from ._segment import MASKS, OWN_SEGMENTERS, published_segmenters

if TYPE_CHECKING:
    RECIPES: dict[str, Shipped]

OWN = {**_OWN, **OWN_DETECTORS, **OWN_SEGMENTERS}

__all__ = ["FINETUNE", "MASKS", "OBJECTS", "OWN", "RECIPES", "Shipped"]


def __getattr__(name: str) -> Any:
    """`RECIPES`, all of them, made when it is asked for: those of papers need the models."""
    if name != "RECIPES":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = {**OWN, **dict(published()), **dict(published_detectors()), **dict(published_segmenters())}
    return globals()[name]
