"""A mechanism of each kind, from one file: the matrix and the hosts take it with nothing else edited."""

import importlib.util
import sys

import pytest
import torch

import linsight
import matrix
from linsight.attention import list_attentions, mechanism, unregister
from linsight.errors import UnknownNameError
from matrix import graphs
from test_hosts import SMALL

pytestmark = [*map(pytest.mark.filterwarnings, graphs.WARNINGS)]

CORE = '''
"""A gated mean: o_i = sigmoid(q_i) * mean_j(sigmoid(k_j) * v_j)."""

from typing import NamedTuple

import torch
from torch import Tensor

from linsight.attention import Capabilities, Core, Paper, Round, Structure, register
from linsight.ops import accumulator, count_tokens, mask_tokens


class Sums(NamedTuple):
    total: Tensor
    count: Tensor


class Gated(Round):
    def absorb(self, core, tokens, tile, done):
        dtype = accumulator(tokens.v.dtype)
        gated = torch.sigmoid(tokens.k.to(dtype)) * tokens.v.to(dtype)
        return Sums(mask_tokens(gated, tokens.keep).sum(dim=1), count_tokens(tokens.v, tokens.keep))

    def finish(self, core, state, done):
        return state.total * (core.scale / state.count.clamp(min=1))[:, None, None]


@register("toy_mean", formula="sigmoid(q_i) mean_j(sigmoid(k_j) v_j)", complexity="O(N d)", paper=Paper("None"))
class ToyMean(Core):
    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (Gated(),)

    def __init__(self, dim, num_heads, *, scale: float = 1.0, device=None, dtype=None):
        super().__init__()
        self.num_heads, self.scale = num_heads, scale

    def read(self, tokens, tile, done):
        q = tile.inner(tokens.q).to(done[0].dtype)
        return (torch.sigmoid(q) * done[0][:, None]).to(tokens.q.dtype)
'''

LAYER = '''
"""Every token reads the mean of the kept tokens."""

from torch import nn

from linsight.attention import Capabilities, Layer, Paper, register
from linsight.ops import mask_tokens


@register("toy_layer", kind="layer", formula="mean(x) W", complexity="O(N d)", paper=Paper("None"))
class ToyLayer(Layer):
    capabilities = Capabilities(keep=True, prefix=True)

    def __init__(self, dim, num_heads, *, qkv_bias=True, proj_bias=True, proj_drop=0.0, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def weight(self):
        return self.proj.weight

    def mix(self, x, layout, keep):
        total = mask_tokens(x, keep).sum(1, keepdim=True)
        count = x.shape[1] if keep is None else keep.sum(1).clamp(min=1)[:, None, None]
        return self.proj((total / count).expand_as(x))
'''

BLOCK = '''
"""A whole block: a normed mean, added to the stream."""

from torch import nn

from linsight.attention import Block, Capabilities, Paper, register


@register("toy_block", kind="block", formula="x + W mean(LN(x))", complexity="O(N d)", paper=Paper("None"))
class ToyBlock(Block):
    capabilities = Capabilities(prefix=True)

    def __init__(self, dim, num_heads, *, mlp_ratio=4.0, drop_path=0.0, gain: float = 1.0, device=None, dtype=None):
        super().__init__()
        self.dim, self.gain = dim, gain
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def weight(self):
        return self.proj.weight

    def mix(self, x, layout, keep):
        return x + self.gain * self.proj(self.norm(x).mean(1, keepdim=True))
'''

TOYS = {"toy_mean": CORE, "toy_layer": LAYER, "toy_block": BLOCK}
# A graph takes seconds to trace: once is enough.
CHECKS = [
    (name, check) for name in TOYS for check in matrix.CHECKS + (matrix.SLOW_CHECKS if name == "toy_mean" else ())
]


@pytest.fixture
def subject(request, tmp_path):
    """A mechanism that this library has never seen, from one file."""
    name = request.param
    path = tmp_path / f"{name}.py"
    path.write_text(TOYS[name])
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield matrix.Subject(name)
    unregister(name)
    del sys.modules[name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("subject", "check"), CHECKS, indirect=["subject"], ids=[f"{name}-{check.__name__}" for name, check in CHECKS]
)
def test_toys_pass_the_matrix(subject, check):
    check(subject)


@pytest.mark.parametrize("host", SMALL)
@pytest.mark.parametrize("subject", TOYS, indirect=True)
def test_toys_in_hosts(subject, host):
    model = linsight.create_model(host, attention=f"{subject.name}:1/softmax", **{**SMALL[host], "num_classes": 5})
    out = model(torch.randn(2, 3, 40, 24))
    out.square().mean().backward()
    assert out.shape == (2, 5)
    assert all(p.grad is not None for p in model.parameters())
    assert subject.entry in list_attentions(prefix=True) and subject.entry in list_attentions(packed=True)


def test_toys_are_gone():
    for name in TOYS:
        with pytest.raises(UnknownNameError):
            mechanism(name)
