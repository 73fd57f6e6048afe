"""One update of the weights, around timm's optimisers, schedules, mixing and averaging."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from linsight.data.images import Batch
from linsight.errors import CheckpointError, LinsightError
from linsight.recipe import Recipe
from linsight.records import shown
from linsight.runtime.device import autocast
from linsight.tasks import Task

from .model import load_state
from .moments import fitting, require_scale
from .state import require_weights


def ema_decay(recipe: Recipe) -> float:
    """The decay of the averaged weights at the recipe's batch."""
    return recipe.ema ** (recipe.batch_size / recipe.ema_base_batch if recipe.ema_base_batch else 1)


def _is_frozen_norm(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return norm and not any(parameter.requires_grad for parameter in module.parameters())


def warmup_epochs(recipe: Recipe) -> float:
    """The epochs of warm-up: the recipe's, or a quarter of the run where that would never get out of its warm-up."""
    return recipe.warmup_epochs if recipe.warmup_epochs < recipe.epochs else recipe.epochs / 4


class Learner:
    """A model in training. All of its state but the number of updates done is in `state`.

    task: which begins here.
    new: names of the parameters that `init` did not fill, None where there is no `init`.
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
    ) -> None:
        recipe = task.recipe
        self.task, self.recipe, self.device, self.dtype = task, recipe, device, dtype
        if new is None and (recipe.freeze or recipe.new_lr_scale != 1):
            raise LinsightError("freeze and new_lr_scale part what init fills from what is new: give it weights, init=")
        task.check(model)
        self.new = sorted(new or ())
        if unknown := sorted(set(self.new) - {name for name, _ in model.named_parameters()}):
            raise CheckpointError(f"the saved state says that {shown(unknown[0])} is new, which the model has not")
        if recipe.freeze:
            if not self.new:
                raise LinsightError("init fills every parameter: freeze trains a new head where init_partial is off")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.new)
        # statistics of batch norms whose weights do not change are kept, too
        self.still = [module for module in model.modules() if recipe.freeze and _is_frozen_norm(module)]
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model.to(device)
        self.params = sum(parameter.numel() for parameter in model.parameters())
        task.begin(device)
        self._optimise(updates)
        self.ema = ModelEmaV3(self.model, ema_decay(recipe), use_warmup=recipe.ema_warmup) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self._run: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # type: ignore[assignment]

    def _optimise(self, updates: int) -> None:
        recipe = self.recipe
        scale = recipe.batch_size / recipe.lr_base_batch if recipe.lr_base_batch else 1.0
        try:
            self.optimiser = create_optimizer_v2(
                self.model, recipe.opt, lr=recipe.lr * scale, weight_decay=recipe.weight_decay, **recipe.opt_args
            )
            self._scale_new()
            self.schedule, self.epochs = create_scheduler_v2(
                self.optimiser,
                recipe.sched,
                num_epochs=recipe.epochs,
                warmup_epochs=warmup_epochs(recipe),
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
        return self._run if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the last update, before a layer's or a new part's own scale."""
        group = min(self.optimiser.param_groups, key=lambda group: abs(group.get("lr_scale", 1.0) - 1))
        return group["lr"] / group.get("lr_scale", 1.0)

    def forward(self, images: Tensor) -> Any:
        """The model's answer in training mode, in the dtype of mixed precision."""
        self._run.train()
        for norm in self.still:
            norm.eval()
        with autocast(self.device, self.dtype):
            return self._run(images)

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, `forward` runs the model itself, not what it was compiled to."""
        run, self._run = self._run, self.model
        try:
            yield
        finally:
            self._run = run

    @torch.no_grad()
    def taught(self, images: Tensor) -> Any:
        """The answer of the averaged weights, in evaluation mode and without a gradient."""
        assert self.ema is not None, "the recipe was checked"
        with autocast(self.device, self.dtype):
            return self.ema.module.eval()(images)

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """The mean loss of a batch in `epoch`, and the number of its images; None where none could be read."""
        return self.task.loss(self, batch, epoch)

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """The parts that a batch is computed in, each with its share of the mean loss; none without images."""
        count = self.recipe.accumulate
        if count == 1:
            yield batch, 1.0
            return
        parts = [batch.part(number, count) for number in range(count)]
        sizes = [self.task.usable(len(part.images)) for part in parts]
        yield from ((part, size / sum(sizes)) for part, size in zip(parts, sizes, strict=True) if size)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there; `step` uses them up."""
        self.scaler.scale(loss).backward()

    def step(self, done: int) -> None:
        """Update the weights, after `done` updates before."""
        if self.schedule is not None:
            self.schedule.step_update(done)
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=done + 1)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers, for `load`."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "new": self.new,
        }

    def load(self, state: dict[str, Any], source: str) -> None:
        """Take up the state of a learner of the same recipe; a CheckpointError if it is of another."""
        averaged = [] if self.ema is None else [("ema", self.ema.module)]
        for name, module in (("model", self.model), *averaged):
            require_weights(state[name], module.state_dict(), name, source)
            load_state(module, state[name], source)
        require_scale(state["scaler"], self.scaler, source)
        try:
            self.optimiser.load_state_dict(fitting(state["optimiser"], self.optimiser, source))
            self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the state in '{source}' is of another optimiser: {error}") from error
