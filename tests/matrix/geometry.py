"""Checks of how tokens lie: tiles, padding, dropped tokens, prefix tokens, context, order."""

import random
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree

from linsight.attention import run_rounds, scan
from linsight.ops import Grid, Layout, Tile, merge, pack, tiles, unpack

from .subject import Subject, close, random_tokens

BFLOAT16 = 0.04  # sums of the same numbers in another order, each rounded to 8 bits
GRIDS = (Grid(7, 13), Grid(1, 9), Grid(9, 1), Grid(1, 1), Grid(4, 6), Grid(6, 5, 1), Grid(3, 4, 5))


def random_cut(grid: Grid, rng: random.Random) -> list[Tile]:
    """`grid` cut into rectangles at random, down to single tokens, in random order."""
    todo, cut = [Tile.whole(grid)], []
    while todo:
        tile = todo.pop()
        if tile.height > 1 and rng.random() < 0.6:
            first = rng.randrange(1, tile.height)
            todo += [
                replace(tile, height=first),
                replace(tile, top=tile.top + first, height=tile.height - first),
            ]
        elif tile.width > 1 and rng.random() < 0.6:
            first = rng.randrange(1, tile.width)
            todo += [
                replace(tile, width=first),
                replace(tile, left=tile.left + first, width=tile.width - first),
            ]
        else:
            cut.append(tile)
    rng.shuffle(cut)
    return cut


def some_kept(subject: Subject, batch: int, grid: Grid) -> torch.Tensor | None:
    """A random mask that keeps token 0, where the mechanism takes one."""
    if not subject.can.keep:
        return None
    keep = torch.rand(batch, grid.tokens) < 0.7
    keep[:, 0] = True
    return keep


def rounds_over_tiles_are_dense(subject: Subject) -> None:
    """Absorb, merge, finish and read over any tiles in any order equal the dense form."""
    subject.need("stream")
    core, rng = subject.core().double(), random.Random(0)
    for grid in GRIDS:
        if grid.prefix and not subject.can.prefix:
            continue
        for keep in (None, some_kept(subject, 2, grid)):
            tokens = random_tokens(core, 2, grid, keep=keep)
            close(run_rounds(core, tokens, random_cut(grid, rng)), core(tokens, Layout(grid)))


def merge_is_associative(subject: Subject) -> None:
    """The finished state does not depend on the order or the grouping of merges."""
    subject.need("stream")
    core, grid = subject.core().double(), Grid(6, 8)
    tokens = random_tokens(core, 2, grid, keep=some_kept(subject, 2, grid))
    bands = [Tile(grid, top, 0, 2, 8) for top in (0, 2, 4)]
    done: tuple[Any, ...] = ()

    def leaves(state: Any) -> list[torch.Tensor]:
        return [leaf for leaf in _pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]

    for now in core.rounds:
        wide = [replace(band, halo=now.halo) for band in bands]
        a, b, c = (now.absorb(core, tokens.each(tile.take), tile, done) for tile in wide)
        merged, *others = (
            now.finish(core, s, done) for s in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a)))
        )
        for other in others:
            for x, y in zip(leaves(merged), leaves(other), strict=True):
                close(x, y)
        done += (merged,)


def any_grid_and_prefix(subject: Subject) -> None:
    """Prime, flat, tall and single-token grids, with and without prefix tokens."""
    layer = subject.layer()
    for grid in GRIDS:
        if grid.prefix and not subject.can.prefix:
            continue
        out = layer(torch.randn(2, grid.tokens, 16), grid)
        assert out.shape == (2, grid.tokens, 16)
        assert out.isfinite().all()


def padded_batch_is_each_image_alone(subject: Subject) -> None:
    """A batch on a common canvas, told by `sizes`, gives each image what it gets alone."""
    subject.need("sizes")
    prefix = 2 if subject.can.prefix else 0
    sizes, canvas = [(3, 5), (5, 2), (1, 1), (5, 6)], Grid(5, 6, prefix)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, BFLOAT16)):
        layer = subject.layer().to(dtype)
        images = [torch.randn(1, prefix + h * w, 16, dtype=dtype) for h, w in sizes]
        batch = torch.randn(len(sizes), canvas.tokens, 16, dtype=dtype)
        layout = Layout(canvas, torch.tensor(sizes))
        inside = layout.keep(batch.device)
        for i, image in enumerate(images):
            batch[i, inside[i]] = image[0]
        with torch.inference_mode(dtype == torch.float32):  # which has forms of its own
            out = layer(batch, layout)
            for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
                close(out[i, inside[i]], layer(image, Grid(h, w, prefix))[0], tolerance)


def packed_batch_is_each_image_alone(subject: Subject) -> None:
    """Images of their own grids in one sequence: outputs and gradients are those of each alone."""
    subject.need("packed")
    prefix = 2 if subject.can.prefix else 0
    grids = [Grid(h, w, prefix) for h, w in ((3, 5), (1, 7), (3, 5), (1, 1))]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, BFLOAT16), (torch.float32, 1e-5)):
        layer, masked = subject.layer().to(dtype), subject.can.keep and dtype == torch.float64
        images = [torch.randn(grid.tokens, 16, dtype=dtype, requires_grad=True) for grid in grids]
        keep = [some_kept(subject, 1, grid) if masked else None for grid in grids]
        x, layout = pack(images, grids)
        out = unpack(layer(x, layout, keep=torch.cat(keep, dim=1) if masked else None), layout)
        alone = [layer(x[None], grid, keep=own)[0] for x, grid, own in zip(images, grids, keep, strict=True)]
        same_with_gradients(out, alone, [*images, *layer.parameters()], tolerance)
    with torch.inference_mode():  # the float32 of the last turn, which has forms of its own here
        for image, ours, grid in zip(images, unpack(layer(x, layout), layout), grids, strict=True):
            close(ours, layer(image[None], grid)[0], tolerance)


def packed_context_is_each_image_alone(subject: Subject) -> None:
    """The i-th packed image reads the i-th packed context; pairs of grids repeat, and only one of a pair does."""
    subject.need("packed", "cross")
    layer = subject.layer().double()
    grids = [Grid(3, 5), Grid(1, 7), Grid(3, 5), Grid(3, 5)]
    others = [Grid(2, 2, 1), Grid(5, 3), Grid(2, 2, 1), Grid(4, 1)]
    images, contexts = (
        [torch.randn(grid.tokens, 16, dtype=torch.float64, requires_grad=True) for grid in side]
        for side in (grids, others)
    )
    (x, layout), (context, context_layout) = pack(images, grids), pack(contexts, others)
    keep = [some_kept(subject, 1, grid) for grid in others]
    mask = {"keep": torch.cat(keep, dim=1)} if subject.can.keep else {}
    out = unpack(layer(x, layout, context=context, context_layout=context_layout, **mask), layout)
    alone = [
        layer(x[None], grid, context=y[None], context_layout=other, keep=own)[0]
        for x, grid, y, other, own in zip(images, grids, contexts, others, keep, strict=True)
    ]
    same_with_gradients(out, alone, [*images, *contexts, *layer.parameters()], 1e-10)


def same_with_gradients(
    out: list[torch.Tensor], alone: list[torch.Tensor], leaves: list[torch.Tensor], tolerance: float
) -> None:
    """Fail unless these outputs, and the gradients of one function of them, agree."""
    gradients = []
    for outputs in (out, alone):
        torch.manual_seed(1)
        loss = sum((part * torch.randn_like(part)).sum() for part in outputs)
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))
    pairs = [*zip(out, alone, strict=True), *zip(*gradients, strict=True)]
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, tolerance)


def dropped_tokens_never_leak(subject: Subject) -> None:
    """NaN in padding or in dropped tokens reaches no kept output and no gradient."""
    subject.need("keep")
    layer, grid = subject.layer().double(), Grid(4, 5, 1 if subject.can.prefix else 0)
    keep = some_kept(subject, 2, grid)
    cases: list[tuple[Any, dict[str, Any], torch.Tensor]] = [(grid, {"keep": keep}, keep)]
    if subject.can.sizes:
        layout = Layout(grid, torch.tensor([(4, 3), (2, 5)]))
        inside = layout.keep(keep.device)
        cases += [(layout, {}, inside), (layout, {"keep": keep}, inside & keep)]
    for layout, arguments, kept in cases:
        outputs, gradients = [], []
        for poison in (0.0, float("nan")):
            torch.manual_seed(1)
            x = torch.randn(2, grid.tokens, 16, dtype=torch.float64)
            x = x.masked_fill(~kept[..., None], poison).requires_grad_()
            out = layer(x, layout, **arguments)[kept]
            layer.zero_grad()
            out.square().sum().backward()
            outputs.append(out)
            gradients.append([x.grad[kept], *(p.grad for p in layer.parameters())])
        close(outputs[1], outputs[0])
        for poisoned, clean in zip(gradients[1], gradients[0], strict=True):
            close(poisoned, clean)


def dropping_is_removing(subject: Subject) -> None:
    """`keep` gives what the sequence without the dropped tokens gives."""
    subject.need("keep")
    grid = Grid(3, 7)
    layer = subject.layer(grid=None).double()  # a position table would be stretched over another grid
    x = torch.randn(1, grid.tokens, 16, dtype=torch.float64)
    keep = some_kept(subject, 1, grid)
    if subject.local:  # a token that is removed has no place; at the rim it is what the edge was
        keep = (torch.arange(grid.tokens) % 7 < 4)[None]
        alone = Grid(3, 4)
    else:
        alone = Grid(1, int(keep.sum()))
    close(layer(x, grid, keep=keep)[keep], layer(x[keep][None], alone)[0])


def nothing_kept_is_finite(subject: Subject) -> None:
    """An image of which every token is dropped gives no NaN, neither in the output nor in gradients."""
    subject.need("keep")
    layer, grid = subject.layer(), Grid(2, 3)
    x = torch.randn(2, 6, 16, requires_grad=True)
    out = layer(x, grid, keep=torch.tensor([[True] * 6, [False] * 6]))
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def context_on_another_grid(subject: Subject) -> None:
    """Keys of another sequence: each query sees all of it, whatever the others are, and its padding is not seen.

    Where a round sums up the queries, too, a query depends on the others, but not on padding among them.
    """
    subject.need("cross")
    layer, grid, other = subject.layer().double(), Grid(3, 4), Grid(5, 2)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    context = torch.randn(2, 10, 16, dtype=torch.float64)
    close(layer(x, grid, context=x.clone(), context_layout=grid), layer(x, grid))
    out = layer(x, grid, context=context, context_layout=other)
    if subject.entry.kind == "core" and any(now.of == "queries" for now in subject.core().rounds):
        sizes, batch = torch.tensor([(2, 3), (3, 4)]), x.clone()
        batch[0, ~Layout(grid, sizes).keep(x.device)[0]] = float("nan")
        inside = Layout(grid, sizes).keep(x.device)[0]
        padded = layer(batch, Layout(grid, sizes), context=context, context_layout=other)
        alone = layer(x[:1, inside], Grid(2, 3), context=context[:1], context_layout=other)
        close(padded[0, inside], alone[0])
    else:
        others = torch.cat([torch.randn_like(x[:, :3]), x[:, 3:5], torch.randn_like(x[:, 5:])], dim=1)
        close(layer(others, Grid(2, 6), context=context, context_layout=other)[:, 3:5], out[:, 3:5])
    assert not torch.allclose(out, layer(x, grid, context=context.roll(1, dims=0), context_layout=other))
    if subject.can.keep:
        keep = torch.arange(10).expand(2, -1) < 6
        short = layer(x, grid, context=context[:, :6], context_layout=Grid(3, 2))
        context = context.masked_fill(~keep[..., None], float("nan"))
        close(layer(x, grid, context=context, context_layout=other, keep=keep), short)


def keys_of_a_reduced_grid(subject: Subject) -> None:
    """PVT's spatial reduction of keys and values, at any size; alone on the grid, all is seen.

    By the first query, in one of some draws: features may be 0, and a query and a key have none in common.
    """
    subject.need("reduced")
    for asked in ({"reduction": 2}, {"pool": 3}):
        layer = subject.layer(**asked).double()
        for grid in (Grid(6, 10), Grid(7, 5), Grid(1, 3)):
            seen = torch.zeros(2, grid.height, grid.width, dtype=torch.bool)
            for _ in range(3):
                x = torch.randn(2, grid.tokens, 16, dtype=torch.float64, requires_grad=True)
                out = layer(x, grid)
                assert out.shape == x.shape
                (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
                seen |= gradient.abs().sum(-1).unflatten(1, (grid.height, grid.width)) > 0
            whole = layer.reduction.ratio
            low, wide = (max(n // whole * whole, min(n, whole)) for n in (grid.height, grid.width))
            assert seen[:, :low, :wide].all()  # a stride floors: the rest of the grid is no key


def causal_tiles_are_a_scan(subject: Subject) -> None:
    """The causal form over tiles of rows, each reading the state of those before it, is the form over the whole."""
    subject.need("causal", "stream")
    core, grid = subject.core(causal=True).double(), Grid(7, 5)
    tokens = random_tokens(core, 2, grid, keep=some_kept(subject, 2, grid))
    for height in (1, 3, 7):
        close(scan(core, tokens, tiles(grid, height, 5)), core(tokens, Layout(grid)))


def causal_is_the_past_only(subject: Subject) -> None:
    """Token i of the causal form is the last token of the plain form on tokens 0..i, gradients too.

    Where positions are shares of a length, both have the length of all tokens.
    """
    subject.need("causal")
    length = {"length": 135} if any(option.name == "length" for option in subject.entry.options) else {}
    layer, plain = subject.layer(causal=True, **length).double(), subject.layer(**length).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 135, 16, dtype=torch.float64, requires_grad=True)  # over two chunks of 64
    out = layer(x, Grid(9, 15))
    for i in (0, 1, 63, 64, 65, 128, 134):
        alone = plain(x[:, : i + 1], Grid(1, i + 1))[:, -1]
        close(out[:, i], alone)
        (ours,) = torch.autograd.grad(out[:, i].square().sum(), x, retain_graph=True)
        (truth,) = torch.autograd.grad(alone.square().sum(), x)
        close(ours, truth)
    if subject.can.keep:
        keep = torch.rand(2, 135) < 0.7
        keep[:, 0] = True
        out = layer(x, Grid(9, 15), keep=keep)
        close(out[:, -1], plain(x, Grid(9, 15), keep=keep)[:, -1])
