"""An attention shaped like `torch.nn.MultiheadAttention`, with its parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import (
    PROJECTIONS,
    Attention,
    Tokens,
    check_asked,
    check_beside,
    create_core,
    entered,
    held,
    merge_heads,
    one_node,
    require,
    split_heads,
)
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, mask_tokens, traced, unflatten

from ._place import GridLike, check_prefix, lies_on_grid, locate, refuse, score_bias, table_grid

# Arguments of torch's that linear attention has nothing to do with.
_REFUSED = {
    "dropout": "no mechanism here drops scores, pass dropout=0",
    "add_bias_kv": "there are no keys that all images share, pass add_bias_kv=False",
    "add_zero_attn": "there is no softmax that could look away, pass add_zero_attn=False",
    "kdim": "keys are projected from as many channels as queries, pass kdim=None",
    "vdim": "values are projected from as many channels as queries, pass vdim=None",
}


class MultiheadAttention(nn.Module):
    """A mechanism of ours in the place of a `torch.nn.MultiheadAttention`: same call, same parameters.

    The state dict has `in_proj_weight`, `in_proj_bias` and `out_proj` as torch's, and those of the mechanism under
    `core`, if it has some. With `attention="softmax"` it computes what torch's does.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first: as torch's; dropout must be 0.
        attention: the mechanism.
        grid: where tokens lie: `(height, width)`, a `Grid`, or "1d" for 1 x N. May be set later, as `module.grid`,
            and given with the call. Only mechanisms that do not care, as softmax and linear, can go without.
        prefix: tokens in front that have no place on the grid, as a class token.
        key_grid: that of keys of another sequence, in cross-attention; theirs has no prefix unless it says so.
        options: of the mechanism, and further arguments of torch's as long as they ask for nothing.

    Raises:
        LinsightError: an argument of torch's that linear attention cannot honour.
        CapabilityError: a mechanism whose projections are not torch's.
    """

    in_proj_bias: Tensor | None
    _qkv_same_embed_dim = False  # torch's encoder layers then call us, rather than a kernel on our weights

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        attention: str = "inline",
        grid: GridLike | None = None,
        prefix: int = 0,
        key_grid: GridLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        asked = {"dropout": dropout} | {name: options.pop(name) for name in _REFUSED if name in options}
        refuse({name: value for name, value in asked.items() if value != embed_dim}, _REFUSED)
        whole = isinstance(embed_dim, int) and isinstance(num_heads, int)
        if whole and (num_heads < 1 or embed_dim % num_heads):
            raise LinsightError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}: choose a divisor")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        place: dict[str, Any] = {"grid": table_grid(grid), "query_grid": table_grid(grid)}
        core = create_core(attention, embed_dim, num_heads, **place, **factory, **options)
        parts = {part for projection in PROJECTIONS[core.projections] for part in projection.parts}
        around: Any = core.layer or Attention
        usual = all(getattr(around, way) is getattr(Attention, way) for way in ("given", "tokens", "conclude"))
        if parts != {"q", "k", "v"} or core.out_dim not in (None, embed_dim) or not usual:
            raise CapabilityError(
                f"'{attention}' has projections of its own, which in_proj_weight does not hold: use create_attention"
            )
        check_prefix(type(core), prefix)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        self.attention = attention
        self.grid, self.prefix, self.key_grid = grid, prefix, key_grid
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.register_parameter(
            "in_proj_bias",
            nn.Parameter(torch.zeros(3 * embed_dim, **factory)) if bias and core.qkv_bias else None,
        )
        self.core = core
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        grid: GridLike | None = None,
        key_grid: GridLike | None = None,
    ) -> tuple[Tensor, None]:
        """The output, and None: there are no weights, so `need_weights` and `average_attn_weights` change nothing.

        Self-attention is told by query and key being one tensor, not two equal ones; the value may be another.

        Args:
            query, key, value: `(N, B, C)`, `(B, N, C)` with batch_first, or `(N, C)`.
            key_padding_mask: `(B, N)`, True for keys to ignore. In floats, 0 keeps and less drops, where the
                mechanism has no scores that they could be added to.
            attn_mask: `(M, N)` or `(B * heads, M, N)`, True for pairs to ignore, or numbers to add to the
                scores; for mechanisms that have scores.
            is_causal: says that attn_mask is the causal one; mechanisms built with `causal=True` need no mask for it.
            grid, key_grid: where these tokens lie, if not as the module says.

        Raises:
            CapabilityError: the formula of the mechanism does not define what is asked.
            LinsightError: there is no grid, or the tokens do not fit it.
        """
        if query.is_nested:
            raise LinsightError("nested tensors are not supported: pass enable_nested_tensor=False to the encoder")
        batched = query.ndim == 3
        if not traced() and (query.ndim not in (2, 3) or {key.ndim, value.ndim} != {query.ndim}):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise LinsightError(
                f"query, key and value have shapes {shapes}: give all three 3 axes, or 2 without a batch"
            )

        def batch(x: Tensor) -> Tensor:  # (B, N, C)
            if not batched:
                return x[None]
            return x if self.batch_first else x.transpose(0, 1)

        q = batch(query)
        k = q if key is query else batch(key)
        v = k if value is key else batch(value)
        keep, bias = self._masks(q, key_padding_mask, attn_mask, is_causal)
        layout, source = Layout(self._locate(q, grid, self.grid, self.prefix)), None
        if k is not q:
            self._require_cross()
            source = Layout(self._locate(k, key_grid, self.key_grid, 0))
        self._check(q, k, v, layout, source, keep, bias)
        check_asked(type(self.core), layout, keep=keep, score_bias=bias)
        if keep is not None:  # for keys and values alone, as torch has it: ignored tokens may still ask
            k, v = mask_tokens(k, keep), mask_tokens(v, keep)
        tokens = Tokens(*self._project(q, k, v), x=q, keep=keep)
        beside = {"context_layout": source, "score_bias": bias}
        out = self.core(tokens, layout, **{name: value for name, value in beside.items() if value is not None})
        out = self.out_proj(merge_heads(out))
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """From now on tokens lie on another height and width, to which parameters on a grid are resampled."""
        self.grid = (grid[0], grid[1])
        self.core.set_grid(self.grid)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, attention='{self.attention}', grid={self.grid}"

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        source: Layout | None,
        keep: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Raise a LinsightError where tokens and masks fit neither the module nor each other."""
        shared: dict[str, Any] = {"dim": self.embed_dim, "weight": held(self)}
        entered(q, layout, name="query", **shared)
        entered(k, source or layout, name="key", **shared)
        entered(v, source or layout, name="value", **shared)
        check_beside(q, layout, keep=keep, context=None if k is q else k, score_bias=bias, heads=self.num_heads)
        if not traced() and v.shape[0] != k.shape[0]:
            raise LinsightError(f"value has {v.shape[0]} images, but the key has {k.shape[0]}: one value for each key")

    def _locate(self, x: Tensor, given: GridLike | None, own: GridLike | None, prefix: int) -> Grid:
        grid = own if given is None else given
        if grid is None:
            if lies_on_grid(self.core):
                raise LinsightError(
                    f"'{self.attention}' needs to know where tokens lie: pass grid=(height, width), or '1d' for a "
                    f"sequence, to MultiheadAttention or with the call, or set module.grid"
                )
            grid = "1d"
        return locate(grid, prefix, x)

    def _masks(
        self, q: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Masks of torch as our `keep` `(B, N)` and `score_bias`, which broadcasts to `(B, H, M, N)`."""
        kind = self.core
        scores = self.core.capabilities.score_bias
        keep = bias = None
        if is_causal and self.core.causal:
            mask = None
        elif is_causal and (mask is None or not scores):
            require(kind, "causal", "a causal mask")
            raise CapabilityError(f"'{self.attention}' is causal if it is built so: MultiheadAttention(causal=True)")
        if mask is not None:
            require(kind, "score_bias", "attn_mask, a mask of pairs")
            bias = score_bias(mask, mask, q)
            if mask.ndim not in (2, 3) or (mask.ndim == 3 and mask.shape[0] != q.shape[0] * self.num_heads):
                raise LinsightError(f"attn_mask has shape {tuple(mask.shape)}: give (M, N), or (batch * heads, M, N)")
            bias = bias if mask.ndim == 2 else unflatten(bias, 0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = padding if padding.ndim != 1 else padding[None]
            if padding.ndim != 2 or not (padding.dtype == torch.bool or padding.is_floating_point()):
                raise LinsightError(
                    f"key_padding_mask is {padding.dtype} of shape {tuple(padding.shape)}: give (batch, keys), in bool "
                    f"or floats"
                )
            if padding.dtype == torch.bool:
                keep = ~padding
            elif scores:
                added = padding.to(q.dtype)[:, None, None]
                bias = added if bias is None else bias + added
            else:
                keep = padding >= 0
        return keep, bias

    def _require_cross(self) -> None:
        require(type(self.core), "cross", "keys of another sequence (self-attention passes one tensor as both)")
        if getattr(self.core, "causal", False):
            raise CapabilityError("the causal form orders one sequence: pass causal=False, or the query as the key")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `(B, N, H, D)`."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            weights, biases = weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)


def successor(old: nn.MultiheadAttention, attention: str, **ours: Any) -> MultiheadAttention:
    """A module of ours for one of torch's; weights are not copied. Its dropout is left out."""
    weight = old.out_proj.weight
    return MultiheadAttention(
        old.embed_dim,
        old.num_heads,
        bias=old.out_proj.bias is not None,
        batch_first=old.batch_first,
        attention=attention,
        device=weight.device,
        dtype=weight.dtype,
        kdim=old.kdim,
        vdim=old.vdim,
        add_bias_kv=old.bias_k is not None,
        add_zero_attn=old.add_zero_attn,
        **ours,
    )
