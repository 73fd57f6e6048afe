"""TRecViT (arXiv 2412.14294). The size B is released, for 32 frames of Kinetics-400; the others are of its size table.

Neither a recipe nor accuracies stand in the repository. Released weights are arrays of flax, which `from_flax` makes a
state dict of.
"""

from linsight.attention import Paper

from ..video.create import VideoModel, add_video_models
from ..video.trecvit import TRecViT

_CODE = "google-deepmind/trecvit"
_PAPER = Paper("TRecViT: A Recurrent Video Transformer", "2412.14294")
_SIZES = {
    "mu": (32, 1, 128, 2),
    "tiny": (192, 12, 768, 3),
    "small": (384, 12, 1536, 6),
    "base": (768, 12, 3072, 12),
    "large": (1024, 24, 4096, 16),
}

add_video_models(
    *(
        VideoModel(
            f"trecvit_{name}",
            TRecViT,
            {"embed_dim": dim, "depth": depth, "mlp_dim": hidden, "num_heads": heads},
            paper=_PAPER,
            code=_CODE,
            weights=f"trecvit_B_k400.npz of the repository {_CODE}" if name == "base" else "",
        )
        for name, (dim, depth, hidden, heads) in _SIZES.items()
    )
)
