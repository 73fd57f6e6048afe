"""Hybrids: a converted attention that keeps a part of its softmax beside the mechanism.

    window      o = mechanism + alpha * softmax in the window around each token
    selected    o = r * softmax + (1 - r) * mechanism

The first is Lizard's form (arXiv 2507.09025), without its gates and sinks: alpha is one number a layer, learned, and
the window is that of "nat", K x K tokens of a grid, K of a sequence. Prefix tokens are in no window: they get nothing.

The second is the selective transfer of LinVideo (arXiv 2510.08318): r, one number a layer from 0 to 1, is learned
together with all else under

    L_con = (sum of round(r) - keep)^2,   L_reg = sum of 1 - |2r - 1|^power

so that `keep` layers stay softmax; the gradient goes through the rounding as if it were not there, and the power falls
from large, where any r is as good, to small, where only 0 and 1 are. Then `round_selection` makes each layer one of
both. LinVideo adds 0.01 of both to its loss; the range of its power is not told.

A window can carry everything while the mechanism beside it learns nothing: `without` turns a branch off, to see that.
Layer-wise distillation `without(student, "window")` makes the mechanism learn all of softmax, not the rest of it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Tokens, create_core, merge_heads
from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.ops import AxisWindow, Grid, Layout, Tile, mask_tokens, neighbourhood_attention, traced, unflatten

from .mixing import Mixing, mixings

BRANCHES = ("mechanism", "window", "softmax")


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Softmax beside a mechanism: see the module.

    Args:
        window: side of the window, in tokens; 0 for none.
        alpha: where the factor of the window starts.
        selected: whether softmax or the mechanism stays is learned.
        r: where the share of softmax starts.

    Raises:
        LinsightError: neither is asked for, or a number that cannot be.
    """

    window: int = 0
    alpha: float = 0.0
    selected: bool = False
    r: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise LinsightError(f"window={self.window!r} of a hybrid must be a whole number of tokens, 0 for none")
        if not self.window and not self.selected:
            raise LinsightError("a hybrid of a mechanism alone: pass window=, or selected=True")
        if not 0 <= self.r <= 1:
            raise LinsightError(f"r={self.r} of a hybrid must be from 0, the mechanism, to 1, softmax")


class HybridMixing(Mixing):
    """A mechanism with a part of softmax beside it: see the module.

    Args:
        attention, dim, num_heads, options: as of `Mixing`.

    Raises:
        LinsightError: softmax is to be selected from softmax.
    """

    def __init__(self, attention: str, dim: int, num_heads: int, *, hybrid: Hybrid, **options: Any) -> None:
        super().__init__(attention, dim, num_heads, **options)
        self.hybrid: Hybrid | None = hybrid
        self.off: frozenset[str] = frozenset()  # branches that are turned off, see `without`
        factory: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        if hybrid.window:
            self.alpha = nn.Parameter(torch.tensor(float(hybrid.alpha), **factory))
        if hybrid.selected:
            if attention == "softmax":
                raise LinsightError("selected=True: the mechanism is softmax itself, so there is nothing to select")
            self.softmax = create_core("softmax", dim, num_heads, causal=self.core.causal, **factory)
            self.r = nn.Parameter(torch.tensor(float(hybrid.r), **factory))

    @property
    def branches(self) -> tuple[str, ...]:
        """The layer's own, of `BRANCHES`."""
        if self.hybrid is None:
            return ("softmax",) if self.attention == "softmax" else ("mechanism",)
        has = {"mechanism": True, "window": bool(self.hybrid.window), "softmax": self.hybrid.selected}
        return tuple(name for name in BRANCHES if has[name])

    @property
    def share(self) -> Tensor:
        """The share r of softmax, within 0 and 1; gradients reach it from outside, too."""
        return self.r + (self.r.clamp(0, 1) - self.r).detach()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        grid: Grid,
        *,
        keep: Tensor | None = None,
        score_bias: Tensor | None = None,
        key_grid: Grid | None = None,
    ) -> Tensor:
        """See `Mixing`.

        Raises:
            CapabilityError: the window is asked for keys of another grid, or dropped tokens that are no padding.
        """
        on = set(self.branches) - self.off
        if self.hybrid is None:  # one of both, for good
            out = super().forward(q, k, v, x, grid, keep=keep, score_bias=score_bias, key_grid=key_grid)
            return out if on else torch.zeros_like(out)
        if "mechanism" in on:
            out = super().forward(q, k, v, x, grid, keep=keep, score_bias=score_bias, key_grid=key_grid)
        else:
            out = v.new_zeros(*q.shape[:2], v.shape[2] * v.shape[3])
        if self.factor != 1:
            q = q * self.factor
        if keep is not None:
            k, v = mask_tokens(k, keep), mask_tokens(v, keep)
        if "window" in on:
            if key_grid is not None or score_bias is not None:
                what = "a bias on the scores" if key_grid is None else "keys of another grid"
                raise CapabilityError(f"the window beside '{self.attention}' has no place for {what}")
            out = out + self.alpha.to(out.dtype) * self._window(q, k, v, grid, keep)
        if self.hybrid.selected:
            share = self.share.to(out.dtype)
            out = (1 - share) * out
            if "softmax" in on:
                beside: dict[str, Any] = {} if key_grid is None else {"context_layout": Layout(key_grid)}
                whole = self.softmax(Tokens(q, k, v, x, keep), Layout(grid), score_bias=score_bias, **beside)
                out = out + share * merge_heads(whole).to(out.dtype)
        return out

    def _window(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """Softmax in the window of each token, `(B, N, C)`; 0 for prefix tokens."""
        if self.core.causal and grid.height > 1:
            raise CapabilityError("a causal window is of sequences: on a grid no order of its tokens is known")
        assert self.hybrid is not None
        front, flat = grid.prefix, Grid(grid.height, grid.width)
        sizes = None if keep is None else padding(keep[:, front:], flat)
        # a window as long as a short side sees no more than a longer one, and gathers less
        rows, columns = (
            AxisWindow(min(self.hybrid.window, side) if isinstance(side, int) else self.hybrid.window, causal=causal)
            for side, causal in zip(flat[:2], (False, self.core.causal), strict=True)
        )
        q, k, v = (part[:, front:] for part in (q, k, v))
        out = merge_heads(neighbourhood_attention(q, k, v, Tile.whole(flat, sizes), (rows, columns)))
        return nn.functional.pad(out, (0, 0, front, 0)).to(v.dtype)

    def settle(self) -> str:
        """Become what `r` is nearer to, for good: "softmax" or "mechanism"; the other one is dropped."""
        if self.hybrid is None or not self.hybrid.selected:
            raise LinsightError("this layer has no r that could be rounded")
        softmax = bool(self.r > 0.5)
        if softmax:
            self.core, self.extra, self.attention = self.softmax, None, "softmax"
            options = {"causal": True} if self.core.causal else {}
            self.row = dataclasses.replace(self.row, attention="softmax", options=options, hybrid=None)
            self.query_is_key = self.key_is_query = False
            if self.hybrid.window:
                del self.alpha
        self.hybrid = None if softmax or not self.hybrid.window else dataclasses.replace(self.hybrid, selected=False)
        self.row = dataclasses.replace(self.row, hybrid=self.hybrid)
        del self.softmax, self.r
        return "softmax" if softmax else "mechanism"

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return super().extra_repr() + ("" if self.hybrid is None else f", {self.hybrid}")


def padding(keep: Tensor, grid: Grid) -> Tensor:
    """The height and width `(B, 2)` of each image, of a mask `(B, N)` that drops what is below or right of it.

    Raises:
        CapabilityError: it drops other tokens, too: a window would have holes.
    """
    kept = unflatten(keep, 1, (grid.height, grid.width))
    rows, columns = kept.any(2).sum(1), kept.any(1).sum(1)
    if not traced():
        inside = torch.arange(grid.height, device=keep.device) < rows[:, None]
        beside = torch.arange(grid.width, device=keep.device) < columns[:, None]
        if not bool((kept == inside[:, :, None] & beside[:, None]).all()):
            raise CapabilityError("a window beside a mechanism takes padding at the end, not tokens dropped in between")
    return torch.stack([rows, columns], dim=1).clamp(min=1)


@contextlib.contextmanager
def without(model: nn.Module, branch: str) -> Iterator[None]:
    """While entered, a branch of all converted layers gives 0: what is left of the model is the work of the others.

    Args:
        branch: "mechanism", "window" or "softmax", the one that is selected or not.

    Raises:
        UnknownNameError: no such branch.
        LinsightError: no layer has it.
    """
    if branch not in BRANCHES:
        raise UnknownNameError("branch of a hybrid", branch, BRANCHES)
    found = [mixing for mixing in mixings(model).values() if branch in branches(mixing)]
    if not found:
        known = sorted({name for mixing in mixings(model).values() for name in branches(mixing)})
        raise LinsightError(f"no layer has the branch '{branch}': those converted have {', '.join(known) or 'none'}")
    was = [(mixing, mixing.off) for mixing in found if isinstance(mixing, HybridMixing)]
    handles = [
        mixing.register_forward_hook(lambda mixing, args, out: torch.zeros_like(out))
        for mixing in found
        if not isinstance(mixing, HybridMixing)
    ]
    try:
        for mixing, off in was:
            mixing.off = off | {branch}
        yield
    finally:
        for mixing, off in was:
            mixing.off = off
        for handle in handles:
            handle.remove()


def branches(mixing: Mixing) -> tuple[str, ...]:
    """The branches of a converted layer, of `BRANCHES`."""
    if isinstance(mixing, HybridMixing):
        return mixing.branches
    return ("softmax",) if mixing.attention == "softmax" else ("mechanism",)


def selection_loss(model: nn.Module, *, keep: int, power: float) -> Tensor:
    """L_con + L_reg over the layers that select, see the module.

    Args:
        keep: how many of them are to stay softmax.
        power: of L_reg, 1 or more: see `annealed`.

    Raises:
        LinsightError: no layer selects, fewer than `keep` do, or the power is below 1.
    """
    shares = torch.stack([mixing.share for mixing in _selecting(model).values()])
    if not 0 <= keep <= len(shares):
        raise LinsightError(f"keep={keep}: {len(shares)} layers select, so 0 to {len(shares)} can stay softmax")
    if not power >= 1:
        raise LinsightError(f"power={power} must be 1 or more: below, the gradient at r = 0.5 has no end")
    rounded = shares + ((shares > 0.5).to(shares.dtype) - shares).detach()
    return (rounded.sum() - keep).square() + (1 - (2 * shares - 1).abs().pow(power)).sum()


def annealed(step: int, steps: int, *, first: float = 16.0, last: float = 2.0) -> float:
    """The power of `selection_loss` in a step, from 0 to steps - 1: from `first` down to `last`, by equal factors."""
    return first * (last / first) ** (step / max(1, steps - 1))


def round_selection(model: nn.Module) -> dict[str, str]:
    """Make each layer that selects softmax, where its r is above 0.5, or the mechanism; which of both, by name.

    Raises:
        LinsightError: no layer selects.
    """
    return {name: mixing.settle() for name, mixing in _selecting(model).items()}


def _selecting(model: nn.Module) -> dict[str, HybridMixing]:
    found = {
        name: mixing
        for name, mixing in mixings(model).items()
        if isinstance(mixing, HybridMixing) and mixing.hybrid is not None and mixing.hybrid.selected
    }
    if not found:
        raise LinsightError("no layer selects: convert with hybrid=Hybrid(selected=True)")
    return found
