"""ConvShareViT's layer by its definition, and as the linear layers that kernels without neighbours are."""

import pytest
import torch
from torch.nn import functional as F

from linsight import create_attention
from linsight.errors import LinsightError
from linsight.ops import Grid
from matrix.subject import close


def test_layer_is_its_definition():
    """Head by head, the maps of all tokens as channels of one depthwise convolution with a kernel for all."""
    layer = create_attention("convshare", 12, 2, kernel_size=3).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    assert layer.core.map_size == (3, 4)

    def shared(x, kernel, bias):
        kernels = kernel.expand(6, 1, 3, 3)
        return F.conv2d(x.unflatten(-1, (3, 4)), kernels, bias.expand(6), padding=1, groups=6).flatten(2)

    out = layer.proj.bias.expand(1, 6, 12)
    for h in range(2):
        q = shared(x, layer.q.weight[h], layer.q.bias[h])
        k, v = (shared(x, layer.kv.weight[i], layer.kv.bias[i]) for i in (h, 2 + h))
        a = (q @ k.mT / 12**0.5).softmax(-1) @ v
        out = out + shared(a, layer.proj.weight[0, h], layer.proj.bias * 0)
    close(layer(x, Grid(2, 3)), out)


def test_mistakes():
    for options, words in (({"map_size": (3, 5)}, "not a map of the 12"), ({"kernel_size": 2}, "must be odd")):
        with pytest.raises(LinsightError, match=words):
            create_attention("convshare", 12, 2, **options)
