"""The layers of NaLaFormer and PolaFormer++ on a map."""

import re
from typing import Any

import linsight
from golden.builders.rala import RENAMES
from golden.spec import Run, on_map


def layer_op(spec: dict[str, Any]) -> Run:
    """The layer on `(B, C, H, W)`; the name of the case tells the heads."""
    found = re.search(r"d\d+h(\d+)", spec["name"])
    assert found
    layer = linsight.create_attention(spec["name"].partition("_op_")[0], spec["input_shape"][1], int(found[1]))
    return Run(layer, on_map(layer, spec), RENAMES)


BUILDERS = {"nalaformer_op": layer_op, "polaformerpp_op": layer_op}
