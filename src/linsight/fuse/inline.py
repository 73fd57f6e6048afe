"""InLine's layer, its projections folded into the covariance.

The formula of `linsight.attention.mechanisms.inline` in two other orders, for a CPU: of many tokens, without queries
and keys, in bfloat16 too where that is native; of one small image, in the fewest calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from linsight.attention import PROJECTIONS, Attention, check_beside, entered
from linsight.attention.mechanisms.inline import InLine
from linsight.ops import (
    Layout,
    LayoutLike,
    accumulator,
    as_layout,
    autocasts,
    dynamic_depthwise_conv,
    full_precision,
    in_example,
)
from linsight.ops.cpu import halves

from .form import form_of

_FEW = 2**17  # numbers, of which nine products added in place are quicker than one convolution


class Linear(NamedTuple):
    """weight: `(out, in)`.  bias: `(out,)`, or None."""

    weight: Tensor
    bias: Tensor | None

    def split(self, width: int) -> "list[Linear]":
        """The maps that yield `width` channels each, in order."""
        weights = self.weight.split(width)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(width)
        return list(map(Linear, weights, biases))

    def to(self, dtype: torch.dtype) -> "Linear":
        """The map in another dtype."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class FoldedInLine(Attention):
    """InLine's layer without queries and keys; where that does not pay, as of masked tokens, the plain one."""

    def forward(self, x: Tensor, layout: LayoutLike | None = None, **beside: Any) -> Tensor:
        """Mix the tokens `x` `(B, P + H*W, C)`; see `Attention.forward`."""
        residual = beside.pop("residual", None)
        dtype = None if layout is None or any(map(_given, beside.values())) else self._pays_in(x, residual)
        if layout is None or dtype is None:
            return super().forward(x, layout, residual=residual, **beside)
        lies = as_layout(layout)
        if lies.sizes is not None or lies.is_packed:
            return super().forward(x, lies, residual=residual)
        entered(x, lies, dim=self.dim)
        check_beside(x, lies, residual=residual)
        maps = (getattr(self, projection.name) for projection in PROJECTIONS[self.layout_name])
        linears = [Linear(linear.weight, linear.bias) for linear in maps]
        core: Any = self.core
        given = (core, x, linears, Linear(self.proj.weight, self.proj.bias), lies, residual)
        few = dtype == accumulator(dtype) and not torch.compiler.is_compiling() and is_few(x)
        return of_few(*given) if few else of_many(*given, dtype)

    def _pays_in(self, x: Tensor, residual: Tensor | None) -> torch.dtype | None:
        """The dtype of products with which folding pays, or None.

        On a CPU in full precision, of as many tokens as channels, or of one small image; in a compiled graph, of four
        times as many, if that is known; in an exported one, if its example has as many. In bfloat16 where the CPU
        multiplies that natively.
        """
        if not x.is_cpu or x.requires_grad or x.ndim != 3 or (residual is not None and residual.requires_grad):
            return None
        if "forward" in vars(self.core):  # tiles and ranks ask the core for its rounds
            return None
        batch, n, width = x.shape
        dtype = torch.get_autocast_dtype("cpu") if autocasts(x) else x.dtype
        if dtype == torch.bfloat16:
            known = self.proj.weight.dtype in (dtype, torch.float32) and (autocasts(x) or x.dtype == dtype)
            pays = known and halves.is_native() and batch > 0 and n >= width and not torch.compiler.is_compiling()
            return dtype if pays else None
        if autocasts(x) or x.dtype != self.proj.weight.dtype or dtype != accumulator(dtype):
            return None
        if torch.compiler.is_exporting():
            free_of_one = not isinstance(batch, int) and in_example(batch) == 1  # which products of a batch would keep
            pays = not free_of_one and (in_example(n) or 0) >= width
        elif torch.compiler.is_compiling():
            pays = statically_known_true(n >= 4 * width)
        else:
            pays = batch > 0 and (n >= width or is_few(x))
        return dtype if pays else None


def _given(value: Any) -> bool:
    return value is not None


def is_few(x: Tensor) -> bool:
    """One image `(1, N, C)` of so few tokens that products of C x C matrices cost what folding saves."""
    batch, n, width = x.shape
    return batch == 1 and n < 3 * width and n * width <= _FEW


def of_many(
    core: InLine,
    x: Tensor,
    linears: list[Linear],
    proj: Linear,
    layout: Layout,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The layer without queries and keys, which only enter products; those with tokens in `dtype`.

    Of one head, with W_q, W_k, W_v, W_p its rows, or columns, of the layer's maps:

        proj(o) = (x - mean(x)) W_q^T M + mean(q) M + mean(v) W_p^T + b_p + conv(v) W_p^T,
        M = s W_k Cov(x, v) W_p^T

    so a layer costs four products of its tokens with C x C matrices, as its linear maps alone do.
    """
    batch, n, width = x.shape
    heads, prefix, wide = core.num_heads, layout.prefix, accumulator(dtype)
    with full_precision(x):
        to_q, to_k, to_v = (linear.to(wide) for several in linears for linear in several.split(width))
        proj = proj.to(wide)
        mean = x.mean(dim=1, keepdim=True, dtype=wide)
        centred, mean_v = (x - mean).to(dtype), F.linear(mean, *to_v)
        v = F.linear(centred, to_v.weight.to(dtype))
        cross = v.transpose(-2, -1) @ centred if dtype == wide else halves.outer_sum(v, centred)
        cross = cross.view(batch, heads, -1, width)  # (B, H, E, C)
        k = to_k.weight.view(heads, -1, width)
        cov = k @ cross.transpose(-2, -1) * (k.shape[1] ** -0.5 / n)  # (B, H, D, E)
        matrix = (cov @ proj.weight.view(-1, heads, cov.shape[-1]).permute(1, 2, 0)).flatten(1, 2)  # (B, H * D, C)
        shift = F.linear(mean_v, *proj) + F.linear(mean, *to_q) @ matrix
        out = torch.baddbmm(shift.to(dtype), centred, (to_q.weight.transpose(-2, -1) @ matrix).to(dtype))
        if core.generator is not None:
            kernels = _kernels(core, mean, residual).to(dtype)
            local = dynamic_depthwise_conv(v.add_(mean_v)[:, prefix:], layout.grid[:2], kernels)
            back = proj.weight.transpose(-2, -1).to(dtype)
            if torch.compiler.is_exporting():  # what is written into a part would be scattered
                return out + F.pad(local @ back, (0, 0, prefix, 0))
            out[:, prefix:].baddbmm_(local, back.expand(batch, -1, -1))
    return out


def of_few(
    core: InLine, x: Tensor, linears: list[Linear], proj: Linear, layout: Layout, residual: Tensor | None
) -> Tensor:
    """The formula, of one image, in the fewest calls, each of which takes longer than what it computes."""
    _, n, width = x.shape
    heads, prefix = core.num_heads, layout.prefix
    q, k, v = (part for linear in linears for part in F.linear(x, *linear).split(width, dim=-1))
    share = x.new_full((1, 1, n), 1 / n)  # a product with it is a mean
    mean_v = torch.bmm(share, v)
    parts = (q, k - torch.bmm(share, k), v - mean_v)
    q, k, centred = (part.view(n, heads, -1).transpose(0, 1) for part in parts)  # (H, N, D)
    out = torch.baddbmm(
        mean_v.view(heads, 1, -1), q, torch.bmm(k.transpose(-2, -1), centred), alpha=k.shape[-1] ** -0.5 / n
    )
    out = out.transpose(0, 1).reshape(1, n, width)
    if core.generator is not None:
        kernels = _kernels(core, torch.bmm(share, x) if residual is None else x, residual)
        add_products(out[:, prefix:], v[:, prefix:], layout.grid[:2], kernels)
    return F.linear(out, *proj)


def _kernels(core: InLine, mean: Tensor, residual: Tensor | None) -> Tensor:
    """The kernels that the mean token generates: `(B, C, 3, 3)`."""
    assert core.generator is not None
    if residual is not None:
        mean = residual.mean(dim=1, keepdim=True, dtype=mean.dtype)
    return core.generator(mean[:, 0]).view(mean.shape[0], mean.shape[2], 3, 3)


def add_products(out: Tensor, x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
    """`out` `(B, H*W, C)` with the `linsight.ops.shifted_products` of `x` added to it in place, one after the other.

    For few numbers, of which a convolution takes as long to begin, and in full precision: each sum is rounded.
    """
    batch, _, channels = x.shape
    (height, width), k = size, kernels.shape[-1]
    pad = k // 2
    canvas = x.new_zeros(batch, height + 2 * pad, width + 2 * pad, channels)
    canvas[:, pad : pad + height, pad : pad + width] = x.unflatten(1, size)
    taps = kernels.flatten(2).permute(2, 0, 1).contiguous()[:, :, None, None]  # (k*k, B, 1, 1, C)
    grid = out.unflatten(1, size)
    _, row, token, _ = canvas.stride()
    for t in range(k * k):
        dy, dx = divmod(t, k)
        grid.addcmul_(canvas.as_strided(grid.shape, canvas.stride(), dy * row + dx * token), taps[t])
    return out


def layer_form(layer: Attention) -> nn.Module:
    """The layer around a core: InLine's, folded, where its linear maps are torch's own."""
    projections = PROJECTIONS[layer.layout_name]
    linears = [getattr(layer, projection.name) for projection in projections]
    weights = [getattr(linear, "weight", None) for linear in (*linears, layer.proj)]
    plain = all(type(linear) is nn.Linear for linear in (*linears, layer.proj)) and all(
        type(weight) is nn.Parameter for weight in weights
    )
    whole = [part for projection in projections for part in projection.parts] == ["q", "k", "v"]
    core: Any = layer.core
    bare = type(core) is InLine and core.feature_map == "identity" and not core.rotary and layer.reduction is None
    if not (plain and whole and bare):
        return form_of(layer, type(layer))
    return form_of(layer, FoldedInLine)


LAYER_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {Attention: layer_form}
