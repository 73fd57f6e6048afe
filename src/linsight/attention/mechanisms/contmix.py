"""ContMix, as a block: each token makes a convolution kernel of the whole map, between convolutions with fixed ones.

Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR 2025
(arXiv 2502.20087), by its published code. Of a token n of a group of channels, and k of 7 x 7 means of the whole map,

    a_n = W (q_n . k_1, ..., q_n . k_49) + b         no softmax over the means
    y_n = sum_m softmax_m(a_nm + bias_(m - n)) v_m   m in the K x K window around n

with a small window for one half of the channels and a large one for the other; windows move inward at the rim. Then

    x <- x + conv3x3(x);  u = LN(x)
    x <- s(x) + W BN(SiLU(BN W u) * SE(BN W y + BN RepConv(u)))
    x <- x + conv3x3(x)
    x <- s(x) + MLP(LN(x))                           with a convolution and a global response norm inside

where s is a factor and a bias for each channel. Maps with a side shorter than the large window are enlarged to it for
y, as published. Norms and means over the whole map would see padding, and a dropped token would leave a hole in
windows, so both are refused, as are prefix tokens, which have no place in a convolution.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from linsight.ops import Layout

from ..block import Block
from ..capabilities import Capabilities, Cost, Structure
from ..checks import held
from ..parts.context import Affine, ContextMixer, GRNMlp, ResidualConv, mixer_names
from ..registry import Paper, register


@register(
    "contmix",
    kind="block",
    formula="y_n = sum_m softmax_m(W (q_n . k_1, ..., q_n . k_49) + bias) v_m, m in a window, k of 7 x 7 means",
    latex=r"y_n = \sum_{m \in w(n)} \mathrm{softmax}_m \left( W (q_n \cdot k_1, \ldots, q_n \cdot k_{49}) + b_{m - n} "
    r"\right) v_m, \quad k \text{ of } 7 \times 7 \text{ means of the map}",
    family="convolution",
    also=("OverLoCK",),
    complexity="O(N d^2 + N K^2 d)",
    paper=Paper(
        "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        "2502.20087",
        "CVPR 2025",
    ),
)
class ContMix(Block):
    """The published stand-alone block.

    Args:
        kernel_size: side of the large window and of the convolution beside it: 5, 7, 9, 11, 13, 15, 17 or 19.
        smk_size: side of the small window, odd.
        res_scale: the factors are those of the residual stream, else of the branches.
        ls_init_value: what they begin with; None for none.
    """

    capabilities = Capabilities()
    structure = Structure(cost=Cost.WINDOWED)
    published = mixer_names("fusion_proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 7,
        smk_size: int = 5,
        res_scale: bool = True,
        ls_init_value: float | None = 1.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.res_scale = dim, res_scale
        self.dwconv1 = ResidualConv(dim, **factory)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory)
        sizes = {"kernel_size": kernel_size, "small_size": smk_size}
        self.mixer = ContextMixer(dim, dim, dim, num_heads, values=True, **sizes, **factory)
        for table in (self.mixer.mix.rpb1, self.mixer.mix.rpb2):
            nn.init.trunc_normal_(table, std=0.02)
        self.dwconv2 = ResidualConv(dim, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = GRNMlp(dim, int(dim * mlp_ratio), **factory)
        self.ls1, self.ls2 = (
            nn.Identity() if ls_init_value is None else Affine(dim, ls_init_value, **factory) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream; see above."""
        size = layout.grid[:2]
        x = self.dwconv1(x, size)
        u = self.norm1(x)
        x = self.add(x, self.mixer(u, u, u, size), self.ls1)
        x = self.dwconv2(x, size)
        return self.add(x, self.mlp(self.norm2(x), size), self.ls2)

    def weight(self) -> Tensor | None:
        """See `Block`."""
        return held(self.norm1)

    def add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        """The sum of the stream and a branch, one of them scaled."""
        if self.res_scale:
            return scale(x) + self.drop_path(branch)
        return x + self.drop_path(scale(branch))

    def no_weight_decay(self) -> set[str]:
        """The tables of the windows."""
        return {"mixer.mix.rpb1", "mixer.mix.rpb2"}
