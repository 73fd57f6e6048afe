"""VideoMamba's mixer: two selective state-space scans over the tokens, one from each end.

Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", ECCV 2024 (arXiv 2403.06977), by its
published code; the scan is Mamba's (Gu & Dao, arXiv 2312.00752). Of tokens u, C wide, with D = 2C channels inside, S
states for each and r = C / 16, rounded up,

    [x, z] = W_in u,   x <- SiLU(causal conv of 4 tokens (x)),   [d, B, C] = W_x x
    Delta = softplus(W_d d + b_d),   h_t = exp(-Delta_t exp(A_log)) h_(t-1) + Delta_t x_t B_t^T
    y_t = h_t C_t + D_skip x_t,   one way: y SiLU(z),   out = W_out (forwards + backwards)

Backwards is the same on the reversed sequence, with a convolution, W_x, W_d, A_log and D_skip of its own; W_in, z and
W_out are shared. There are no heads: `num_heads` has no effect.

Tokens are a sequence: prefix tokens, then rows of the grid. Each sees all others, by the order in which they stand, so
none is dropped, and padding in between is refused; packed batches are scanned image by image. From the convolution on
all is in float32, or float64 for float64; there is no package of kernels, see `linsight.ops.selective_scan`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, full_precision, selective_scan

from ..capabilities import Capabilities, Structure
from ..checks import held
from ..layer import Layer
from ..parts.wide import WideLinear
from ..registry import Paper, register

_WIDTH = 4  # tokens that the convolution sees
_STEPS = (1e-3, 0.1)  # of Delta at the start


class CausalConv(nn.Conv1d):
    """A depthwise convolution over a sequence: a token and those before it, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)`; the shape is kept, zero before the first token."""
        assert self.bias is not None
        line = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.conv1d(line, weight, bias, groups=self.groups).transpose(1, 2)


class StepSizes(nn.Module):
    """softplus(W d + b); no `nn.Linear`, as its bias is not to be zeroed by a model that starts its linear layers."""

    def __init__(self, rank: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, rank, **factory))
        self.bias = nn.Parameter(torch.empty(dim, **factory))
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            least, most = map(math.log, _STEPS)
            steps = (torch.rand_like(self.bias) * (most - least) + least).exp()
            self.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, r)` to `(B, N, D)`, in the dtype of `x`."""
        return F.softplus(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


@register(
    "bimamba",
    kind="layer",
    formula="y_t = h_t C_t + D x_t, h_t = exp(-Delta_t exp(A)) h_(t-1) + Delta_t x_t B_t^T; "
    "out = W ((y + y backwards) SiLU(z))",
    latex=r"\begin{aligned} h_t &= e^{-\Delta_t \exp(A)} h_{t-1} + \Delta_t x_t B_t^\top, \quad y_t = h_t C_t + D x_t "
    r"\cr o &= W_o \left( (\overrightarrow{y} + \overleftarrow{y}) \odot \mathrm{SiLU}(z) \right) \end{aligned}",
    family="scan",
    complexity="O(N d (d + S))",
    paper=Paper("VideoMamba: State Space Model for Efficient Video Understanding", "2403.06977", "ECCV 2024"),
)
class BiMamba(Layer):
    """Two selective state-space scans over the sequence of tokens, from either end, and a gate.

    Args:
        states: S, of each channel.
    """

    capabilities = Capabilities(prefix=True)
    structure = Structure()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        states: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if states < 1:
            raise LinsightError(f"states={states} of 'bimamba' must be 1 or more; published are 16")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, rank = 2 * dim, -(-dim // 16)
        self.dim, self.rank, self.states = dim, rank, states
        rates = torch.arange(1, states + 1, **factory).log().expand(inner, -1)
        self.A_log, self.A_b_log = (nn.Parameter(rates.clone()) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner, **factory)) for _ in range(2))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **factory)
        conv: dict[str, Any] = {"groups": inner, **factory}
        self.conv1d, self.conv1d_b = (CausalConv(inner, inner, _WIDTH, **conv) for _ in range(2))
        self.x_proj, self.x_proj_b = (WideLinear(inner, rank + 2 * states, bias=False, **factory) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (StepSizes(rank, inner, **factory) for _ in range(2))
        self.out_proj = WideLinear(inner, dim, bias=False, **factory)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, P + H*W, C)`, mixed."""
        inside, gate = self.in_proj(x).chunk(2, dim=-1)
        wide = accumulator(x.dtype)
        inside, gate = inside.to(wide), gate.to(wide)
        with full_precision(inside):
            ahead = _one_way(inside, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
            back = _one_way(inside.flip(1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            out = (ahead + back.flip(1)) * F.silu(gate)
            return self.out_proj(out).to(x.dtype)

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.in_proj)

    def no_weight_decay(self) -> set[str]:
        """Rates and skip connections, as published."""
        return {"A_log", "A_b_log", "D", "D_b"}

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"dim={self.dim}, states={self.states}"


def _one_way(x: Tensor, conv: nn.Module, project: nn.Module, steps: nn.Module, log: Tensor, skip: Tensor) -> Tensor:
    """y of x `(B, N, D)`, from the first token on."""
    x, states = F.silu(conv(x)), log.shape[1]
    found = project(x)
    given, write, read = found.split([found.shape[-1] - 2 * states, states, states], dim=-1)
    return selective_scan(x, steps(given), -log.to(x.dtype).exp(), write, read) + skip.to(x.dtype) * x
