"""The compact host's sizes and our variants of it, as data."""

from ._registry import Host, Variant, add_hosts, add_variants
from ._stages import StageSize
from .compact import Compact

_CFG = {
    "first_conv": "stem.0.conv",
    "classifier": "head.fc",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bilinear",
}
_FEATURES = {"out_indices": (0, 1), "feature_cls": "getter"}

add_hosts(
    Host(
        "compact_pico",
        Compact,
        {"stem": ((32, 1),), "stages": (StageSize(64, 2, 2), StageSize(96, 1, 3))},
        {**_CFG, "input_size": (3, 8, 8)},
        _FEATURES,
    ),
    Host(
        "compact_nano",
        Compact,
        {"stem": ((24, 1), (48, 2)), "stages": (StageSize(96, 2, 3), StageSize(192, 2, 6))},
        {**_CFG, "input_size": (3, 32, 32)},
        _FEATURES,
    ),
)

add_variants(
    Variant("inline_compact_pico", "compact_pico", "inline"),
    Variant("inline_compact_nano", "compact_nano", "inline"),
)
