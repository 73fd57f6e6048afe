"""WeightFormer's two layers with weights for each image, and its blocks."""

from typing import Any

from torch import Tensor

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_block
from linsight.attention.mechanisms.weightformer import DynCnn, DynLinear


def _input(spec: dict[str, Any]) -> Tensor:
    x = tensor(spec["input_shape"]) * spec["inputs"][0].get("scale", 1.0)
    return x.requires_grad_("gradients" in spec)


def dynlinear_op(spec: dict[str, Any]) -> Run:
    """The linear layer on tokens."""
    op, x = spec["op"], _input(spec)
    layer = DynLinear(op["in_features"], op["out_features"])
    return Run(layer, lambda: layer(Tokens(x, x, x), Layout(Grid(*op["grid"]))), inputs={"input": x})


def dyncnn_op(spec: dict[str, Any]) -> Run:
    """The convolution on an image."""
    x = _input(spec)
    size = x.shape[2:]
    layer = DynCnn(spec["op"]["dim"])

    def call() -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return layer(Tokens(tokens, tokens, tokens), Layout(Grid(*size))).transpose(1, 2).unflatten(2, size)

    return Run(layer, call, inputs={"input": x})


def wfm_block(spec: dict[str, Any]) -> Run:
    """A block at its place in a model, which says whether it is dynamic."""
    op, x = spec["op"], _input(spec)
    hidden = dict(spec["state_dict"])["linear2.weight"][1]
    block = create_block("weightformer", op["dim"], 1, mlp_ratio=hidden / op["dim"], index=op["layer"])
    return Run(block, lambda: block(x, Grid(*op["grid"])), inputs={"input": x})


BUILDERS = {"dynlinear_op": dynlinear_op, "dyncnn_op": dyncnn_op, "wfm_block": wfm_block}
