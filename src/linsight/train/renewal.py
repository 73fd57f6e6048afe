"""Random features and hashes of mechanisms, made anew in the course of training."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from linsight.attention import Core
from linsight.data.random import seed_noise
from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.processes import Processes


class Renewal:
    """Cores get new random features and hashes before some updates, the same in all processes.

    Cores of layers that are not trained keep theirs.

    Args:
        recipe: of the run.
        model: whose cores are made anew.
        averaged: a copy of it that takes over what they have then, for what is averaged of hashes is no hash.
        processes: of the run.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, averaged: nn.Module | None, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        self.cores = {
            name: part
            for name, part in model.named_modules()
            if isinstance(part, Core) and part.renews and _learns(model, name)
        }
        self.copies = {} if averaged is None else {name: averaged.get_submodule(name) for name in self.cores}
        self.last = -1  # the update before which it was done

    @property
    def note(self) -> str:
        """A line where it is asked for in vain, else ""."""
        every = self.recipe.redraw_every
        in_vain = every and not self.cores
        return f"redraw_every={every} has no effect: nothing that learns is drawn at random" if in_vain else ""

    def before(self, epoch: int, step: int, done: int, answer: Callable[[], Any]) -> None:
        """Make them anew before an update, once, where it is time to.

        The first update of a run that starts from weights is none of those, unless they are those of another model.

        Args:
            epoch, step: of the update, which with the seed decide what is drawn.
            done: how many updates were made before.
            answer: has the model answer an image, for the tokens.

        Raises:
            LinsightError: the recipe says how often, and a core that is fitted to tokens was not given any.
        """
        filled = self.recipe.init and not self.recipe.init_partial
        if done == self.last or (not done and filled):
            return
        due = {name: core for name, core in self.cores.items() if self._due(core, done)}
        if not due:
            return
        self.last = done
        seed_noise(self.recipe.seed, epoch, step)
        for core in due.values():
            if core.renews and core.renews.how == "drawn":
                core.redraw()
        fitted = [core for core in due.values() if core.renews and core.renews.how == "fitted"]
        if fitted:
            with _fitting(fitted) as left:
                answer()
            if left and self.recipe.redraw_every:
                raise LinsightError(
                    f"redraw_every={self.recipe.redraw_every} fits {type(left[0]).__name__} to tokens, and it sees "
                    "none: set 0 where a layer is not used"
                )
            for core in fitted:
                _copy(self.processes.share([buffer.cpu() for buffer in core.buffers()]), core)
        for name, core in due.items() if self.copies else ():
            _copy(list(core.buffers()), self.copies[name])

    def _due(self, core: Core, done: int) -> bool:
        every = self.recipe.redraw_every
        if every is None and core.renews:
            every = core.renews.every
        return bool(every and done % every == 0)


def _learns(model: nn.Module, name: str) -> bool:
    """True where the layer around a core is trained."""
    weights = list(model.get_submodule(name.rpartition(".")[0]).parameters())
    return not weights or any(weight.requires_grad for weight in weights)


@contextlib.contextmanager
def _fitting(cores: list[Core]) -> Iterator[list[Core]]:
    """A context in which cores are fitted to the tokens that they are given, before they see them; those still left."""
    left = list(cores)

    def fit(core: Core, given: tuple[Any, ...]) -> None:
        if core in left:  # a core may be used more than once
            core.fit(given[0])
            left.remove(core)

    with contextlib.ExitStack() as hooks:
        for core in cores:
            hooks.callback(core.register_forward_pre_hook(fit).remove)
        yield left


def _copy(values: list[Tensor], module: nn.Module) -> None:
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.copy_(value)
