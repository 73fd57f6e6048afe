"""The layer around a core: projections, checks, and nothing that depends on the image size."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, LayoutLike, each_grid, mask_tokens

from .capabilities import Capabilities, Structure
from .checks import check_asked, check_beside, entered, held
from .core import Core, Rename
from .nodes import Node
from .packed import each_image, mark_packed, mix_packed
from .parts.reduction import Reduction
from .projections import OF_QUERIES, PROJECTIONS
from .registry import require
from .tokens import Tokens, merge_heads, split_heads


class Layer(Node):
    """The module that a host calls: tokens and their layout in, tokens out. `Attention` is the usual one.

    A mechanism registered with `kind="layer"` derives from it, with a constructor that takes
    `(dim, num_heads, *, ..., device=None, dtype=None)` and its options, sets `dim`, and defines `mix`.
    """

    dim: int

    capabilities: Capabilities = Capabilities()
    structure: Structure = Structure()
    published: ClassVar[tuple[Rename, ...]] = ()
    unmet: ClassVar[Mapping[str, str]] = {}  # as of a `Core`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for flag in ("cross", "score_bias"):  # else what a caller passes would be lost without a word
            if getattr(cls.capabilities, flag) and cls.forward is Layer.forward:
                raise LinsightError(f"{cls.__name__} declares {flag}, which `mix` is not given: define `forward`, too")

    @each_image
    def forward(
        self,
        x: Tensor,
        layout: LayoutLike | None = None,
        *,
        keep: Tensor | None = None,
        context: Tensor | None = None,
        context_layout: LayoutLike | None = None,
        score_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens `x` `(B, P + H*W, C)`, which lie as `layout` says, once they fit; see `Attention.forward`."""
        found = entered(x, layout, dim=self.dim, weight=self.weight())
        check_asked(self, found, keep=keep, context=context, score_bias=score_bias)
        check_beside(x, found, keep=keep, residual=residual)
        return self.mix(x, found, keep)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `x` `(B, P + H*W, C)`, mixed; `keep` `(B, N)` is False for those not to be seen.

        They have been looked at, and are those of images of one grid: a packed batch comes grid by grid.
        """
        raise NotImplementedError

    def weight(self) -> Tensor | None:
        """A parameter of the layer, for the dtype and the device that tokens must have; None: they may have any."""
        return None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()


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
        self.dim = dim
        inner = core.inner_dim or dim
        self.widths = {"q": inner, "k": inner, "v": inner, "extra": core.extra_dim}  # of the parts
        self.num_heads: int = core.num_heads  # type: ignore[assignment]
        self.layout_name = projections or (core.reduced_projections if reducing else core.projections)
        layout = PROJECTIONS[self.layout_name]
        if reduction > 1 and pool > 0:
            raise LinsightError(f"reduction={reduction} and pool={pool}: keys are reduced one way, pass one of them")
        if reducing and core.rotary:
            raise CapabilityError(
                "rotary=True: keys of a reduced grid have no places among the tokens: pass reduction=1 and pool=0"
            )
        if reducing and any(
            0 < len({*projection.parts} & {*OF_QUERIES}) < len(projection.parts) for projection in layout
        ):
            raise LinsightError(
                "a reduction needs keys and values projected apart from queries: "
                f"projections='{core.reduced_projections}'"
            )
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
        layout: LayoutLike | None = None,
        *,
        keep: Tensor | None = None,
        context: Tensor | None = None,
        context_layout: LayoutLike | None = None,
        score_bias: Tensor | None = None,
        residual: Tensor | None = None,
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
            residual: `(B, M, C)`, the residual stream before the norm that made `x`, for mechanisms that read it; `x`
                if None.

        Raises:
            CapabilityError: the formula of the mechanism does not define what is asked.
            LinsightError: tokens and layouts do not match, or what is given has another shape or dtype.
        """
        layout = entered(x, layout, dim=self.dim, weight=self.weight())
        if self.reduction is not None:
            require(self.core, "reduced", "keys of a reduced grid")
        check_asked(self.core, layout, keep=keep, context=context, score_bias=score_bias)
        beside: dict[str, Any] = {"context": context, "score_bias": score_bias, "residual": residual}
        check_beside(x, layout, keep=keep, heads=self.num_heads, **beside)
        source, source_layout = x, layout
        if context is not None:
            if self.core.causal:
                raise CapabilityError("the causal form orders one sequence: pass causal=False, or no context")
            if context_layout is None:
                raise LinsightError("context= needs context_layout=, the grid of its tokens")
            source = context
            source_layout = entered(context, context_layout, dim=self.dim, weight=self.weight(), name="context")
            x = mask_tokens(x, layout.keep(x.device))  # padding of its own, which `keep` does not tell of
        elif context_layout is not None:
            raise LinsightError("context_layout= came without context=, the tokens that lie so")
        inside = source_layout.keep(source.device)
        if inside is not None:
            keep = inside if keep is None else keep & inside
        if keep is not None:  # before the projections: 0 * NaN in a gradient is NaN
            source = mask_tokens(source, keep)
            if context is None:
                x, residual = source, None if residual is None else mask_tokens(residual, keep)
        if self.reduction is not None:
            source, source_layout = self._reduce(source, source_layout, keep)
        tokens = self.tokens(x, source, source_layout, keep)
        if residual is not None and self.core.reads_residual:
            tokens = tokens._replace(residual=residual)
        core = functools.partial(mix_packed, self.core) if layout.is_packed or source_layout.is_packed else self.core
        beside = {} if source_layout is layout else {"context_layout": source_layout}
        if score_bias is not None:
            beside["score_bias"] = score_bias
        return self.conclude(merge_heads(core(tokens, layout, **beside)), x)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """The tokens for the core: queries of `x`, keys and values of `source`, which lies as `layout` says."""
        parts = self._project(self.given(x, source))
        q, k, v = (split_heads(parts[name], self.num_heads) for name in "qkv")
        return Tokens(q, k, v, x, keep, parts.get("extra"))

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.proj)

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """The output of the layer, of that of the core `(B, M, core.out_dim)`."""
        return self.proj_drop(self.proj(out))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width, those of `x`."""
        self.core.set_grid(self.reduction.grid(grid) if self.reduction is not None else grid)

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

    def given(self, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        """The tokens that each part is projected from: queries and extra channels from `x`, keys and values `source`.

        A layer with maps in front of its projections overrides this. A projection of several parts is called once for
        each tensor that they are given.
        """
        return {part: x if part in OF_QUERIES else source for part in self.widths}

    def _project(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of what each is `given`, `(B, N, width)`; what is not projected is its input."""
        found = {part: given[part] for part in "qkv"}
        for projection in PROJECTIONS[self.layout_name]:
            linear = getattr(self, projection.name)
            widths = [self.widths[part] for part in projection.parts]
            called: list[Tensor] = []
            for tokens in (given[part] for part in projection.yields):
                if any(tokens is other for other in called):
                    continue
                called.append(tokens)  # called for each: hooks and parametrizations see it
                made = dict(zip(projection.parts, linear(tokens).split(widths, dim=-1), strict=True))
                made |= dict.fromkeys(projection.also, made[projection.parts[0]])
                found |= {part: out for part, out in made.items() if given[part] is tokens}
        return found
