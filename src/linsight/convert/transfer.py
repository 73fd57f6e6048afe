"""Layer-wise distillation: each converted layer learns to give what the old one gave for the same input.

The teacher runs; each of the student's layers is fed what the teacher's was ("teacher-forced": LoLCATs, arXiv
2410.10254; Hedgehog, arXiv 2402.04347), so errors do not add up, and one pass serves all layers. The loss of a layer
is the mean square of the difference over the variance of what was to be given, so that no layer outweighs the others.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError

from .conversion import new_parameters
from .mixing import Mixing, mixings
from .place import Locator

Batch = Any
Call = Callable[[nn.Module, Batch], Any]


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs of a batch: a mapping is given by names, of a tuple or list the first is given."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """`mean (ours - theirs)^2 / var(theirs)`, in float32 or above."""
    dtype = torch.promote_types(theirs.dtype, torch.float32)
    ours, theirs = ours.to(dtype), theirs.detach().to(dtype)
    return (ours - theirs).square().mean() / theirs.var().clamp(min=torch.finfo(dtype).tiny)


@contextlib.contextmanager
def forced(teacher: nn.Module, student: nn.Module, seen: Callable[[str, list[Tensor]], None]) -> Iterator[None]:
    """While entered, each converted layer of `student` is run on what the teacher's gets.

    Then `seen(name, errors)` is called with the `relative_error` of each of its outputs, as of an image and a text.

    Raises:
        LinsightError: the teacher has no layer of such a name, or is converted as well.
    """
    names = require_converted(student)
    handles = []
    both = names.keys() & mixings(teacher).keys()
    if both:
        raise LinsightError(f"the teacher's {sorted(both)[0]} is converted, too: pass the model as it was before")
    modules = dict(teacher.named_modules())

    def of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with torch.enable_grad():
                ours = student.get_submodule(name)(*args, **kwargs)
                pairs = zip(tensors(ours), tensors(output), strict=False)
                seen(name, [relative_error(mine, other) for mine, other in pairs])

        return hook

    try:
        for name in names:
            if name not in modules:
                raise LinsightError(f"the teacher has no layer {name}: pass the model that the student was made of")
            handles.append(modules[name].register_forward_hook(of(name), with_kwargs=True))
        for name, module in student.named_modules():  # the student as a whole does not run: it is told of places here
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, Locator):
                    handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_converted(student: nn.Module) -> dict[str, Mixing]:
    """The mechanisms of a converted model, by name; a LinsightError where it has none."""
    found = mixings(student)
    if not found:
        raise LinsightError("the student has no converted layer: make it by linsight.linearize")
    return found


def tensors(output: Any) -> list[Tensor]:
    """The outputs of an attention that count: the one that it has, or of several those of three axes."""
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor) and part.ndim == 3]


def layer_errors(
    teacher: nn.Module, student: nn.Module, batches: Iterable[Batch], *, call: Call = call
) -> dict[str, float]:
    """The relative error of each converted layer's output, fed as the teacher's is: 0 is the same, 1 says nothing.

    The square root of `relative_error`, averaged over the batches.
    """
    total: dict[str, list[float]] = {}

    def seen(name: str, errors: list[Tensor]) -> None:
        total.setdefault(name, []).extend(float(error.detach().sqrt()) for error in errors)

    with evaluated(teacher), evaluated(student), torch.no_grad(), forced(teacher, student, seen):
        for batch in batches:
            call(teacher, batch)
    return {name: sum(errors) / len(errors) for name, errors in total.items()}


def distil_layers(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int = 100,
    lr: float = 1e-2,
    loss: Literal["outputs", "weights"] = "outputs",
    parameters: Iterable[nn.Parameter] | None = None,
    call: Call = call,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train the new parameters of `student` layer by layer, all in one pass; the loss of each layer in the last step.

    AdamW without weight decay and a cosine to 0. Batches are gone through again where there are fewer than `steps`.

    Args:
        teacher: the model that the student was made of.
        batches: see `call`.
        loss: "outputs", see the module; "weights", the cross entropy of the attention weights (Hedgehog, equation 5),
            of size N x N and for mechanisms whose weights are not negative.
        parameters: others than the new ones.
        report: called with each step and its losses.

    Raises:
        LinsightError: there is nothing to train, no batch, or the mechanism's weights are negative.
    """
    names = sorted({mixing.attention for mixing in require_converted(student).values()})
    chosen = list(new_parameters(student).values() if parameters is None else parameters)
    if not chosen:
        raise LinsightError(
            f"{', '.join(names)} brought no parameters that a layer could learn: train the whole model instead"
        )
    optimiser = torch.optim.AdamW(chosen, lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    found: dict[str, float] = {}

    def seen(name: str, errors: list[Tensor]) -> None:
        if loss == "outputs":
            error = torch.stack(errors).sum()
            if error.requires_grad:
                error.backward()
            found[name] = found.get(name, 0.0) + float(error.detach())

    frozen = [p for p in student.parameters() if p.requires_grad and all(p is not other for other in chosen)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluated(teacher))
        stack.enter_context(evaluated(student))
        stack.enter_context(held(frozen))
        stack.enter_context(forced(teacher, student, seen))
        if loss == "weights":
            stack.enter_context(mimicry(student, found))
        for step, batch in enumerate(endless(batches, steps)):
            found.clear()
            optimiser.zero_grad(set_to_none=True)
            with torch.no_grad():
                call(teacher, batch)
            optimiser.step()
            schedule.step()
            if report is not None:
                report(step, dict(found))
    return dict(found)


@contextlib.contextmanager
def mimicry(student: nn.Module, found: dict[str, float]) -> Iterator[None]:
    """While entered, each mechanism that runs learns the softmax weights of the queries and keys that it is given."""

    def of(name: str) -> Any:
        def hook(mixing: Mixing, args: Any, kwargs: Any, output: Any) -> None:
            error = weights_apart(mixing, *args, **kwargs)
            error.backward()
            found[name] = float(error.detach())

        return hook

    handles = [mixing.register_forward_hook(of(name), with_kwargs=True) for name, mixing in mixings(student).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_apart(mixing: Mixing, q: Tensor, k: Tensor, v: Tensor, *args: Any, **beside: Any) -> Tensor:
    """The cross entropy of softmax(s q k^T) and the weights that a mechanism implies, over queries, heads and images.

    Raises:
        LinsightError: some of those are negative.
    """
    scale = q.shape[-1] ** -0.5 * mixing.factor
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    keep = beside.get("keep")
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
    target = scores.detach().float().softmax(-1)
    implied = implied_weights(mixing, q, k, *args, **beside).float()
    if bool((implied < -1e-4).any()):
        raise LinsightError(
            f"'{mixing.attention}' has negative weights, which have no cross entropy: take loss='outputs'"
        )
    return -(target * implied.clamp(min=1e-12).log()).sum(-1).mean()


def implied_weights(mixing: Mixing, q: Tensor, k: Tensor, *args: Any, **beside: Any) -> Tensor:
    """The weights `(B, H, M, N)` by which a mechanism averages values: what it reads of values that are one-hot.

    q, k: `(B, M, H, D)`, `(B, N, H, D)`; all else as of `Mixing.forward`, without the values.
    """
    batch, tokens, heads, width = k.shape
    eye = torch.eye(tokens, dtype=k.dtype, device=k.device)
    parts = []
    for columns in eye.split(width, dim=1):
        some = nn.functional.pad(columns, (0, width - columns.shape[1]))
        v = some[None, :, None].expand(batch, -1, heads, -1)
        out = mixing.forward(q, k, v.contiguous(), *args, **beside)  # not the hooks
        parts.append(out.unflatten(-1, (heads, width))[..., : columns.shape[1]])
    return torch.cat(parts, dim=-1).transpose(1, 2)


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """While entered, a model is in evaluation mode: teacher and student see the same, without dropout."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def held(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While entered, these parameters get no gradient."""
    some = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in some:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in some:
            parameter.requires_grad_(True)


def endless(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """So many batches: those that there are, again and again.

    Raises:
        LinsightError: there are none.
    """
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            if done == steps:
                return
            yield batch
            done += 1
        if done == before:
            raise LinsightError("there are no batches" + (", or they can be gone through only once" if done else ""))
