"""Our own models for small images."""

from ..hosts.dyn_perceiver import DynamicPerceiver, Latents, Network
from ..registry import add_architectures, add_variants
from ..rows import Architecture, Variant
from .dyn_perceiver import CFG, PAPER

add_variants(
    Variant("inline_compact_pico", "compact_pico", "inline"),
    Variant("inline_compact_nano", "compact_nano", "inline"),
    Variant("inline_compact_tiny", "compact_tiny", "inline"),
)
# Maps of 16x16 before the first two stages, then 8x8 and 4x4, which latents read whole.
add_architectures(
    Architecture(
        "dynp_resnet18_025_t32_cifar",
        DynamicPerceiver,
        {
            "network": Network("resnet18", 0.25, stem_stride=2),
            "latents": Latents(32, (1 / 3, 1 / 3, 2 / 9, 1 / 3), mlp_ratio=2, pool=4),
        },
        {**CFG, "input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"},
        paper=PAPER,
    )
)
