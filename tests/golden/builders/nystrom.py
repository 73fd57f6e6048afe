"""Nystrom attention without projections, and the token module of T2T-ViT around it."""

import re
from typing import Any

from torch import Tensor, nn

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_core, merge_heads, split_heads


def noted(spec: dict[str, Any], name: str) -> str:
    """What the note says of `name`."""
    found = re.search(rf"{name}=(\w+)", spec["note"])
    assert found, f"no {name} in {spec['note']}"
    return found[1]


def operator(spec: dict[str, Any]) -> Run:
    """On q, k and v `(B, heads, N, D)`."""
    q, k, v = (tensor(spec["inputs"][name]["shape"], name).transpose(1, 2) for name in "qkv")
    heads, kernel = v.shape[2], noted(spec, "conv kernel")
    core = create_core(
        "nystrom",
        heads * v.shape[3],
        heads,
        landmarks=int(noted(spec, "landmarks")),
        start=noted(spec, "start"),
        conv=0 if kernel == "None" else int(kernel),
    )
    return Run(core, lambda: core(Tokens(q, k, v), Layout(Grid(1, q.shape[1]))).transpose(1, 2))


class TokenModule(nn.Module):
    """v + proj(attention) of one head, whose width is not that of the input, which the scale is of."""

    def __init__(self, dim: int, width: int, landmarks: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.core = create_core("nystrom", width, 1, landmarks=landmarks, scale=dim**-0.5)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, 1) for part in self.qkv(x).chunk(3, dim=-1))
        return merge_heads(v) + self.proj(merge_heads(self.core(Tokens(q, k, v), Layout(Grid(1, x.shape[1])))))


def token_module(spec: dict[str, Any]) -> Run:
    """On tokens `(B, N, C)`."""
    x = tensor(spec["inputs"]["input"]["shape"])
    module = TokenModule(x.shape[2], spec["output_shape"][2], int(noted(spec, "landmarks")))
    return Run(module, lambda: module(x))


BUILDERS = {"nystrom_": operator, "t2t_nystrom_": token_module}
