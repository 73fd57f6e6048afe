"""TransNormer's two layers, on tokens `(N, B, C)`."""

import re
from typing import Any

import linsight
from golden.spec import Run, heads, tensor
from linsight import Grid


def run(spec: dict[str, Any], mechanism: str, **options: Any) -> Run:
    """A layer of projections apart."""
    x, named = tensor(spec["input_shape"]), re.search(r"d\d+h(\d+)", spec["name"])
    layer = linsight.create_attention(
        mechanism, x.shape[2], int(named[1]) if named else heads(spec), projections="q_k_v", **options
    )
    return Run(layer, lambda: layer(x.transpose(0, 1), Grid(1, x.shape[0])).transpose(0, 1))


def norm(spec: dict[str, Any]) -> Run:
    """NormAttention."""
    feature_map = {"elu": "elu", "1+elu": "elu+1"}[spec["activation"]]
    return run(spec, "transnormer", feature_map=feature_map, causal=spec["causal"])


def diag(spec: dict[str, Any]) -> Run:
    """DiagAttention; the chunk is told in words."""
    chunk = re.search(r"chunk (\d+)", spec["operator"])
    assert chunk
    return run(spec, "transnormer_diag", chunk=int(chunk[1]), scores="softmax" if spec["softmax"] else "relu")


BUILDERS = {"transnormer_norm": norm, "transnormer_diag": diag}
