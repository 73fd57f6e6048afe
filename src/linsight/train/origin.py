"""The place in a model where values that are no numbers begin."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linsight.attention.registry import list_attentions

from .learner import Learner


class _Found(Exception):
    """Ends a forward pass: the module `path` is where it begins."""

    def __init__(self, path: str) -> None:
        self.path = path


def origin(learner: Learner, again: Callable[[], Any] | None = None) -> str:
    """Where values that are no numbers begin, as "in blocks.3.attn.core (inline)"; "" where that cannot be told.

    again: computes the loss once more, from the same random state; None: only the weights are looked at.
    """
    averaged = [] if learner.ema is None else [("averaged weights", learner.ema.module)]
    for words, module in (("weights", learner.model), *averaged):
        names = [name for name, tensor in _values(module) if not _is_finite(tensor)]
        if names:
            return f"in the {words}, {named(module, names[0])}{_more(names)}"
    if again is None:
        return ""
    try:
        with torch.no_grad(), learner.eager(), _watching(learner.model):
            loss = again()
    except _Found as found_at:
        return f"in {named(learner.model, found_at.path)}" if found_at.path else "in the images, as they are normalised"
    return "" if _is_finite(loss) else "in the loss itself: what the model gives are numbers"


def bad_gradient(learner: Learner) -> str:
    """Where gradients that are no numbers begin, as "in the gradient of ..."; "" where all are numbers.

    They flow from the end of a model to its beginning, so it is the last parameter that has one.
    """
    parameters = list(learner.model.named_parameters())
    names = [name for name, parameter in reversed(parameters) if not _is_finite(parameter.grad)]
    return f"in the gradient of {named(learner.model, names[0])}{_more(names)}" if names else ""


def named(model: nn.Module, path: str) -> str:
    """The path of a module or a parameter, with the mechanism that it is a part of: "blocks.3.attn.qkv (inline)"."""
    known: dict[Any, str] = {entry.factory: entry.name for entry in list_attentions()}
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        module: Any = _inner(model, parts[:end])
        name = known.get(type(module)) or known.get(type(getattr(module, "core", None)))
        if name is not None:
            return f"{path} ({name})"
    return path


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if names[1:] else ""


def _inner(model: nn.Module, parts: list[str]) -> Any:
    found: Any = model
    for part in parts:
        found = getattr(found, part, None)
    return found


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the statistics of batch norms; other buffers, as masks, may be infinite."""
    yield from module.named_parameters()
    for path, inner in module.named_modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            yield from ((f"{path}.{name}", buffer) for name, buffer in inner.named_buffers(recurse=False))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_finite(value: Any) -> bool:
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in _tensors(value))
    return all(bool(tensor.isfinite().all()) for tensor in own)  # a process looks at its own part


class _watching:
    """While entered, a module of `model` whose output is not finite, although its inputs are, raises `_Found`.

    So does the model itself where its input is not finite, with the path "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.handles = model, list[Any]()
        self.entered: dict[int, list[bool]] = {}  # whether the inputs of the calls in progress are finite

    def __enter__(self) -> None:
        for path, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(path)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            finite = _is_finite(args) and _is_finite(kwargs)
            if not path and not finite:
                raise _Found("")
            self.entered.setdefault(id(module), []).append(finite)

        return before

    def _after(self, path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            finite = self.entered[id(module)].pop()
            if finite and not _is_finite(output):
                raise _Found(path or "the model")

        return after
