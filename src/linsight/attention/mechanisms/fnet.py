"""FNet: the real part of the Fourier transform over channels and tokens, in the place of attention.

Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", NAACL 2022 (arXiv 2105.03824). For tokens x (N, C),

    y_nc = Re sum_mb x_mb exp(-2 pi i (n m / N + c b / C)),

without scale and without parameters. Its deviation is that of x times sqrt(N C / 2): published blocks norm the sum
behind it; for blocks that norm in front there is `ortho`, which divides by sqrt(N C). The sequence is the grid row by
row, prefix tokens in front, as the published class token. There are no queries and no keys, and heads have no effect.

A transform has the length of its image: tokens that are dropped, or padding in between, would change all frequencies,
so both are refused. Packed batches are transformed image by image. A graph that leaves may have no complex dtype: there
it is two products with cosines and sines, of rows and of columns, O(N (H + W)); with prefix tokens, of which no product
of two sides is the number, one, O(N^2).
"""

import math
from typing import Any

import torch
from torch import Tensor

from linsight.ops import Layout, accumulator, divided, full_precision, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..layer import Layer
from ..registry import Paper, register


def fourier(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Re DFT over tokens and channels of `x` `(B, N, C)`, float32 or float64: the same shape.

    size: two numbers whose product is N, for the products of a graph that leaves.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return by_matrices(x, size)
    return operator(x) if torch.compiler.is_compiling() else _by_fft(x)


def _by_fft(x: Tensor) -> Tensor:
    """The only place with complex numbers."""
    return torch.fft.fft2(x).real


@torch.library.custom_op("linsight::real_fourier", mutates_args=())
def operator(x: Tensor) -> Tensor:
    """`_by_fft` behind an operator of torch, for compiled graphs."""
    return _by_fft(x).contiguous()


@operator.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return operator(grad)  # cosines of products of places: a symmetric matrix


operator.register_autograd(_backward)


def by_matrices(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`fourier` by products with matrices of cosines and sines, for exported graphs.

    Token r W + c and frequency k + H l meet in r k / H + c k / N + c l / W turns.
    """
    height, width = size
    factory: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    cos, sin = _waves(x.shape[2], x.shape[2], x.shape[2], **factory)
    canvas = unflatten(x, 1, (height, width)).permute(0, 2, 1, 3)  # (B, W, H, C)
    real, imaginary = (part.permute(0, 3, 1, 2) for part in (canvas @ cos, -(canvas @ sin)))  # (B, C, W, H)
    cos, sin = _waves(height, height, height, **factory)
    real, imaginary = real @ cos + imaginary @ sin, imaginary @ cos - real @ sin  # (B, C, W, k)
    cos, sin = _waves(width, height, height * width, **factory)
    real, imaginary = real * cos + imaginary * sin, imaginary * cos - real * sin
    cos, sin = _waves(width, width, width, **factory)
    out = real.transpose(2, 3) @ cos + imaginary.transpose(2, 3) @ sin  # (B, C, k, l)
    return out.permute(0, 3, 2, 1).flatten(1, 2)


def _waves(rows: Any, columns: Any, period: Any, **factory: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi r c / period, each `(rows, columns)`; the numbers may be symbolic."""
    places = torch.arange(rows, device=factory["device"])[:, None]
    _, turns = divided(places * torch.arange(columns, device=factory["device"]), period)  # whole turns cost digits
    angles = turns.to(factory["dtype"]) * (2 * math.pi / period)
    return angles.cos(), angles.sin()


@register(
    "fnet",
    kind="layer",
    formula="y_nc = Re sum_mb x_mb exp(-2 pi i (n m / N + c b / C))",
    latex=r"y_{nc} = \mathrm{Re} \sum_{m, b} x_{mb} \exp \left( -2 \pi i \left( \frac{n m}{N} + \frac{c b}{C} "
    r"\right) \right)",
    family="spectrum",
    complexity="O(N log N d)",
    paper=Paper("FNet: Mixing Tokens with Fourier Transforms", "2105.03824", "NAACL 2022"),
)
class FNet(Layer):
    """A Fourier transform over tokens and channels, of which the real part is taken; there are no parameters.

    Args:
        ortho: divided by sqrt(N C), for blocks that norm in front of a layer and not behind it.
    """

    capabilities = Capabilities(prefix=True)
    structure = Structure(cost=Cost.N_LOG_N)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ortho: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.ortho = dim, ortho

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, P + H*W, C)`, mixed in float32."""
        height, width, prefix = layout.grid
        wide = x.to(accumulator(x.dtype))
        with full_precision(wide):
            out = fourier(wide, (1, layout.grid.tokens) if prefix else (height, width))
        if self.ortho:
            out = out * (layout.grid.tokens * self.dim) ** -0.5
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"dim={self.dim}" + (", ortho=True" if self.ortho else "")
