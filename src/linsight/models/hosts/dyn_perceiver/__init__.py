"""Dynamic Perceiver."""

from .host import DynamicPerceiver as DynamicPerceiver
from .types import ExitLogits as ExitLogits
from .types import Latents as Latents
from .types import Network as Network
