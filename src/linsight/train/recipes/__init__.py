"""The shipped recipes: ours, and those of the papers' tables. `about` says what to expect, on what, and the command."""

from ._base import Shipped, published
from ._own import FINETUNE, OWN

RECIPES: dict[str, Shipped] = {**OWN, **dict(published())}

__all__ = ["FINETUNE", "RECIPES", "Shipped"]
