"""VideoMamba's block: x + mixer(RMSNorm(x)), without an MLP.

Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", ECCV 2024 (arXiv 2403.06977), by its
published code, whose mixer is `bimamba`. The code adds a block's output to the residual stream in the next block,
before the norm of that, which is the same function.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor

from linsight.ops import Layout

from ..block import Block
from ..capabilities import Capabilities
from ..checks import held
from ..core import Rename
from ..parts.wide import WideRMSNorm
from ..registry import Paper, register
from .bimamba import BiMamba


@register(
    "videomamba",
    kind="block",
    formula="x + bimamba(RMSNorm(x))",
    latex=r"x \leftarrow x + \mathrm{bimamba}(\mathrm{RMSNorm}(x))",
    family="scan",
    complexity="O(N d (d + S))",
    paper=Paper("VideoMamba: State Space Model for Efficient Video Understanding", "2403.06977", "ECCV 2024"),
)
class VideoMambaBlock(Block):
    """The mixer `bimamba` behind a norm; `mlp_ratio` has no effect.

    Args:
        states: S, of each channel.
    """

    capabilities = Capabilities(prefix=True)
    takes = ("drop_path_rate", "norm_layer")
    published = (Rename("norm.", "norm1."), Rename("mixer.", "attn."))
    published_model = (Rename("layers.", "blocks."), Rename("norm_f.", "norm."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        states: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.norm1 = WideRMSNorm(dim, eps=1e-5, **factory)
        self.attn = BiMamba(dim, num_heads, states=states, **factory)
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream; see above."""
        return x + self.drop_path(self.attn(self.norm1(x), layout))

    def weight(self) -> Tensor | None:
        """See `Block`."""
        return held(self.norm1)

    def no_weight_decay(self) -> set[str]:
        """Names that the mixer asks for."""
        return {f"attn.{name}" for name in self.attn.no_weight_decay()}
