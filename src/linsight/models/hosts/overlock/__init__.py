"""OverLoCK."""

from .blocks import FocusBlock as FocusBlock
from .host import OverLoCK as OverLoCK
from .host import TwoLogits as TwoLogits
