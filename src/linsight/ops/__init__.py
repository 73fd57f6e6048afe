"""Floor 1: tensors in, tensors out. The plain PyTorch form of each function is its definition."""

from ._forms import FORMS, TRITON, ChosenForm, Form, forms, use_form
from .circulant import circular_correlation
from .conv import depthwise_conv, dynamic_depthwise_conv, shifted_products
from .features import Features, as_features, focus
from .inner import (
    INNER_MODELS,
    InnerGradient,
    InnerLoss,
    InnerModel,
    inner_forward,
    inner_gradient,
    inner_step,
    kernel_gradient,
)
from .layout import Grid, Layout, LayoutLike, Tile, as_layout, check_tokens, pad_prefix, tiles
from .linear import (
    LinearState,
    affine_read,
    causal_linear_attention,
    central_absorb,
    linear_absorb,
    linear_attention,
    linear_read,
)
from .maps import FEATURE_MAPS
from .neighbourhood import neighbourhood_attention
from .packing import Groups, each_grid, pack, unpack
from .pooled import gather_pooled, gather_state, pool_tokens, read_pooled
from .resample import FittedTable, Mode, fit_square, pool_matrix, resize_matrix, separable, table_for
from .rotary import Turn, check_rotary, rotate
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
    "INNER_MODELS",
    "TRITON",
    "ChosenForm",
    "Features",
    "FittedTable",
    "Form",
    "Grid",
    "Groups",
    "InnerGradient",
    "InnerLoss",
    "InnerModel",
    "Layout",
    "LayoutLike",
    "LinearState",
    "LogSumExp",
    "Mode",
    "Moments",
    "State",
    "Tile",
    "Turn",
    "accumulator",
    "affine_read",
    "apply_state",
    "as_features",
    "as_layout",
    "causal_linear_attention",
    "central_absorb",
    "check_rotary",
    "check_tokens",
    "circular_correlation",
    "count_tokens",
    "depthwise_conv",
    "dynamic_depthwise_conv",
    "each_grid",
    "fit_square",
    "focus",
    "forms",
    "full_precision",
    "gather_pooled",
    "gather_state",
    "inner_forward",
    "inner_gradient",
    "inner_step",
    "kernel_gradient",
    "linear_absorb",
    "linear_attention",
    "linear_read",
    "mask_tokens",
    "merge",
    "neighbourhood_attention",
    "outer_sum",
    "pack",
    "pad_prefix",
    "pool_matrix",
    "pool_tokens",
    "read_pooled",
    "resize_matrix",
    "rotate",
    "separable",
    "shifted_products",
    "table_for",
    "tiles",
    "unpack",
    "use_form",
]
