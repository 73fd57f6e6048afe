"""Flow attention: linear attention whose sums over tokens are conserved flows, so tokens compete and are allocated.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022 (arXiv 2202.06258), by its
published code. With f = sigmoid, N queries (sinks), M keys (sources), e = 1e-6 on every component, and no scale,

    I_i = (f(q_i) + e) . (sum_j f(k_j) + e)               incoming flow of a sink
    O_j = (f(k_j) + e) . (sum_i f(q_i) + e)               outgoing flow of a source
    I'_i = (f(q_i) + e) . (sum_j f(k_j) / O_j + e)        conserved
    O'_j = (f(k_j) + e) . (sum_i f(q_i) / I_i + e)        conserved, clipped to [-1, 1]
    o_i = sigmoid(I'_i N / M) f(q_i) / I_i sum_j f(k_j) (M softmax_j(O'_j) v_j)^T

The vision code adds another e to each of I, O, I' and O' ("vision"); the code for sequences does not ("reference").
So queries depend on each other, and there are five rounds: each side is summed, summed again, and the sources are
gathered. All of it in float32 (float64 for float64): flows grow with N. Tokens that are not kept are in no sum, neither
of sources nor of sinks, and N and M are the numbers of those that are. Between two sequences `keep` is of the sources;
sinks that are padding are not counted, either. The causal form is another function: see `flowformer_causal`.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from linsight.ops import Tile, accumulator, apply_state, count_tokens, full_precision, mask_tokens, outer_sum

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS = 1e-6


class FlowSum(NamedTuple):
    """total: `(B, H, D)` a sum over tokens.  count: `(B,)` tokens absorbed."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class Competition(NamedTuple):
    """kv: `(B, H, D, E)` sum exp(O') f(k) v^T.  total: `(B, H)` sum exp(O')."""

    kv: Tensor
    total: Tensor


class Side(Round):
    """The sum of f(x) of one side."""

    def __init__(self, of: Literal["keys", "queries"]) -> None:
        super().__init__()
        self.of = of

    def mapped(self, tokens: Tokens) -> Tensor:
        """f of this side's tokens."""
        return mask_tokens(flowing(tokens.q if self.of == "queries" else tokens.k), tokens.keep)

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> Any:
        """The sum over the tile's tokens."""
        x = self.mapped(tokens)
        return FlowSum(self.summed(core, x, done).sum(dim=1), count_tokens(x, tokens.keep))

    def summed(self, core: Any, x: Tensor, done: Done) -> Tensor:
        """The terms of the sum, of mapped tokens."""
        return x

    def finish(self, core: Any, state: FlowSum, done: Done) -> FlowSum:
        """The sum with e on every component."""
        return FlowSum(state.total + _EPS, state.count)


class Conserved(Side):
    """The sum of f(x) / flow of one side, whose flow the sum of the other side gives."""

    def summed(self, core: "Flowformer", x: Tensor, done: Done) -> Tensor:
        """f(x) / flow."""
        return x / core.flow(x, done[1] if self.of == "queries" else done[0])[..., None]


class Compete(Side):
    """The sources, weighted by a softmax over them of their conserved flow."""

    def absorb(self, core: "Flowformer", tokens: Tokens, tile: Tile, done: Done) -> Competition:
        """Weighted sums over the tile's tokens; the flow is clipped, so no maximum is needed."""
        k = self.mapped(tokens)
        weights = mask_tokens(core.flow(k, done[2]).clamp(-1, 1).exp(), tokens.keep)
        v = mask_tokens(tokens.v, tokens.keep).to(k.dtype)
        with full_precision(k):
            return Competition(outer_sum(core.by_place(k * weights[..., None], tile), v), weights.sum(dim=1))

    def finish(self, core: Any, state: Competition, done: Done) -> Tensor:  # type: ignore[override]
        """The mean `(B, H, D, E)` of f(k) v^T, which is M^(-1) times what sinks read; 0 without sources."""
        one = torch.ones_like(state.total)
        return state.kv / torch.where(state.total > 0, state.total, one)[..., None, None]


@register(
    "flowformer",
    formula="o_i = sigmoid(I'_i N / M) f(q_i) / I_i sum_j f(k_j) (M softmax_j(O'_j) v_j)^T, f = sigmoid, I and O flows",
    latex=r"\begin{aligned} o_i &= \sigma(\tfrac{N}{M} \hat I_i) \frac{f(q_i)}{I_i} \sum_j f(k_j) \big(M "
    r"\mathrm{softmax}_j(\hat O_j) v_j\big)^\top, \quad f = \sigma \cr "
    r"I_i &= f(q_i) \cdot \textstyle\sum_j f(k_j), \quad O_j = f(k_j) \cdot \textstyle\sum_i f(q_i) \cr "
    r"\hat I_i &= f(q_i) \cdot \textstyle\sum_j \frac{f(k_j)}{O_j}, \quad \hat O_j = f(k_j) \cdot \textstyle\sum_i "
    r"\frac{f(q_i)}{I_i} \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Flowformer: Linearizing Transformers with Conservation Flows", "2202.06258", "ICML 2022"),
)
class Flowformer(Core):
    """Linear attention by flows that are conserved.

    Args:
        form: "vision" adds e to each flow once more, as the published vision model; "reference" does not.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "features"
    rounds = (Side("queries"), Side("keys"), Conserved("queries"), Conserved("keys"), Compete("keys"))
    published: ClassVar[tuple[Rename, ...]] = (
        Rename("query_projection.", "q."),
        Rename("key_projection.", "k."),
        Rename("value_projection.", "v."),
        Rename("out_projection.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Literal["vision", "reference"] = "vision",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form = form
        if form == "vision":  # whose published names are those of ours
            self.published = ()  # type: ignore[misc]

    def flow(self, x: Tensor, other: FlowSum) -> Tensor:
        """The flow `(B, n, H)` between mapped tokens `x` and the sum of the other side."""
        with full_precision(x):
            flow = ((x + _EPS) * other.total[:, None]).sum(dim=-1)
        return flow + _EPS if self.form == "vision" else flow

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Values allocated to the tile's sinks."""
        sinks, sources, _, conserved, mean = done
        q = flowing(tokens.q)
        count = sources.count.clamp(min=1)
        allocated = torch.sigmoid(self.flow(q, conserved) * (sinks.count / count)[:, None, None])
        share = allocated * count[:, None, None] / self.flow(q, sources)
        with full_precision(q):
            return apply_state(self.by_place(q * share[..., None], tile), mean).to(tokens.q.dtype)


def flowing(x: Tensor) -> Tensor:
    """f, in the accumulator's dtype."""
    return torch.sigmoid(x.to(accumulator(x.dtype)))
