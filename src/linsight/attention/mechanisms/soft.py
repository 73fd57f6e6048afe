"""SOFT: attention by a Gaussian kernel, without a softmax, through the inverse of the kernel of learned landmarks.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945), and "Softmax-free
Linear Transformers", IJCV 2024 (arXiv 2207.03341, `normalised`), by their published code. Keys are the queries, both
times d^(-1/4). With x(a, b) = exp(-|a - b|^2 / 2), and landmarks L = GELU(LayerNorm(conv(q))), a convolution of each
head, one for all heads, whose stride is its side r,

    o = x(q, L) S x(L, k) v + conv(v),   S ~ (A + 0.01)^(-1),   A = x(L, L)
    normalised: S = D^(-1/2) V D^(-1/2),   V ~ A^(-1),   D = row sums of A

S and V are made in twenty Newton steps, V <- 2 V - V A V, from 1.8 A / (largest row sum of A)^2. The convolution of v
has one kernel for each head. Everything is computed in float32 (float64 for float64): distances cancel, and half
precision inverts nothing.

The published normalised code starts at 2 A / (largest row sum of the batch)^2, halved while the largest column sum of
|1 - A V| of the batch is above 1.01, ten times at most ("original"): an image then depends on the others, so padded
and packed batches are refused, and where A is the identity V is 0. Otherwise each matrix has a start of its own, from
which it converges ("exact"). Where both do, they agree; landmarks that lie close take more than twenty steps. The
plain form has the gradient of an inverse, as published, dA = -S^T dS S^T, and keeps no step; the other that of its own.

The published layer needs sides that r divides. Here zeros fill the last cells, as they fill those that reach beyond an
image of a padded batch. There is a landmark for each r x r tokens, so the cost is quadratic and the third power of
N / r^2, and what a landmark sees is told by the grid: no state of a fixed size, so no tiles, and dropped tokens are
refused. Prefix tokens read and are read, and are in no landmark.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, copied, depthwise_conv, full_precision, mask_tokens, traced, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..parts.token_conv import add_behind
from ..parts.wide import WideLayerNorm
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads, split_heads

_STEPS = 20


@register(
    "soft",
    formula="o = x(q, L) (x(L, L) + 0.01)^(-1) x(L, k) v + conv(v), x(a, b) = exp(-|a - b|^2 / 2), k = q, "
    "L = GELU(LN(conv_r(q)))",
    latex=r"\begin{aligned} o &= \kappa(q, L) S \kappa(L, k) v + \mathrm{conv}(v), \quad S \approx (\kappa(L, L) + "
    r"0.01 I)^{-1}, \quad k = q \cr \kappa(a, b) &= e^{-\lVert a - b \rVert^2 / 2}, \quad L = "
    r"\mathrm{GELU}(\mathrm{LN}(\mathrm{conv}_{r \times r}(q))) \end{aligned}",
    family="low rank",
    complexity="O(N^2 d / r^2 + N^3 / r^6)",
    paper=Paper("SOFT: Softmax-free Transformer with Linear Complexity", "2110.11945", "NeurIPS 2021"),
)
class Soft(Core):
    """Gaussian-kernel attention through landmarks of a convolution.

    Args:
        ratio: r. Published stages have 8, 4 and 2.
        kernel_size: of the convolution of v, odd, or 0 for none. Published stages have 9, 5 and 3.
        normalised: the form that is normalised by row sums.
        start: of the inverse in the normalised form: "exact" is of each matrix, "original" of the whole batch.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(cost=Cost.QUADRATIC)
    placed = True
    projections = "q_v"
    published = (
        Rename("W_q.", "q."),
        Rename("W_v.", "v."),
        Rename("ff.", "proj."),
        Rename("attn.Qlandmark_op.weight", "core.landmarks"),
        Rename("attn.Qnorm_act.0.", "core.norm."),
        Rename("attn.conv.weight", "core.kernel"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: int = 2,
        kernel_size: int = 3,
        normalised: bool = False,
        start: Literal["exact", "original"] = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ratio < 1:
            raise LinsightError(f"ratio={ratio} of 'soft' must be 1 or more; published stages have 8, 4 and 2")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise LinsightError(f"kernel_size={kernel_size} of 'soft' must be odd, or 0 for no convolution")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.num_heads, self.ratio, self.normalised = num_heads, ratio, normalised
        self.original = normalised and start == "original"
        if self.original:
            self.capabilities = self.capabilities._replace(sizes=False, packed=False)
        self.halo = kernel_size // 2
        self.landmarks = nn.Parameter(torch.empty(width, width, ratio, ratio, **factory))
        nn.init.kaiming_uniform_(self.landmarks, a=5**0.5)
        self.norm = WideLayerNorm(width, **factory)
        self.kernel = None
        if kernel_size:
            self.kernel = nn.Parameter(torch.empty(num_heads, 1, kernel_size, kernel_size, **factory))
            nn.init.kaiming_uniform_(self.kernel, a=5**0.5)

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """Kernels and inverse in the accumulator's dtype."""
        dtype, prefix = accumulator(tokens.v.dtype), layout.grid.prefix
        scale = tokens.q.shape[-1] ** -0.25
        q, k = (mask_tokens(x, tokens.keep).to(dtype) * scale for x in tokens[:2])
        v = mask_tokens(tokens.v, tokens.keep).to(dtype)
        with full_precision(q):
            marks, inside = self.marks(q[:, prefix:], layout)
            q, k, values = (x.transpose(1, 2) for x in (q, k, v))
            ahead, behind, among = (gaussian(x, marks) for x in (q, k, marks))
            if inside is not None:  # landmarks beyond an image: nobody reads them, and A has the identity there
                seen = inside[:, None, None]
                ahead, behind = ahead * seen, behind * seen
                among = among * (seen * seen.transpose(-1, -2)) + torch.diag_embed(1 - seen[:, :, 0])
            out = ahead @ (self.inverse(among) @ (behind.transpose(-1, -2) @ values))
            out = copied(out.transpose(1, 2))
            if self.kernel is not None:
                weight = self.kernel.to(dtype).repeat_interleave(v.shape[-1], dim=0)
                spatial = merge_heads(v)[:, prefix:]
                local = depthwise_conv(spatial, (layout.grid.height, layout.grid.width), weight, None)
                out = add_behind(out, split_heads(local, self.num_heads), prefix)
        return out.to(tokens.q.dtype)

    def marks(self, q: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """L `(B, H, m, D)` of queries `(B, h*w, H, D)`; with padding also which are of the image `(B or 1, m)`."""
        (height, width), r = layout.grid[:2], self.ratio
        # A graph has a row and a column of landmarks more, beyond all images: it would ask whether there is only one.
        high, wide = ((side + r - 1) // r + (1 if traced() else 0) for side in (height, width))
        canvas = unflatten(q.flatten(2).transpose(1, 2), 2, (height, width))
        canvas = F.pad(canvas, (0, wide * r - width, 0, high * r - height))
        kernel = self.landmarks.to(q.dtype).repeat(self.num_heads, 1, 1, 1)
        cells = F.conv2d(canvas, kernel, stride=r, groups=self.num_heads)
        high, wide = cells.shape[2:]
        marks = unflatten(cells.permute(0, 2, 3, 1).flatten(1, 2), -1, q.shape[2:])
        marks = F.gelu(self.norm(marks)).transpose(1, 2)
        if layout.sizes is None and not traced():
            return marks, None
        sides: Any = (height, width) if layout.sizes is None else layout.sizes.to(q.device)[..., None].unbind(1)
        rows, columns = (
            torch.arange(count, device=q.device)[None] * r < side
            for count, side in zip((high, wide), sides, strict=True)
        )
        return marks, (rows[:, :, None] & columns[:, None]).flatten(1).to(q.dtype)

    def inverse(self, among: Tensor) -> Tensor:
        """S `(B, H, m, m)` of A."""
        sums = among.sum(dim=-1)
        most = sums.amax(dim=-1)[..., None, None]
        one = torch.eye(among.shape[-1], dtype=among.dtype, device=among.device)
        a = among if self.normalised else among + 0.01 * one
        if not self.normalised:
            with torch.no_grad():
                inverse = inverted(a, a * (1.8 / most.square()))
            change = inverse @ a @ inverse  # 0, with the gradient of an inverse
            return inverse - (change - change.detach()) if torch.is_grad_enabled() else inverse
        inverse = inverted(a, a * (1.8 / most.square()) if not self.original else original_start(a, sums))
        root = torch.rsqrt(sums)
        return root[..., None] * inverse * root[..., None, :]


def inverted(a: Tensor, start: Tensor) -> Tensor:
    """The inverse of A by Newton's steps from `start`."""
    for _ in range(_STEPS):
        start = 2 * start - start @ a @ start
    return start


def original_start(a: Tensor, sums: Tensor) -> Tensor:
    """A times the step that the whole batch shares, of its row `sums`; no test waits for the device."""
    step = 2 / F.pad(sums.flatten(), (0, 1)).amax(dim=0).square()
    one, square = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), a @ a
    for _ in range(10):
        off = F.pad((one - step * square).abs().sum(dim=-2).flatten(), (0, 1)).amax(dim=0)
        step = torch.where(off > 1.01, step / 2, step)
    return a * step


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a - b|^2 / 2) of `(B, H, n, D)` and `(B, H, m, D)`: `(B, H, n, m)`."""
    squares = a.square().sum(dim=-1)[..., None] + b.square().sum(dim=-1)[..., None, :]
    return torch.exp(-0.5 * (squares - 2 * a @ b.transpose(-1, -2)).clamp(min=0))
