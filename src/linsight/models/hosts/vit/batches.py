"""Images of different sizes in one batch of the ViT host: padded to a common canvas, or packed into one sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, Tile, each_grid, mask_tokens, traced, unflatten

from ...parts.images import check_images
from ...parts.positions import with_positions


def embed_padded(model: Any, images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """Images `(B, 3, H, W)` -> tokens `(B, P + h*w, C)` and their layout.

    They fill `sizes` `(B, 2)` pixels at the top left; what is in the padding has no effect. Position tables are
    brought to each image's own size.

    Raises:
        LinsightError: the sizes do not fit the images.
    """
    check_images(model, images)
    sizes = torch.as_tensor(sizes, device=images.device)
    _check_sizes(sizes, images)
    inside = Layout(Grid(*images.shape[2:]), sizes).keep(images.device)
    assert inside is not None
    images = images.masked_fill(~unflatten(inside, 1, images.shape[2:])[:, None], 0)
    x = model.patch_embed(images)  # (B, h, w, C)
    first = model.num_prefix_tokens
    patch = torch.as_tensor(model.patch_embed.patch_size, device=sizes.device)
    own = (sizes + patch - 1) // patch + 2 * model.patch_embed.border
    layout = Layout(Grid(x.shape[1], x.shape[2], first), own)
    x = x.flatten(1, 2)
    if model.pos_embed is not None:
        table = model.pos_embed if model.no_embed_class else model.pos_embed[:, first:]
        tile = Tile.whole(layout.grid._replace(prefix=0), layout.sizes)
        x = with_positions(x, table, model.patch_embed.grid_size, tile, "bicubic-antialias")
    prefix = model.prefix_tokens()
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
    return model.norm_pre(x if model.pos_embed is None else model.pos_drop(x)), layout


def embed_packed(model: Any, images: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Images `(3, H_i, W_i)` -> tokens `(1, sum of N_i, C)` and their layout. Those of one size are embedded together.

    Raises:
        LinsightError: there are none, or one is no `(3, H, W)`.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        if image.ndim != 3:
            raise LinsightError(f"image {i} has shape {tuple(image.shape)}: a packed batch is a list of (3, H, W)")
        alike.setdefault(tuple(image.shape), []).append(i)
    if not alike:
        raise LinsightError("a packed batch needs at least one image")
    found: dict[int, tuple[Tensor, Grid]] = {}
    for members in alike.values():
        tokens, grid = model._embed(torch.stack([images[i] for i in members]), None, False)
        found.update((i, (one, grid)) for i, one in zip(members, tokens.split(1), strict=True))
    parts, grids = zip(*(found[i] for i in range(len(images))), strict=True)
    return torch.cat(parts, dim=1), Layout.packed(grids)


def classify(model: Any, x: Tensor, layout: Layout, pre_logits: bool = False) -> Any:
    """timm's `forward_head`, which pools the tokens of each image itself: `(images, classes)`."""
    if not model.global_pool:
        return model.forward_head(x, pre_logits=pre_logits)
    if model.global_pool == "token":  # all that the head reads are prefix tokens
        count = model.num_prefix_tokens
        first = each_grid(lambda part, own: part[:, :count], x, layout)
        return model.forward_head(unflatten(first, 1, (-1, count)).flatten(0, 1), pre_logits=pre_logits)
    if layout.is_packed:
        pooled = each_grid(lambda part, own: model.pool(part)[:, None], x, layout)[0]
    else:
        pooled = _pool(model, x, layout)
    pooled = model.head_drop(model.fc_norm(pooled))
    return pooled if pre_logits else model.head(pooled)


def _pool(model: Any, x: Tensor, layout: Layout) -> Tensor:
    """timm's pooling over each image's own tokens of a padded batch."""
    kind, keep = model.global_pool, layout.keep(x.device)
    if model.attn_pool is not None or kind not in ("avg", "max", "avgmax"):
        raise LinsightError(f"global_pool='{kind}' has no form for padded batches: call forward_packed")
    assert keep is not None
    if not model.pool_include_prefix:
        x, keep = x[:, layout.grid.prefix :], keep[:, layout.grid.prefix :]
    mean = mask_tokens(x, keep).sum(dim=1) / keep.sum(dim=1, keepdim=True)
    if kind == "avg":
        return mean
    top = mask_tokens(x, keep, float("-inf")).amax(dim=1)
    return top if kind == "max" else 0.5 * (top + mean)


def _check_sizes(sizes: Tensor, images: Tensor) -> None:
    if sizes.shape != (len(images), 2) or sizes.is_floating_point():
        raise LinsightError(
            f"sizes of shape {tuple(sizes.shape)}, {sizes.dtype}: give the height and width in pixels of each of the "
            f"{len(images)} images, as whole numbers ({len(images)}, 2)"
        )
    if sizes.device.type != "cpu" or traced():  # to read them would be to wait for the device
        return
    high, wide = images.shape[2:]
    for i, (height, width) in enumerate(sizes.tolist()):
        if not (0 < height <= high and 0 < width <= wide):
            raise LinsightError(f"image {i} of {height}x{width} pixels does not fit in a batch of {high}x{wide}")
