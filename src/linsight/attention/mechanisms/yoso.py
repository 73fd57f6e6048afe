"""YOSO: attention by Bernoulli sampling, where a key is seen with the probability that it is hashed as the query is.

Zeng et al., "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling", ICML 2021
(arXiv 2111.09714), by its published code. A hash of t bits is the signs of t random projections; per head, with
q^ = q / |q|, k^ = k / |k|,

    o_i = y_i / |y_i|,   y_i = sum_j p_ij v_j,   p_ij = (1 - arccos(q^_i . k^_j) / pi)^t

"sampled" estimates p by n hashes: each sums values into a table of 2^t rows, v_j into the row of its key, and query i
reads its own row. Its gradients are the published ones of less variance, estimated by the same hashes: dy_i of q^_i
and of k^_j are those of a p whose slope is (t / 2) p. They need a table d times as wide, made where gradients by
queries or keys are asked for. A query whose rows are all empty gives 0.

"pairs" is the same estimate with the same gradients, made by comparing the hashes of each query and key: without tables
it trains faster where there are fewer tokens than rows.

"expectation" has p itself, of all pairs, with its own gradient; cosines are multiplied by 0.98 before arccos, whose
slope at 1 is infinite.

Hashes are a buffer that heads share and checkpoints hold, so outputs are the same at every call. Published code draws
hashes anew at each call; here training does so before each update, by `redraw()`. Outputs jump where a query or a key
crosses a plane: who rounds them to half precision reads some other rows. A query sees only keys in its rows, so there
is no reduction of keys. Everything is computed in float32 (float64 for float64). The published convolution of values,
an option there, is left out.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Layout, Tile, accumulator, full_precision, leaves, mask_tokens, traced, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Renews
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_STRETCH = 2**14  # tokens that are added up one by one: more would lose digits


class Tables(Round):
    """Sums of values by the hash of their keys: `(B, H, n, 2^t, E)`, or `(..., E + D E)` where gradients are asked."""

    def absorb(self, core: "YOSO", tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The sums over the tile's tokens."""
        k, v = (mask_tokens(x, tokens.keep).to(accumulator(tokens.v.dtype)) for x in tokens[1:3])
        codes, rows = core.codes(k), v
        if torch.is_grad_enabled() and (tokens.q.requires_grad or k.requires_grad) and not leaves():
            products = F.normalize(k, dim=-1)[..., None] * v.detach()[..., None, :]
            rows = torch.cat([v, products.flatten(-2)], dim=-1)
        tables = [sums(code, rows, 2**core.bits) for code in codes.unbind(-1)]
        return torch.stack(tables).movedim(0, 2)  # each in a piece, as it is read


@register(
    "yoso",
    formula="o_i = y_i / |y_i|, y_i = sum_j p_ij v_j, p_ij = (1 - arccos(q^_i . k^_j) / pi)^t by n hashes of t bits",
    latex=r"o_i = \frac{y_i}{\lVert y_i \rVert}, \quad y_i = \sum_j p_{ij} v_j, \quad p_{ij} = \left( 1 - "
    r"\tfrac{1}{\pi} \arccos \frac{q_i \cdot k_j}{\lVert q_i \rVert \lVert k_j \rVert} \right)^t",
    family="hashing",
    complexity="O(N n t d)",
    paper=Paper(
        "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling", "2111.09714", "ICML 2021"
    ),
)
class YOSO(Core):
    """Attention to the keys that are hashed as the query is.

    Args:
        form: "sampled" by hashes; "pairs" the same of every pair; "expectation" of every pair without hashes.
        hashes: n.
        bits: t, of a hash; tables have 2^t rows.
        cosine_scale: the factor on cosines of the expectation.
    """

    planes: Tensor
    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True)
    rounds: tuple[Round, ...] = (Tables(),)
    held = "hashes"
    renews = Renews("drawn", 1)
    steps = "hashes"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Literal["sampled", "pairs", "expectation"] = "sampled",
        hashes: int = 8,
        bits: int = 8,
        cosine_scale: float = 0.98,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hashes < 1:
            raise LinsightError(f"hashes={hashes} of 'yoso' must be 1 or more; published are 16 to 64")
        if not 1 <= bits <= 16:
            raise LinsightError(f"bits={bits} of 'yoso' must be 1 to 16, for tables of 2^bits rows; published are 8, 9")
        if not 0 < cosine_scale <= 1:
            raise LinsightError(f"cosine_scale={cosine_scale} of 'yoso' must be above 0, and 1 or less")
        self.num_heads = num_heads
        self.form, self.bits, self.cosine_scale = form, bits, cosine_scale
        if form != "sampled":
            self.structure = self.structure._replace(stream=False, reduced=form == "expectation", cost=Cost.QUADRATIC)
            self.rounds = ()
        self.register_buffer("planes", torch.empty(hashes, bits, dim // num_heads, device=device, dtype=dtype))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw the hashes anew, as published training does at every call."""
        if not self.planes.is_meta:
            self.planes.normal_()

    def codes(self, x: Tensor) -> Tensor:
        """The hashes `(B, n, H, hashes)` of queries or keys `(B, n, H, D)`: the rows that they have in the tables."""
        planes = self.planes.to(x.dtype)
        with full_precision(x):
            sides = x.detach() @ planes.flatten(0, 1).transpose(0, 1) > 0
        places = 2 ** torch.arange(self.bits, device=x.device)
        return (unflatten(sides, -1, planes.shape[:2]).long() * places).sum(dim=-1)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The rows of the queries."""
        tables: Tensor = done[0]
        q, width = tokens.q.to(tables.dtype), tokens.v.shape[-1]
        found = torch.zeros((), dtype=q.dtype, device=q.device)
        for code, table in zip(self.codes(q).unbind(-1), tables.unbind(2), strict=True):
            rows = table.flatten(0, 2).index_select(0, rows_of(code, table.shape[2]).flatten())
            found = found + rows.unflatten(0, code.shape)  # (B, N, H, W)
        y = found[..., :width]
        if tables.shape[-1] > width:  # a slope alone: its value is taken away again
            products = found[..., width:].unflatten(-1, (-1, width))
            slope = self.bits / 2 * (F.normalize(q, dim=-1)[..., None] * products).sum(dim=-2)
            y = y + (slope - slope.detach())
        return F.normalize(y, dim=-1).to(tokens.q.dtype)

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """By tables, or by every pair."""
        if self.form == "sampled":
            return super().forward(tokens, layout, context_layout=context_layout)
        dtype = accumulator(tokens.v.dtype)
        q, k = (F.normalize(x.to(dtype), dim=-1) for x in (tokens.q, mask_tokens(tokens.k, tokens.keep)))
        v = mask_tokens(tokens.v, tokens.keep).to(dtype)
        with full_precision(v):
            cosines = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
            seen = self.shared(q, k, cosines) if self.form == "pairs" else self.expected(cosines)  # (B, H, N, M)
            out = seen @ v.transpose(1, 2)  # v is 0 where a key is not seen
        return F.normalize(out, dim=-1).transpose(1, 2).to(tokens.q.dtype)

    def expected(self, cosines: Tensor) -> Tensor:
        """p of each pair."""
        return (1 - torch.arccos(cosines.clamp(-1, 1) * self.cosine_scale) / math.pi) ** self.bits

    def shared(self, q: Tensor, k: Tensor, cosines: Tensor) -> Tensor:
        """The number of hashes that each pair shares, with the published slope."""
        share = torch.zeros_like(cosines)
        for of_q, of_k in zip(self.codes(q).unbind(-1), self.codes(k).unbind(-1), strict=True):
            share = share + (of_q.transpose(1, 2)[..., None] == of_k.transpose(1, 2)[..., None, :])
        return share * (1 + self.bits / 2 * (cosines - cosines.detach()))


def rows_of(code: Tensor, count: int) -> Tensor:
    """Where rows that hashes `(B, N, H)` name are in tables `(B, H, count, W)`, of all rows in turn: `(B, N, H)`.

    Rows of one dimension are added and read whole, of several number by number.
    """
    batch, _, heads = code.shape
    return code + torch.arange(batch * heads, device=code.device).reshape(batch, 1, heads) * count


def sums(code: Tensor, rows: Tensor, count: int) -> Tensor:
    """A table `(B, H, count, W)`: `rows` `(B, N, H, W)`, each added to the row that its `code` `(B, N, H)` names."""
    if traced() or rows.shape[1] <= _STRETCH:
        batch, _, heads, width = rows.shape
        index = rows_of(code, count).reshape(-1, 1).expand(-1, width)
        table = rows.new_zeros(batch * heads * count, width).scatter_add(0, index, rows.flatten(0, 2))
        return table.reshape(batch, heads, count, width)
    pairs = zip(code.split(_STRETCH, dim=1), rows.split(_STRETCH, dim=1), strict=True)
    return torch.stack([sums(*pair, count) for pair in pairs]).sum(dim=0)
