"""The ways in which a model leaves Python, as a graph that another program may run."""

from torch import nn

from linsight.errors import LinsightError

# All mechanisms and hosts leave in all of them, but where a class says why not in its `unmet`.
WAYS = {"compile": "torch.compile", "export": "torch.export", "onnx": "ONNX", "trace": "TorchScript trace"}


def why_not(model: nn.Module, way: str) -> str:
    """The reason why `model` does not leave in a `way` of `WAYS`, told by a part's class; "" where it does."""
    return next((reason for part in model.modules() if (reason := getattr(part, "unmet", {}).get(way))), "")


def check_way(model: nn.Module, way: str) -> None:
    """Raise a LinsightError, with the reason and the ways that there are, where `model` does not leave in this one."""
    if reason := why_not(model, way):
        others = [name for other, name in WAYS.items() if not why_not(model, other)]
        raise LinsightError(f"no {WAYS[way]} of this model: {reason}; it leaves by: {', '.join(others) or 'none yet'}")
