"""End-to-end distillation: a converted model learns from the one that it was made of, on inputs of its own.

Each student layer now sees what the student's earlier layers give, so their errors add up and are trained away. The
loss is a sum, each term with its weight: the task's own, the distance of predictions, and that of hidden states,
relative to their variance, averaged over the converted blocks.
"""

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError, UnknownNameError

from .conversion import new_parameters
from .lora import low_rank
from .mixing import mixings
from .transfer import Batch, Call, call, endless, evaluated, held, relative_error, tensors

Distance = Literal["kl", "mse", "cosine"]
PREDICTIONS = ("logits", "sample", "last_hidden_state")  # of outputs that are records


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How a converted model is trained as a whole.

    Args:
        logits: weight of the distance of predictions.
        hidden: of the relative distance of hidden states.
        task: of the task's own loss, where one is given.
        distance: of predictions: "kl", of logits over the last axis, times T^2; "mse"; "cosine", 1 minus it.
        temperature: T, of "kl".
        lr: the largest rate; it rises over the share `warmup` of the steps and falls to 0 by a cosine.
        new_lr_scale: the factor on it for what the mechanism brought.
        train: "all", "new", or "lora": new parameters, and low-rank changes of the maps around them.
        held: patterns of names that are not trained, as embeddings.
        rank: of "lora"; its factor is twice as large, over the rank.
        clip: the norm that gradients are cut to.
    """

    logits: float = 1.0
    hidden: float = 1.0
    task: float = 1.0
    distance: Distance = "kl"
    temperature: float = 1.0
    lr: float = 1e-4
    new_lr_scale: float = 1.0
    warmup: float = 0.1
    train: Literal["all", "new", "lora"] = "all"
    held: tuple[str, ...] = ("*embed*",)
    rank: int = 8
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "task", "lr", "new_lr_scale", "warmup"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise LinsightError(f"{name}={value} of a Recovery must be 0 or more")
        if self.temperature <= 0 or self.clip <= 0 or self.rank < 1:
            raise LinsightError("temperature, clip and rank of a Recovery must be above 0")
        for name, choices in (("distance", ("kl", "mse", "cosine")), ("train", ("all", "new", "lora"))):
            if getattr(self, name) not in choices:
                raise UnknownNameError(f"{name} of a Recovery", str(getattr(self, name)), choices)


def prediction(outputs: Any) -> Tensor:
    """The tensor that a model's outputs are judged by: theirs, or that called so in a record, or the first.

    Raises:
        LinsightError: there is no such tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in PREDICTIONS:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise LinsightError(
        f"outputs of {type(outputs).__name__} have none of {', '.join(PREDICTIONS)}: pass predict=, which takes one out"
    )


def apart(ours: Tensor, theirs: Tensor, distance: Distance, temperature: float = 1.0) -> Tensor:
    """The distance of two predictions `(..., C)`, see `Recovery`; the mean over all but the last axis."""
    dtype = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = ours.to(dtype), theirs.detach().to(dtype)
    if distance == "mse":
        return F.mse_loss(ours, theirs)
    if distance == "cosine":
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    ours, theirs = ((x / temperature).log_softmax(-1).flatten(0, -2) for x in (ours, theirs))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def blocks(model: nn.Module) -> list[str]:
    """The blocks around the converted attentions, by name: members of the innermost list, or sequence, of modules."""
    found: dict[str, None] = {}
    for name in mixings(model):
        while "." in name:
            parent = name.rpartition(".")[0]
            if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
                break
            name = parent
        found[name] = None
    return list(found)


@contextlib.contextmanager
def hidden_states(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While entered, the first output of each of these modules is kept, by name, from the last forward."""
    kept: dict[str, Tensor] = {}

    def of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = tensors(output)[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(of(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int = 100,
    recovery: Recovery | None = None,
    task: Callable[[Any, Batch], Tensor] | None = None,
    predict: Callable[[Any], Tensor] = prediction,
    call: Call = call,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a converted model as a whole against its teacher; the loss of each kind in the last step.

    Both are in evaluation mode, without dropout: they are to see the same.

    Args:
        teacher: the model that the student was made of.
        batches: see `transfer.call`. They are gone through again where there are fewer than `steps`.
        task: the task's own loss, of the outputs and the batch.
        predict: takes out of a model's outputs what is compared.
        report: called with each step and its losses.

    Raises:
        LinsightError: nothing is to be learned, there is no batch, or the loss is not finite.
    """
    how = recovery or Recovery()
    names = blocks(student) if how.hidden else []
    if not (how.logits or names or (task is not None and how.task)):
        raise LinsightError("all weights of the Recovery are 0: there is nothing to learn from")
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        if how.train == "lora":
            stack.enter_context(low_rank(student, mixings(student), how.rank))
        groups = _groups(student, how)
        chosen = [parameter for group in groups for parameter in group["params"]]
        inside = {id(parameter) for parameter in chosen}
        stack.enter_context(held(p for p in student.parameters() if id(p) not in inside))
        optimiser = torch.optim.AdamW(groups, how.lr, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps, how.warmup))
        stack.enter_context(evaluated(teacher))
        stack.enter_context(evaluated(student))
        theirs = stack.enter_context(hidden_states(teacher, names))
        ours = stack.enter_context(hidden_states(student, names))
        for step, batch in enumerate(endless(batches, steps)):
            with torch.no_grad():
                told = call(teacher, batch)
            outputs = call(student, batch)
            terms: dict[str, Tensor] = {}
            if how.logits:
                terms["logits"] = how.logits * apart(predict(outputs), predict(told), how.distance, how.temperature)
            if names:
                errors = [relative_error(ours[name], theirs[name]) for name in names]
                terms["hidden"] = how.hidden * torch.stack(errors).mean()
            if task is not None and how.task:
                terms["task"] = how.task * task(outputs, batch)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            if not torch.isfinite(total):
                raise LinsightError(
                    f"the loss of step {step} is not finite ({', '.join(terms)}): a lower lr, or layer-wise "
                    f"distillation before, may help"
                )
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(chosen, how.clip)
            optimiser.step()
            schedule.step()
            found = {name: float(term.detach()) for name, term in terms.items()}
            if report is not None:
                report(step, dict(found))
    return found


def _rate(step: int, steps: int, warmup: float) -> float:
    """The share of the largest rate in a step: a straight rise over `warmup` of the steps, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step + 1 - rise) / max(1, steps - rise))) / 2


def _groups(student: nn.Module, how: Recovery) -> list[dict[str, Any]]:
    """The parameters that are trained, with their rates: inherited ones, and new ones."""
    new = {id(parameter) for parameter in new_parameters(student).values()}
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in student.named_parameters():
        fresh = id(parameter) in new or ".parametrizations." in f".{name}"
        if not fresh and (how.train != "all" or any(fnmatch.fnmatchcase(name, p) for p in how.held)):
            continue
        if parameter.requires_grad:
            groups[fresh].append(parameter)
    made = [
        {"params": parameters, "lr": how.lr * (how.new_lr_scale if fresh else 1)}
        for fresh, parameters in groups.items()
        if parameters
    ]
    if not made:
        raise LinsightError(f"train='{how.train}' leaves nothing to train: the mechanism brought no parameters")
    return made
