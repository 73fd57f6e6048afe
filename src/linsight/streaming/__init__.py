"""Images of any size through a model, tile by tile and layer by layer, exact to rounding."""

from ._run import plan_of, stream
from .tiled import check_streams, reach

__all__ = ["check_streams", "plan_of", "reach", "stream"]
