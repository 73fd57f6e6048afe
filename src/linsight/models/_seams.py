"""What mechanisms may ask of any host."""

from torch import nn

from linsight.attention import Core


def asked_no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that the cores of `model` want kept from weight decay."""
    return {
        f"{path}.{name}"
        for path, core in model.named_modules()
        if isinstance(core, Core)
        for name in core.no_weight_decay()
    }
