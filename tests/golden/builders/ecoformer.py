"""EcoFormer's layer on tokens, and its models: PVTv2 with softmax in the last stage."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def ecoformer_op(spec: dict[str, Any]) -> Run:
    """The hash tells heads, bits and anchors."""
    x, shapes = tensor(spec["input_shape"]), dict(spec["state_dict"])
    heads, bits, anchors = shapes["fast_attention.ksh.A"]
    layer = linsight.create_attention("ecoformer", x.shape[2], heads, bits=bits, anchors=anchors)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


def ecoformer_pvtv2(spec: dict[str, Any]) -> Run:
    """The variant of the size that the name ends with."""
    model = linsight.create_model(
        f"ecoformer_pvt_v2_{spec['name'].rpartition('_')[2]}",
        attention_options={"bits": spec["nbits"], "anchors": spec["m"]},
    )
    return Run(model, lambda: model(tensor(spec["input_shape"])))


BUILDERS = {"ecoformer_op": ecoformer_op, "ecoformer_pvtv2": ecoformer_pvtv2}
