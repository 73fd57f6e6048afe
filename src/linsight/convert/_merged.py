"""Token merging as it lies on a model: a hook on the model, one on each of its blocks, and a forward of each `attn1`.

No class and no module is exchanged, so weights, their names and adapters on them stay where they are.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import CapabilityError, LinsightError

from ._diffusion import attend, blocks, level
from .merging import Match, Size, count_cells, count_merged, match_tokens, merge_sources, unmerge_sources

_TIMES = ("timestep", "timesteps", "t")
_MASKS = {"mask", "attention_mask"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How much is merged, from some step of the sampler on.

    Args:
        ratio: R / N, the share of tokens that are merged, 0 to 1; at most all but one a cell. 0 merges none.
        cell: height and width of the cells, each of which keeps a token.
        agents: R_a / N, the share of tokens that are merged to make agents; without agents if they would not pay.

    Raises:
        LinsightError: a share or a cell is out of range.
    """

    ratio: float = 0.5
    cell: Size = (2, 2)
    agents: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ratio", "agents"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise LinsightError(f"{name}={share!r}: it is a share of the tokens, from 0 to 1")
        if len(self.cell) != 2 or any(not isinstance(side, int) or side < 1 for side in self.cell):
            raise LinsightError(f"cell={self.cell!r}: it is a height and a width in tokens, as (2, 2)")


class Counts(NamedTuple):
    """Tokens that a block was given, those that its self-attention saw, and agents, in the last forward pass."""

    tokens: int
    attended: int
    agents: int


class TokenMerging:
    """Token merging as it is on a model; made by `merge_tokens`.

    Steps of the sampler are counted by the timesteps that the model is called with: a lower one is the next step, a
    higher one the first step of another image. So each image may take several calls a step, as for guidance.

    setting: what holds in this step.
    counts: `Counts` of each block that saw a level where tokens are merged, by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Mapping[int, Setting],
        max_downsample: int,
        generator: torch.Generator | None,
        zero_control: bool,
    ) -> None:
        found = blocks(model)
        take_off(found)
        self.schedule = dict(sorted(schedule.items()))
        self.max_downsample = max_downsample
        self.generator = generator
        self.zero_control = zero_control
        self.counts: dict[str, Counts] = {}
        self.size: Size | None = None  # of the latent
        self.round = 0  # destinations are drawn anew when it changes
        self._go_to(0)
        self._time: float | None = None
        self._finest = 0  # the most tokens that a block was given
        self._told = False
        self._names = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        self._merged = [MergedBlock(self, name, block) for name, block in found.items()]

    @property
    def step(self) -> int:
        """The step of the sampler, from 0. Set it where the next call is another one: an image may begin half-way."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        if value < 0:
            raise LinsightError(f"step={value}: steps are counted from 0")
        self._time = None
        self._go_to(value)

    def _go_to(self, step: int) -> None:
        self._step = step
        self.setting = self.schedule[max(first for first in self.schedule if first <= step)]

    def remove(self) -> None:
        """Take it off the model, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        for merged in self._merged:
            merged.remove()
        self._handles, self._merged = [], []

    def grid(self, tokens: int) -> Size | None:
        """Height and width of `tokens` tokens in the latent; None where they are not on a level to merge at.

        Raises:
            LinsightError: the model itself was not called, so that nobody knows the latent.
        """
        if self.size is None:
            raise LinsightError(
                "a block was called, but not the model that merge_tokens was given: give it the network "
                "that is called with latents, as pipe.unet"
            )
        self._finest = max(self._finest, tokens)
        found = level(self.size, tokens)
        return found[0] if found and found[1] <= self.max_downsample else None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the size of the latent, and the step."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        latents = given.get(self._names[0])
        if not isinstance(latents, Tensor) or latents.ndim < 4:
            raise LinsightError(
                f"merge_tokens: the first argument of {type(model).__name__} is to be latents (B, C, H, W)"
            )
        self.size = (latents.shape[-2], latents.shape[-1])
        if len(self.schedule) > 1 or self.generator is not None:  # a timestep may lie on another device
            self._count(next((given[name] for name in _TIMES if given.get(name) is not None), None))

    @torch.compiler.disable  # a graph would be one for each step
    def _count(self, time: Any) -> None:
        if time is None:
            self.round += 1
            return
        now = float(time.flatten()[0] if isinstance(time, Tensor) else time)
        self.round += now != self._time
        if self._time is not None and now != self._time:
            self._go_to(self._step + 1 if now < self._time else 0)
        self._time = now

    def _end(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Warn, once, if all blocks lie on coarser levels."""
        if self._told or self.counts or not self._finest or self.size is None:
            return
        self._told = True
        found = level(self.size, self._finest)
        latent = f"a latent of {self.size[0]}x{self.size[1]}"
        way = f"max_downsample={found[1]} merges there" if found else f"that is no level of {latent}"
        warnings.warn(f"no tokens were merged: blocks see {self._finest} at most, of {latent}: {way}", stacklevel=2)


class Plan(NamedTuple):
    """How the tokens `(B, N, C)` of a block are merged; `shape` is B, N.

    merged, agents: R, and R_a where agents are made. match: None where both are of no use.
    """

    shape: torch.Size
    match: Match | None
    merged: int
    agents: int | None

    def merge(self, y: Tensor) -> Tensor:
        return merge_sources(y, self.match, self.merged) if self.match and self.merged else y

    def unmerge(self, out: Tensor) -> Tensor:
        return unmerge_sources(out, self.match, self.merged) if self.match and self.merged else out


class MergedBlock:
    """One block: a hook that matches its tokens, and the forward of its self-attention."""

    def __init__(self, owner: TokenMerging, name: str, block: Any) -> None:
        self.owner, self.name, self.attn = owner, name, block.attn1
        self.plan: Plan | None = None
        self.places: Tensor | None = None  # the destinations drawn
        self.drawn: tuple[int, Size, Size] | None = None  # in which round, for which cells
        self.before = vars(self.attn).get("forward")  # somebody else's
        self.attn.forward = self.forward
        self.handle = block.register_forward_pre_hook(self.see, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()
        self.plan = None  # so that our forward is theirs, where somebody has wrapped it
        if vars(self.attn).get("forward") == self.forward:
            del self.attn.forward
            if self.before is not None:
                self.attn.forward = self.before

    def see(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the pass of the tokens `(B, N, C)` that enter the block."""
        x = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]
        self.plan = None
        tokens = x.shape[1]
        if (grid := self.owner.grid(tokens)) is None:
            return
        now = self.owner.setting
        merged, agents = count_merged(grid, now.cell, now.ratio, now.agents)
        agents = None if self.owner.zero_control else agents
        match = None
        if merged or agents is not None:
            drawn = self.owner.generator
            places = drawn if drawn is None else self.draw(count_cells(grid, now.cell), now.cell, drawn)
            match = match_tokens(x, grid, now.cell, places)
        if match is not None or self.owner.zero_control:
            self.plan = Plan(x.shape[:2], match, merged, agents)
        self.owner.counts[self.name] = Counts(tokens, tokens - merged, 0 if agents is None else tokens - agents)

    @torch.compiler.disable
    def draw(self, cells: Size, cell: Size, generator: torch.Generator) -> Tensor | None:
        """Which token of each cell is its destination; the same in all calls of a step."""
        if self.drawn != (self.owner.round, cells, cell):
            count = cell[0] * cell[1]
            self.places = torch.randint(count, cells, generator=generator, device=generator.device)
            self.drawn = self.owner.round, cells, cell
        return self.places

    def forward(self, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Self-attention of `y` `(B, N, C)` on merged tokens.

        Raises:
            CapabilityError: a mask is given, which merged tokens do not have.
        """
        plan = self.plan
        if plan is None or plan.shape != y.shape[:2]:
            return self.own(y, *args, **kwargs)
        given = dict(zip(("context", "mask"), args, strict=False)) | kwargs
        asked = {name for name, value in given.items() if isinstance(value, Tensor) or value}
        if asked & _MASKS:
            raise CapabilityError(
                f"{self.name}.attn1: merged tokens have no attention mask: leave it out, or take the merging off with "
                f"remove()"
            )
        x = plan.merge(y)
        if asked or (plan.agents is None and not self.owner.zero_control):  # text as keys, or what is not known here
            out = self.own(x, *args, **kwargs)
        else:
            agents = None if plan.agents is None or not plan.match else merge_sources(y, plan.match, plan.agents)
            out = attend(self.attn, x, agents)
        return plan.unmerge(out)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward."""
        return self.before(*args, **kwargs) if self.before else type(self.attn).forward(self.attn, *args, **kwargs)


def take_off(found: Mapping[str, Any]) -> None:
    """Take off all merging that lies on the blocks `found`."""
    for block in found.values():
        merged = getattr(vars(block.attn1).get("forward"), "__self__", None)
        if isinstance(merged, MergedBlock):
            merged.owner.remove()
