"""Modules that torch.fx has as one node, as those of torch.nn: what they do depends on sizes that it does not know."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from linsight.errors import LinsightError
from linsight.ops import is_proxy

from .fusing import Fusable

Forward = TypeVar("Forward", bound=Callable[..., Any])


def one_node(forward: Forward) -> Forward:
    """`forward` of a module, which under `torch.fx.symbolic_trace` becomes a node that calls the module.

    Raises:
        LinsightError: the module is all that is traced, so there is no graph to be a node of.
    """

    @functools.wraps(forward)
    def called(self: Any, *given: Any, **named: Any) -> Any:
        if is_proxy(given):  # all arguments of what is traced itself
            raise LinsightError(
                f"torch.fx has a {type(self).__name__} as one node, so there is nothing to trace in it: trace the "
                f"model around it, take features by forward_intermediates, or a graph by torch.export"
            )
        x: Any = given[0] if given else next(iter(named.values()), None)
        if not is_proxy(x):
            return forward(self, *given, **named)
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), given, named)

    # Not `__wrapped__`: torch.fx would go by the code of that, and fail at arguments by keyword only.
    called.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del called.__wrapped__
    return called  # type: ignore[return-value]


class Node(Fusable):
    """The base of layers and blocks: their `forward` is one node of a torch.fx graph."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "forward" in cls.__dict__:
            cls.forward = one_node(cls.__dict__["forward"])
