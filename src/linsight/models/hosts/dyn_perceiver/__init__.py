"""Dynamic Perceiver."""

from .host import EXITS as EXITS
from .host import DynamicPerceiver as DynamicPerceiver
from .types import Decision as Decision
from .types import Exit as Exit
from .types import ExitLogits as ExitLogits
from .types import Latents as Latents
from .types import Network as Network
from .types import State as State
