"""T5's layers, each told from the others by what it has in its state dict."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def layer(spec: dict[str, Any]) -> Run:
    """The layer on tokens, its input scaled as the case says."""
    op, keys = spec["op"], {key for key, _ in spec["state_dict"]}
    x = (tensor(spec["input_shape"]) * spec["inputs"][0].get("scale", 1.0)).requires_grad_("gradients" in spec)
    mixed, options = "qk_scale_ttt" in keys, {}
    if not mixed:
        options = {
            "inner_model": "swiglu3" if "w3" in keys else "mlp2",
            "loss": "mse" if spec["name"].startswith("dit5") else "dot",
            "local": "q_conv2d.weight" in keys,
        }
    made = linsight.create_attention(
        "dit5" if mixed else "t5", op["dim"], op["num_heads"], qkv_bias=op["qkv_bias"], **options
    )
    return Run(made, lambda: made(x, Grid(*op["grid"])), (), {"input": x})


BUILDERS = {"t5_swiglu_op": layer, "t5_mlp2_op": layer, "dit5_mixed_op": layer, "dit5_ttt_op": layer}
