"""The sizes of the ViT host."""

from ...parts.dense import Features
from ...registry import add_hosts
from ...rows import Host
from .host import VisionTransformer

_CFG = {"first_conv": "patch_embed.proj", "classifier": "head"}
_FEATURES = {"out_indices": 3, "feature_cls": Features}

add_hosts(
    *(
        Host(
            f"vit_{size}",
            VisionTransformer,
            {"patch_size": 16, "depth": 12, "embed_dim": 64 * heads, "num_heads": heads},
            _CFG,
            _FEATURES,
            stride=0,
        )
        for size, heads in (("tiny", 3), ("small", 6), ("base", 12))
    )
)
