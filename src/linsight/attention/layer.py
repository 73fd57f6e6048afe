"""The layer around a core: projections as data, checks, and nothing that depends on the image size."""

import functools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, LayoutLike, as_layout, check_tokens, each_grid, foldable, mask_tokens, watched

from .core import Capabilities, Core, Linear, Rename, Tokens, merge_heads, split_heads
from .packed import mark_packed, mix_packed
from .parts.reduction import Reduction, reduced
from .registry import mechanism, require


class Projection(NamedTuple):
    """One linear map of a layer: its name in the state dict, and which of q, k, v it yields, in order."""

    name: str
    parts: tuple[str, ...]


# What no projection yields is the layer's input itself.
PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    "qkv": (Projection("qkv", ("q", "k", "v")),),
    "q_kv": (Projection("q", ("q",)), Projection("kv", ("k", "v"))),
    "q_k_v": (Projection("q", ("q",)), Projection("k", ("k",)), Projection("v", ("v",))),
    "qk": (Projection("qk", ("q", "k")),),
    "qkvx": (Projection("qkv", ("q", "k", "v", "extra")),),
}


class Layer(nn.Module):
    """What a host calls: tokens and their layout in, tokens out. `Attention` is the usual one.

    A mechanism registered with `kind="layer"` derives from it, with a constructor that takes
    `(dim, num_heads, *, ..., device=None, dtype=None)` and its options.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    published: ClassVar[tuple[Rename, ...]] = ()

    def forward(
        self,
        x: Tensor,
        layout: LayoutLike,
        *,
        keep: Tensor | None = None,
        context: Tensor | None = None,
        context_layout: LayoutLike | None = None,
        score_bias: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`. With `@each_image` it takes packed batches, too, one grid at a time."""
        raise NotImplementedError

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()


def check_asked(
    owner: type[nn.Module],
    layout: Layout,
    *,
    keep: Tensor | None = None,
    context: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> None:
    """Raise a CapabilityError, naming who can, for what `owner` is asked and has not declared."""
    if keep is context is score_bias is layout.sizes is None and not layout.is_packed:
        return require(owner, "prefix", "prefix tokens") if layout.grid.prefix else None
    asked = (
        (keep is not None, "keep", "dropping tokens"),
        (layout.sizes is not None, "sizes", "padded batches"),
        (layout.is_packed, "packed", "packed batches"),
        (context is not None, "cross", "keys of another sequence"),
        (score_bias is not None, "score_bias", "a bias on the scores"),
        (layout.prefix > 0, "prefix", "prefix tokens"),
    )
    for present, capability, words in asked:
        if present:
            require(owner, capability, words)


class Attention(Layer):
    """A mechanism as a drop-in layer: projections, a core, an output projection.

    Made by `create_attention`. Any height and width at call time; the state dict has `qkv` (or
    `q`, `kv`), `proj`, and the core's own parameters under `core`.
    """

    def __init__(
        self,
        core: Core,
        dim: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        projections: str | None = None,
        reduction: int = 1,
        pool: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        reducing = reduction > 1 or pool > 0
        self.widths = {"q": dim, "k": dim, "v": dim, "extra": core.extra_dim}  # of the parts
        self.num_heads: int = core.num_heads  # type: ignore[assignment]
        self.layout_name = projections or ("q_kv" if reducing else core.projections)
        layout = PROJECTIONS[self.layout_name]
        if reducing and any("q" in projection.parts and len(projection.parts) > 1 for projection in layout):
            raise LinsightError("a reduction needs keys and values projected apart from queries: projections='q_kv'")
        for projection in layout:
            out = sum(self.widths[part] for part in projection.parts)
            self.add_module(projection.name, nn.Linear(dim, out, bias=qkv_bias and core.qkv_bias, **factory))
        self.reduction = Reduction(dim, reduction, pool=pool, **factory) if reducing else None
        self.core = core
        self.proj = nn.Linear(core.out_dim or dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    @mark_packed
    def forward(
        self,
        x: Tensor,
        layout: LayoutLike,
        *,
        keep: Tensor | None = None,
        context: Tensor | None = None,
        context_layout: LayoutLike | None = None,
        score_bias: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens `x` `(B, P + H*W, C)`, which lie as `layout` says; the shape is kept.

        Args:
            x: tokens; queries are made from them.
            layout: their grid, or a `Layout` for padded and packed batches. Packed images are mixed each alone: in a
                packed context, the i-th image reads the i-th.
            keep: `(B, N)` bool, False for tokens (of the context, if there is one) not to be seen.
            context: `(B, N, C)` tokens that keys and values are made from instead of `x`.
            context_layout: their layout.
            score_bias: `(B or 1, H or 1, M, N)`, added to the scores.
            cond: `(B, M, C)`, what the host conditions the layer on, if the mechanism takes that; `x` if None.

        Raises:
            CapabilityError: the formula of the mechanism does not define what is asked.
            LinsightError: token counts and layouts do not match.
        """
        layout = as_layout(layout)
        check_tokens(x, layout)
        if self.reduction is not None:
            require(type(self.core), "reduced", "keys of a reduced grid")
        check_asked(type(self.core), layout, keep=keep, context=context, score_bias=score_bias)
        if context is not None and getattr(self.core, "causal", False):
            raise CapabilityError("the causal form orders one sequence: pass causal=False, or no context")
        if keep is context is score_bias is layout.sizes is None and not layout.is_packed:
            out = self._folded(x, layout, cond)
            if out is not None:
                return self.proj_drop(out)
        source, source_layout = x, layout
        if context is not None:
            if context_layout is None:
                raise LinsightError("context= needs context_layout=, the grid of its tokens")
            source, source_layout = context, as_layout(context_layout)
            check_tokens(source, source_layout, "context")
        inside = source_layout.keep(source.device)
        if inside is not None:
            keep = inside if keep is None else keep & inside
        if keep is not None:  # before the projections: 0 * NaN in a gradient is NaN
            source = mask_tokens(source, keep)
            if context is None:
                x, cond = source, None if cond is None else mask_tokens(cond, keep)
        if self.reduction is not None:
            source, source_layout = self._reduce(source, source_layout, keep)
        tokens = self.tokens(x, source, source_layout, keep)
        if cond is not None and self.core.conditioned:
            tokens = tokens._replace(x=cond)
        core = functools.partial(mix_packed, self.core) if layout.is_packed or source_layout.is_packed else self.core
        out = core(
            tokens, layout, context_layout=None if source_layout is layout else source_layout, score_bias=score_bias
        )
        return self.conclude(merge_heads(out), x)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """What the core sees: queries of `x`, keys and values of `source`, which lies as `layout` says."""
        parts = self._project(x, source)
        q, k, v = (split_heads(parts[name], self.num_heads) for name in "qkv")
        return Tokens(q, k, v, x, keep, parts.get("extra"))

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """The output of the layer, of that of the core `(B, M, core.out_dim)`."""
        return self.proj_drop(self.proj(out))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width, those of `x`."""
        self.core.set_grid(self.reduction.grid(grid) if self.reduction is not None else grid)

    def _folded(self, x: Tensor, layout: Layout, cond: Tensor | None) -> Tensor | None:
        """All but the dropout in one, where the core can; None where not, or where others look at its parts."""
        core, proj, projections = self.core, self.proj, PROJECTIONS[self.layout_name]
        # A class derived from one that has it may have another formula.
        known = "folded" in vars(type(core)) and type(self) is Attention and type(proj) is nn.Linear
        if not known or not foldable(x, proj.weight, compiled=True) or not core.folds(x):
            return None
        if self.reduction is not None or projections[-1].parts == ("q", "k") or watched(core):
            return None
        if cond is not None and cond.shape[:2] != x.shape[:2]:
            return None
        maps = []
        for name in (*(projection.name for projection in projections), "proj"):
            linear = getattr(self, name)
            weight = linear._parameters.get("weight")
            # Others, and weights that are quantised or sharded, have ways of their own to make a product.
            if type(linear) is not nn.Linear or type(weight) not in (nn.Parameter, Tensor) or watched(linear):
                return None
            maps.append(Linear(weight, linear.bias))
        return core.folded(x, maps, layout, x if cond is None or not core.conditioned else cond)

    def _reduce(self, x: Tensor, layout: Layout, keep: Tensor | None) -> tuple[Tensor, Layout]:
        assert self.reduction is not None
        reduction = self.reduction
        if keep is not None or layout.prefix:
            raise LinsightError("a spatial reduction takes neither dropped nor prefix tokens; use reduction=1")
        if layout.is_packed:
            x = each_grid(lambda part, own: reduction(part, own.grid)[0], x, layout)
            return x, Layout.packed([Grid(*reduction.grid(grid[:2])) for grid in layout.grids])
        x, grid = reduction(x, layout.grid)
        return x, Layout(grid)

    def _project(self, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        """q from `x`, the rest from `source`, each `(B, N, width)`; what is not projected is its input."""
        found = {"q": x, "k": source, "v": source}
        for projection in PROJECTIONS[self.layout_name]:
            linear: Any = getattr(self, projection.name)
            parts, widths = projection.parts, [self.widths[part] for part in projection.parts]
            if "q" in parts and len(parts) > 1 and source is not x:  # one weight, two inputs
                split = [widths[0], sum(widths[1:])]
                bias = (None, None) if linear.bias is None else linear.bias.split(split)
                weight = linear.weight.split(split)
                found["q"] = F.linear(x, weight[0], bias[0])
                rest = F.linear(source, weight[1], bias[1]).split(widths[1:], dim=-1)
                found.update(zip(parts[1:], rest, strict=True))
            else:
                out = linear(x if "q" in parts else source)
                found.update(zip(parts, out.split(widths, dim=-1), strict=True))
        return found


_LAYER_OPTIONS = ("qkv_bias", "proj_bias", "proj_drop", "projections", "reduction", "pool")


def create_attention(
    name: str,
    dim: int,
    num_heads: int = 8,
    *,
    grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Layer:
    """A layer of `dim` channels and `num_heads` heads with the mechanism `name`.

    `grid` is the height and width, in tokens, that position tables are made for, of mechanisms that have
    them: without it they have none. It does not limit the sizes that the layer works on. `index` is the place
    of the layer's block in a model, from 0, for mechanisms that differ from block to block. `options` are
    those of the mechanism (`linsight info NAME`) and of `Attention`: qkv_bias, proj_bias, proj_drop,
    projections, reduction (PVT's, of keys and values) and pool (PVTv2's).

    >>> layer = create_attention("inline", 64, 4)
    >>> layer(torch.randn(2, 1 + 6 * 10, 64), Grid(6, 10, prefix=1)).shape
    torch.Size([2, 61, 64])

    Raises:
        UnknownNameError: no such mechanism, option or value; the nearest is offered.
        LinsightError: `num_heads` does not divide `dim`.
    """
    entry = mechanism(name)
    if entry.kind == "block":
        raise LinsightError(f"'{name}' is a whole block, not an attention layer: use it in a model")
    if num_heads < 1 or dim % num_heads:
        raise LinsightError(f"num_heads={num_heads} does not divide dim={dim}: choose a divisor of {dim}")
    layer = {key: options.pop(key) for key in _LAYER_OPTIONS if key in options}
    if layer.get("projections") not in (None, *PROJECTIONS):
        raise LinsightError(f"unknown projections '{layer['projections']}': known are {', '.join(PROJECTIONS)}")
    entry.check_options(options)
    if entry.kind == "layer":
        place = entry.placed(grid, index)
        made = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **layer, **options)
        assert isinstance(made, Layer)
        return made
    place = {"grid": grid, "query_grid": grid, "index": index}
    if grid is not None:
        place["grid"] = reduced(grid, layer.get("reduction", 1), layer.get("pool", 0))
    core = create_core(name, dim, num_heads, device=device, dtype=dtype, **place, **options)
    around: Any = core.layer or Attention
    return around(core, dim, device=device, dtype=dtype, **layer)


def create_core(
    name: str,
    dim: int,
    num_heads: int,
    *,
    grid: tuple[int, int] | None = None,
    query_grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Core:
    """The mechanism `name` without projections, for hosts that have their own. `grid` is that of the keys.

    `query_grid` is that of the queries, where it is another.

    Raises:
        UnknownNameError: no such mechanism, option or value.
        LinsightError: the mechanism is more than a core.
    """
    entry = mechanism(name)
    if entry.kind != "core":
        raise LinsightError(f"'{name}' is a whole {entry.kind}, without a core of its own")
    entry.check_options(options)
    place = entry.placed(grid, index, query_grid)
    core = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **options)
    assert isinstance(core, Core)
    return core
