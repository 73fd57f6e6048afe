"""A host on bands of rows, by the steps that it tells for streaming."""

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.models import Mix, Sample, StreamPlan
from linsight.ops import Grid, Tile, accumulator
from linsight.streaming import check_streams, plan_of, reach

from ._bands import Band, Bands
from ._random import same_draws
from ._ranks import Ranks

OUTPUTS = ("logits", "features", "map")


class Part(NamedTuple):
    """The part of a rank: images `(B, C, h, W)` or tokens `(B, n, C)`, a grid, and where the rows of each begin.

    prefix: tokens in front of the sequence. The first rank has them there; with the others they are as they began.
    """

    x: Tensor
    grid: Grid
    bounds: tuple[int, ...]
    prefix: Tensor | None = None


class End(NamedTuple):
    """The input of the head: the sum of the tokens `(B, 1, C)`, and the prefix tokens."""

    total: Tensor
    prefix: Tensor


class SplitHost:
    """The stand-in for the `forward` of a host that tells its steps.

    Raises:
        CapabilityError: a mechanism in it has no states that merge.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        with torch.no_grad():
            for step in plan_of(model).steps:
                if isinstance(step, Mix):
                    check_streams(step.block)
        self.bands = Bands(model, ranks)

    def __call__(self, band: Tensor, *, output: str = "logits") -> Tensor:
        """The rank's rows `(B, C, h, W)` of images, any number of them, to what all ranks' rows give.

        Args:
            band: normalised pixels.
            output: "logits" `(B, classes)` or "features" before the classifier, equal on all ranks, or "map"
                `(B, h', w', C)`, the rank's rows of the last map after the last norm.
        """
        if output not in OUTPUTS:
            raise UnknownNameError("output", output, OUTPUTS)
        if band.ndim != 4:
            raise LinsightError(f"a band of images is (batch, channels, rows, width), not of shape {tuple(band.shape)}")
        plan, ranks = plan_of(self.model), self.ranks
        if plan.head is None and output != "map":
            raise CapabilityError("this model pools in a way that does not split: take output='map', or pool by 'avg'")
        batch, channels, height, width = band.shape
        bounds = ranks.bounds(height, band, batch=batch, channels=channels, width=width)
        part = Part(band, Grid(bounds[-1], width), bounds)
        again = torch.is_grad_enabled() and any(getattr(m, "grad_checkpointing", False) for m in self.model.modules())
        with same_draws(self.model, ranks, band.device):
            for step in plan.steps:
                part = self._sample(step, part) if isinstance(step, Sample) else self._mix(step, part, again)
            return self._end(plan, part, output)

    def _sample(self, step: Sample, part: Part) -> Part:
        """Make the tokens of a coarser grid, whose rows are shared out anew."""
        ranks, batch = self.ranks, part.x.shape[0]
        (height, width), prefix = part.grid[:2], step.prefix
        new = Grid(*step.size((height, width)))
        bounds, stride = ranks.shares(new.height), step.stride[0]
        tiles = [Tile(new, a, 0, b - a, new.width, step.margin) for a, b in itertools.pairwise(bounds)]
        spans = [tile.rows for tile in tiles]
        want = [(a * stride, min(b * stride, height) if b < new.height else height) for a, b in spans]
        if part.x.ndim == 4:
            crop = ranks.exchange(part.x, 2, part.bounds, want)
        else:
            rows = part.x[:, self._front(part) :].unflatten(1, (-1, width))
            crop = ranks.exchange(rows, 1, part.bounds, want).permute(0, 3, 1, 2)
        tile = tiles[ranks.own]
        x = step.run(crop)[:, tile.top - tile.rows[0] :][:, : tile.height].flatten(1, 2)
        if step.place is not None:
            x = step.place(x, dataclasses.replace(tile, halo=0))
        if prefix is None:
            return Part(x, new, bounds)
        prefix = prefix.expand(batch, -1, -1)
        x = x.to(torch.promote_types(x.dtype, prefix.dtype))  # as `cat` does, on all ranks
        # None of them here is still a part of the graph: a parameter without a gradient would stop DDP.
        x = torch.cat([prefix[:, :0] if ranks.own else prefix, x], dim=1)
        return Part(x, new._replace(prefix=prefix.shape[1]), bounds, prefix)

    def _mix(self, step: Mix, part: Part, again: bool) -> Part:
        """Run a block, which leaves the grid as it is."""
        band = Band(part.grid, part.bounds, self.ranks.own, reach(step.block))
        x = self.bands.run(step.block, part.x[..., : step.width], band, {}, again)
        if step.width < part.x.shape[-1]:
            x = torch.cat([x, part.x[..., step.width :]], dim=-1)
        return part._replace(x=x)

    def _end(self, plan: StreamPlan, part: Part, output: str) -> Tensor:
        x, prefix = part.x, part.prefix
        front = self._front(part)
        if output == "map":
            return plan.norm(x[:, front:]).unflatten(1, (-1, part.grid.width))
        spatial = plan.norm(x[:, front:])
        spatial = spatial if plan.pooled is None else plan.pooled(spatial)
        total = spatial.sum(dim=1, keepdim=True, dtype=accumulator(x.dtype))
        first = total[:, :0]
        if prefix is not None:
            first = plan.norm(x[:, :front] if front else prefix.to(x.dtype))
        ends = self.ranks.gather_states(End(total, first))
        mean = sum(end.total for end in ends) / (part.grid.height * part.grid.width)
        assert plan.head is not None
        return plan.head(ends[0].prefix, mean.to(spatial.dtype), output == "features")

    def _front(self, part: Part) -> int:
        """How many prefix tokens are in front of the rank's own."""
        return 0 if self.ranks.own else part.grid.prefix
