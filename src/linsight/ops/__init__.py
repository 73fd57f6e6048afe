"""Tensors in, tensors out. The plain PyTorch form of each function is its definition."""

import warnings
from typing import Any

from .circulant import circular_correlation
from .conv import (
    Convolved,
    depthwise_conv,
    dynamic_depthwise_conv,
    shifted_products,
)
from .disc import SharedKeys, disc_attention
from .dispatch import FORMS, TRITON, ChosenForm, Form, exported_forms, forms, plain_is_asked, use_form
from .features import Features, as_features, focus, square_features
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
    causal_product,
    causal_products,
    central_absorb,
    linear_absorb,
    linear_attention,
    linear_read,
)
from .maps import FEATURE_MAPS
from .neighbourhood import (
    AxisWindow,
    axis_window,
    neighbourhood_attention,
    neighbourhood_attention_nd,
    neighbourhood_mean,
)
from .packing import Groups, each_grid, pack, unpack
from .partition import Partition, half_shift, to_multiple, within
from .pooled import attend, gather_pooled, gather_state, pool_tokens, read_pooled
from .resample import FittedTable, Mode, fit_grid, fit_square, pool_matrix, resize_matrix, separable, table_for
from .rotary import HEAD_BASE, Turn, check_rotary, rotate
from .scan import linear_scan, selective_scan
from .sizes import at_least, at_most, copied, divided, in_example, is_proxy, leaves, spread, traced, unflatten
from .states import (
    LogSumExp,
    Moments,
    State,
    accumulator,
    apply_state,
    autocasts,
    count_tokens,
    full_precision,
    mask_tokens,
    merge,
    outer_sum,
    take_tokens,
)

__all__ = [
    "FEATURE_MAPS",
    "FORMS",
    "HEAD_BASE",
    "INNER_MODELS",
    "TRITON",
    "AxisWindow",
    "ChosenForm",
    "Convolved",
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
    "Partition",
    "SharedKeys",
    "State",
    "Tile",
    "Turn",
    "accumulator",
    "affine_read",
    "apply_state",
    "as_features",
    "as_layout",
    "at_least",
    "at_most",
    "attend",
    "autocasts",
    "axis_window",
    "causal_linear_attention",
    "causal_product",
    "causal_products",
    "central_absorb",
    "check_rotary",
    "check_tokens",
    "circular_correlation",
    "copied",
    "count_tokens",
    "depthwise_conv",
    "disc_attention",
    "divided",
    "dynamic_depthwise_conv",
    "each_grid",
    "exported_forms",
    "fit_grid",
    "fit_square",
    "focus",
    "forms",
    "full_precision",
    "gather_pooled",
    "gather_state",
    "half_shift",
    "in_example",
    "inner_forward",
    "inner_gradient",
    "inner_step",
    "is_proxy",
    "kernel_gradient",
    "leaves",
    "linear_absorb",
    "linear_attention",
    "linear_read",
    "linear_scan",
    "mask_tokens",
    "merge",
    "neighbourhood_attention",
    "neighbourhood_attention_nd",
    "neighbourhood_mean",
    "outer_sum",
    "pack",
    "pad_prefix",
    "plain_is_asked",
    "pool_matrix",
    "pool_tokens",
    "read_pooled",
    "resize_matrix",
    "rotate",
    "selective_scan",
    "separable",
    "shifted_products",
    "spread",
    "square_features",
    "table_for",
    "take_tokens",
    "tiles",
    "to_multiple",
    "traced",
    "unflatten",
    "unpack",
    "use_form",
    "within",
]

# Names that another room took over, and that are still had from here, with a warning: filled by that room.
MOVED: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warnings.warn(
        f"linsight.ops.{name} is gone from the plain forms: see linsight.fuse", DeprecationWarning, stacklevel=2
    )
    return MOVED[name]
