"""Our own models of small images."""

from ..registry import Variant, add_variants

add_variants(
    Variant("inline_compact_pico", "compact_pico", "inline"),
    Variant("inline_compact_nano", "compact_nano", "inline"),
)
