"""Floor 1: tensors in, tensors out. The plain PyTorch form of each function is its definition."""

from ._forms import FORMS, ChosenForm, Form, forms
from .conv import depthwise_conv, dynamic_depthwise_conv, shifted_products
from .layout import Grid, Layout, LayoutLike, Tile, as_layout, check_tokens, pad_prefix, tiles
from .linear import LinearState, causal_linear_attention, linear_absorb, linear_attention, linear_read
from .maps import FEATURE_MAPS
from .resample import FittedTable, Mode, fit_square, pool_matrix, resize_matrix, separable, table_for
from .rotary import check_rotary, rotary_angles, rotate
from .states import (
    LogSumExp,
    Moments,
    State,
    accumulator,
    apply_state,
    count_tokens,
    full_precision,
    mask_tokens,
    merge,
    outer_sum,
)

__all__ = [
    "FEATURE_MAPS",
    "FORMS",
    "ChosenForm",
    "FittedTable",
    "Form",
    "Grid",
    "Layout",
    "LayoutLike",
    "LinearState",
    "LogSumExp",
    "Mode",
    "Moments",
    "State",
    "Tile",
    "accumulator",
    "apply_state",
    "as_layout",
    "causal_linear_attention",
    "check_rotary",
    "check_tokens",
    "count_tokens",
    "depthwise_conv",
    "dynamic_depthwise_conv",
    "fit_square",
    "forms",
    "full_precision",
    "linear_absorb",
    "linear_attention",
    "linear_read",
    "mask_tokens",
    "merge",
    "outer_sum",
    "pad_prefix",
    "pool_matrix",
    "resize_matrix",
    "rotary_angles",
    "rotate",
    "separable",
    "shifted_products",
    "table_for",
    "tiles",
]
