"""The shipped recipes, as data. `about` says what to expect, on what, and the command."""

from ._agent import AGENT
from ._deit import SIAMESE, STEPS, VCA
from ._dyn_perceiver import DYN_PERCEIVER
from ._inline import FLATTEN, INLINE
from ._inner import T5, VIT3, WEIGHTFORMER
from ._mlla import CIRCULANT, MLLA
from ._own import OWN
from ._table import Shipped

RECIPES: dict[str, Shipped] = {
    **OWN,
    **INLINE,
    **FLATTEN,
    **AGENT,
    **MLLA,
    **CIRCULANT,
    **VIT3,
    **WEIGHTFORMER,
    **VCA,
    **T5,
    **SIAMESE,
    **STEPS,
    **DYN_PERCEIVER,
}

__all__ = ["RECIPES", "Shipped"]
