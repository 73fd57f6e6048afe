"""What mechanisms may ask of any host."""

from torch import nn

from linsight.attention import Block, Core, Layer


def asked_no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that the mechanisms of `model` want kept from weight decay."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Core | Layer | Block)
        for name in module.no_weight_decay()
    }
