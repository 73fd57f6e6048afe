"""Packed batches: what mixes tokens is run on the images of each grid as a batch."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Groups, Layout, LayoutLike, as_layout, check_tokens

from .core import Core
from .tokens import Tokens

Forward = Callable[..., Tensor]


def mix_packed(
    core: Core,
    tokens: Tokens,
    layout: Layout,
    *,
    context_layout: Layout | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """`core` on a packed batch `(1, sum of N_i, heads, d)`: one call for each grid, or pair of grids with a context."""
    if score_bias is not None:
        raise LinsightError("score_bias= is of the scores of one image, not of packed ones: pad the batch (sizes=)")
    groups = Groups(layout) if context_layout is None else Groups(layout, context_layout)
    keys = 0 if context_layout is None else 1
    sides = (0, keys, keys, 0, keys, keys, 0)  # of each field of Tokens
    split = [None if t is None else groups.split(t, side) for t, side in zip(tokens, sides, strict=True)]
    outs = []
    for i, grids in enumerate(groups.grids):
        part = Tokens(*(None if parts is None else parts[i] for parts in split))  # type: ignore[arg-type]
        outs.append(core(part, Layout(grids[0]), **({"context_layout": Layout(grids[1])} if keys else {})))
    return groups.join(outs)


def each_image(forward: Forward) -> Forward:
    """For the `forward` of a `Layer` or a `Block`: given a packed batch, it runs on the images of each grid as a batch.

    A registered class whose `forward` has it can do packed batches. `Attention` needs no such thing.
    """

    @functools.wraps(forward)
    def of_any(self: nn.Module, x: Tensor, layout: LayoutLike | None = None, **others: Any) -> Tensor:
        layout = layout if layout is None else as_layout(layout)
        if layout is None or not layout.is_packed:
            return forward(self, x, layout, **others)
        check_tokens(x, layout)
        layouts, context = [layout], others.get("context")
        if context is not None:
            if others.get("context_layout") is None:
                raise LinsightError("context= needs context_layout=, the grid of its tokens")
            layouts.append(as_layout(others["context_layout"]))
            check_tokens(context, layouts[1], "context")
        groups = Groups(*layouts)
        sides = {"residual": 0, "context": 1, "keep": len(layouts) - 1}
        given = {key: groups.split(t, sides[key]) for key, t in others.items() if key in sides and t is not None}
        outs = []
        for i, (part, grids) in enumerate(zip(groups.split(x), groups.grids, strict=True)):
            own: dict[str, Any] = {key: parts[i] for key, parts in given.items()}
            if context is not None:
                own["context_layout"] = Layout(grids[1])
            outs.append(forward(self, part, Layout(grids[0]), **{**others, **own}))
        return groups.join(outs)

    return mark_packed(of_any)


def mark_packed(forward: Forward) -> Forward:
    """Say that `forward` takes packed batches."""
    forward.packs = True  # type: ignore[attr-defined]
    return forward


def takes_packed(cls: type[nn.Module] | None) -> bool:
    """True where the `forward` of this class takes packed batches."""
    return getattr(getattr(cls, "forward", None), "packs", False)
