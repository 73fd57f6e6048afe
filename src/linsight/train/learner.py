"""One update of the weights, around timm's optimisers, schedules, mixing and averaging."""

import contextlib
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from linsight.attention import collect_losses
from linsight.data.images import Batch
from linsight.errors import CheckpointError, LinsightError
from linsight.recipe import Recipe
from linsight.records import shown
from linsight.runtime.device import autocast
from linsight.runtime.processes import Processes
from linsight.tasks import Task

from .freezing import freeze
from .model import load_state
from .moments import fitting, require_scale
from .renewal import Renewal
from .spread import Spread, like
from .state import require_weights
from .teachers import load_teacher


def ema_decay(recipe: Recipe) -> float:
    """The decay of the averaged weights at the recipe's batch."""
    return recipe.ema ** (recipe.batch_size / recipe.ema_base_batch if recipe.ema_base_batch else 1)


def warmup_epochs(recipe: Recipe, updates: int) -> float:
    """The epochs of warm-up: the recipe's, or a quarter of the run where that would never get out of its warm-up.

    updates: of an epoch.
    """
    asked = recipe.warmup_updates / updates if recipe.warmup_updates else recipe.warmup_epochs
    return asked if asked < recipe.epochs else recipe.epochs / 4


class Part(NamedTuple):
    """A part of a batch, as it is computed at once.

    number: among those of all processes.  share: times the mean loss of its images, for the mean of all processes to be
    that of the batch.  images: how many of its images count.  last: of this process.
    """

    number: int
    batch: Batch
    share: float
    images: int
    last: bool


class Learner:
    """A model in training. All of its state but the number of updates done is in `state`.

    task: which begins here.
    spread: how the model lies over several processes.
    new: names of the parameters that `init` did not fill, None where there is no `init`.
    kept: how many parameters are not trained.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        updates: int,
        new: Collection[str] | None = None,
        spread: Spread | None = None,
    ) -> None:
        recipe = task.recipe
        self.spread = Spread(Processes(), device) if spread is None else spread
        self.spare: Batch | None = None
        self.task, self.recipe, self.device, self.dtype = task, recipe, device, dtype
        task.check(model)
        self.new = sorted(new or ())
        if unknown := sorted(set(self.new) - {name for name, _ in model.named_parameters()}):
            raise CheckpointError(f"the saved state says that {shown(unknown[0])} is new, which the model has not")
        self.still = freeze(model, recipe, new)
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model.to(device)
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.kept = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        task.begin(device)
        whole = task.around(self.model, load_teacher)
        self.ema: ModelEmaV3 | None = None
        if recipe.ema:
            # torch's joint operations do not take tensors some of which lie over processes
            joint = not self.spread.shards
            self.ema = ModelEmaV3(self.model, ema_decay(recipe), use_warmup=recipe.ema_warmup, foreach=joint)
        self.spread.lay(self.model)
        self.spread.lay_beside(whole, self.model)
        own = {id(parameter) for parameter in self.model.parameters()}
        # what is learned beside the model, and not kept with its weights
        self.beside = {name: parameter for name, parameter in whole.named_parameters() if id(parameter) not in own}
        self._optimise(updates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self._answers = self.spread.runnable(self._compiled(self.model))
        self._plain = self.spread.runnable(self.model) if whole is self.model else whole
        self._run = self.spread.learning(self._answers if whole is self.model else self._compiled(whole))
        if self.ema is not None:
            self._averaged = self.spread.runnable(self.spread.lay(self.ema.module))
        averaged = None if self.ema is None else self.ema.module
        self.renewal = Renewal(recipe, self.model, averaged, self.spread.processes)

    def _compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.recipe.compile else module  # type: ignore[return-value]

    def _optimise(self, updates: int) -> None:
        recipe = self.recipe
        scale = recipe.batch_size / recipe.lr_base_batch if recipe.lr_base_batch else 1.0
        try:
            layers = {"layer_decay": recipe.layer_decay} if 0 < recipe.layer_decay < 1 else {}
            self.optimiser = create_optimizer_v2(
                self.model,
                recipe.opt,
                lr=recipe.lr * scale,
                weight_decay=recipe.weight_decay,
                **{**layers, **recipe.opt_args},
            )
            self._scale_new()
            for decays in (True, False):
                if params := [p for p in self.beside.values() if (p.ndim > 1) == decays]:
                    more = {"weight_decay": recipe.weight_decay * decays, "lr_scale": recipe.new_lr_scale}
                    self.optimiser.add_param_group({"params": params, **more})
            self.schedule, self.epochs = create_scheduler_v2(
                self.optimiser,
                recipe.sched,
                num_epochs=recipe.epochs,
                warmup_epochs=warmup_epochs(recipe, updates),
                warmup_lr=recipe.warmup_lr * scale,
                min_lr=recipe.min_lr * scale,
                cooldown_epochs=recipe.cooldown_epochs,
                step_on_epochs=False,
                updates_per_epoch=updates,
                **recipe.sched_args,
            )
        except (TypeError, ValueError) as error:
            raise LinsightError(f"opt_args or sched_args cannot be used: {error}") from error
        if self.schedule is None:  # which else applies the scales
            for group in self.optimiser.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)

    def _scale_new(self) -> None:
        """Part the groups of the optimiser by whether `init` filled them, by their `lr_scale`."""
        recipe, named = self.recipe, dict(self.model.named_parameters())
        if recipe.new_lr_scale == 1:
            return
        new = {id(named[name]) for name in self.new}
        for group in list(self.optimiser.param_groups):
            parts: tuple[list[Tensor], list[Tensor]] = ([], [])
            for parameter in group["params"]:
                parts[id(parameter) in new].append(parameter)
            group["params"] = parts[0]
            if parts[1]:
                scale = group.get("lr_scale", 1.0) * recipe.new_lr_scale
                self.optimiser.add_param_group({**group, "params": parts[1], "lr_scale": scale})

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the averaged ones, where there are."""
        return self.model if self.ema is None else self.ema.module

    @property
    def scored(self) -> nn.Module:
        """`evaluated`, compiled where it is."""
        return self._answers if self.ema is None else self._averaged

    @property
    def lr(self) -> float:
        """The learning rate of the last update, before a layer's or a new part's own scale."""
        group = min(self.optimiser.param_groups, key=lambda group: abs(group.get("lr_scale", 1.0) - 1))
        return group["lr"] / group.get("lr_scale", 1.0)

    def forward(self, images: Any, *more: Any) -> Any:
        """The model's answer in training mode, in the dtype of mixed precision. more: what else it takes."""
        self._run.train()
        for norm in self.still:
            norm.eval()
        with autocast(self.device, self.dtype):
            return self._run(images, *more)

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, `forward` runs the model itself, not what it was compiled to."""
        run, self._run = self._run, self._plain
        try:
            yield
        finally:
            self._run = run

    def taught(self, images: Tensor) -> Any:
        """The answer of the averaged weights, in evaluation mode and without a gradient."""
        assert self.ema is not None, "the recipe was checked"
        return self.asked(self._averaged, images)

    @torch.no_grad()
    def asked(self, model: nn.Module, images: Tensor) -> Any:
        """The answer of another model, in evaluation mode and without a gradient, in the dtype of mixed precision."""
        with autocast(self.device, self.dtype):
            return model.eval()(images)

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """The mean loss of a batch in `epoch`, and the number of its images; None where none could be read.

        With the losses that layers have of their own.
        """
        with collect_losses() as own:
            found = self.task.loss(self, batch, epoch)
        return found and (own.added_to(found[0]), found[1])

    def parts(self, batch: Batch) -> Iterator[Part]:
        """The parts that this process computes its share of a batch in; none where no process has an image."""
        count, copy = self.recipe.accumulate, self.spread.copy
        parts = [batch] if count == 1 else [batch.part(number, count) for number in range(count)]
        sizes = [self.task.usable(len(part.images)) for part in parts]
        every = self.spread.processes.tell(*sizes)
        mean = sum(map(sum, every)) / len(every)
        if not mean:
            return
        # all processes compute as many parts: the gradients of the last are those of all
        for place, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            if size:
                self.spare = part
            elif len(every) == 1:
                continue
            last = not any(sizes[place + 1 :]) if len(every) == 1 else place == count - 1
            yield Part(copy.rank * count + place, part if size else self._spare(), size / mean, size, last)

    def _spare(self) -> Batch:
        """Images to compute with where this process has none, and others have."""
        if self.spare is None:
            copy = self.spread.processes.copy
            raise LinsightError(f"process {copy.rank + 1} of {copy.world} could read no image of its first batch")
        return self.spare

    @torch.no_grad()
    def idle(self) -> None:
        """Evaluate for nothing, where the others need this process's part of the model."""
        if self.spread.shards:
            self.task.answer(self.scored.eval(), self.task.inputs(self._spare().images[:1]))

    @torch.no_grad()
    def renew(self, part: Part, epoch: int, step: int, done: int) -> None:
        """Make random features and hashes anew before an update, where it is time to; see `Renewal.before`."""

        def answer() -> None:
            with autocast(self.device, self.dtype):
                model = self.spread.runnable(self.model).eval()
                self.task.answer(model, self.task.inputs(part.batch.images[:1]))

        self.renewal.before(epoch, step, done, answer)

    def adding(self, part: Part) -> AbstractContextManager[None]:
        """A context for the loss of a part and its `backward`."""
        return self.spread.adding(self._run, last=part.last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there; `step` uses them up."""
        self.scaler.scale(loss).backward()

    def step(self, done: int) -> None:
        """Update the weights, after `done` updates before."""
        if self.schedule is not None:
            self.schedule.step_update(done)
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_([*self.model.parameters(), *self.beside.values()], self.recipe.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=done + 1)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers, for `load`; whole, in the main process. All processes make the call."""
        return {
            "model": self.spread.whole(self.model.state_dict()),
            "optimiser": self.spread.whole(self.optimiser.state_dict()),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.spread.whole(self.ema.module.state_dict()),
            "new": self.new,
            "beside": self.spread.whole({name: parameter.detach() for name, parameter in self.beside.items()}),
        }

    def weights(self) -> dict[str, Tensor]:
        """The weights to keep, whole, in the main process. All processes make the call."""
        return self.spread.whole(self.evaluated.state_dict())

    def load(self, state: dict[str, Any], source: str) -> None:
        """Take up the state of a learner of the same recipe; a CheckpointError if it is of another."""
        averaged = [] if self.ema is None else [("ema", self.ema.module)]
        for name, module in (("model", self.model), *averaged):
            require_weights(state[name], module.state_dict(), name, source)
            load_state(module, self.spread.laid(state[name], module), source)
        require_scale(state["scaler"], self.scaler, source)
        try:
            for name, parameter in self.beside.items():
                parameter.data.copy_(like(state["beside"][name], parameter))
            fitted = fitting(state["optimiser"], self.optimiser, source)
            self.optimiser.load_state_dict(self.spread.laid_optimiser(fitted, self.optimiser))
            self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the state in '{source}' is of another optimiser: {error}") from error
