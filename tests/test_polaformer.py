"""PolaFormer against the published steps, token by token; its powers, its projections, its keys."""

import copy

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens

F64 = torch.float64


def make_core(**options):
    core = create_core("polaformer", 16, 2, **options).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for parameter in core.dwc.parameters():
        torch.nn.init.zeros_(parameter)
    return core


def published(core, tokens):
    """The steps of the paper for one image, up to the convolution; keys of dropped tokens are left out."""
    kept = range(tokens.q.shape[1]) if tokens.keep is None else tokens.keep[0].nonzero()[:, 0].tolist()
    out = torch.zeros_like(tokens.v)
    scale, power = F.softplus(core.scale).view(2, 8), 1 + core.alpha * core.power.sigmoid()
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        k = k + core.positions.view(-1, 2, 8)[:, h]
        q, k, p = q / scale[h], k / scale[h], power[0, h, 0]
        for i in range(len(q)):
            streams = []
            for signs, values in (((1, -1), v[:, :4]), ((-1, 1), v[:, 4:])):
                query = torch.cat([(sign * q[i]).relu() ** p for sign in signs])
                weights = [query @ torch.cat([k[j].relu() ** p, (-k[j]).relu() ** p]) for j in kept]
                total = sum(weight * values[j] for weight, j in zip(weights, kept, strict=True))
                streams.append(total / len(kept) / (sum(weights) / len(kept) + 1e-6))
            out[0, i, h] = torch.cat(streams)
    return out.flatten(2) * tokens.extra


@pytest.mark.parametrize("alpha", [4, 1.5])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_the_published_steps(alpha, dropping):
    core, grid = make_core(grid=(3, 4), alpha=alpha), Grid(3, 4)
    keep = torch.arange(12)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    close(core(tokens, Layout(grid)).flatten(2), published(core, tokens))


def test_powers_of_zero_have_gradients():
    """The derivative by the power is x^p log x, which is 0 at 0."""
    core, grid = make_core(), Grid(2, 3)
    tokens = random_tokens(core, 1, grid)
    tokens.q[:, 1], tokens.k[:, 2] = 0, 0
    q, k = (x.requires_grad_() for x in tokens[:2])
    gradients = torch.autograd.grad(core(tokens, Layout(grid)).sum(), [q, k, core.power, core.scale])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_powers_are_made_in_float32(dtype):
    """Queries and keys of 30 to the fifth: 2e7, and their product 5e14."""
    core, grid = create_core("polaformer", 16, 2).to(dtype), Grid(3, 4)
    torch.nn.init.constant_(core.power, 10)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(q=tokens.q * 30, k=tokens.k * 30), dtype)
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert (core(tokens, Layout(grid)) - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_projections_of_pvt_and_of_swin_are_one_function():
    """`qg` and `kv` there, `qkvg` here, with the rows of each part."""
    pvt = create_attention("polaformer", 16, 2, projections="qx_kv", grid=(2, 3))
    swin = create_attention("polaformer", 16, 2, grid=(2, 3))
    state = pvt.state_dict()
    for leaf in ("weight", "bias"):
        (q, g), (k, v) = (state.pop(f"{name}.{leaf}").chunk(2) for name in ("qx", "kv"))
        state[f"qkv.{leaf}"] = torch.cat([q, k, v, g])
    swin.load_state_dict(state)
    x = torch.randn(1, 6, 16)
    close(pvt(x, Grid(2, 3)), swin(x, Grid(2, 3)), 1e-6)
    from_pvt = {
        key.replace("qx.", "qg.").replace("core.positions", "positional_encoding"): value
        for key, value in pvt.state_dict().items()
    }
    other = create_attention("polaformer", 16, 2, grid=(2, 3))
    linsight.load_published(other, from_pvt)
    close(other(x, Grid(2, 3)), swin(x, Grid(2, 3)), 1e-6)


def test_published_keys():
    state = linsight.export_published(create_attention("polaformer", 16, 2, grid=(2, 3)))
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "power": (1, 2, 1, 8),
        "scale": (1, 1, 16),
        "positional_encoding": (1, 6, 16),
        "qkvg.weight": (64, 16),
        "qkvg.bias": (64,),
        "dwc.weight": (8, 1, 5, 5),
        "dwc.bias": (8,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
    }


def test_mistakes_are_told():
    for sizes, options, words in (
        ((6, 2), {}, "width must be even, not 3"),
        ((8, 2), {"alpha": 0}, "alpha=0 of 'polaformer'"),
        ((8, 2), {"kernel_size": 4}, "kernel_size=4 of 'polaformer'"),
        ((8, 2), {"reduction": 2, "projections": "qkvx"}, "projections='qx_kv'"),
    ):
        with pytest.raises(LinsightError, match=words):
            create_attention("polaformer", *sizes, **options)
    with pytest.raises(LinsightError, match="the gate of 'polaformer' is a projection"):
        create_attention("polaformer", 8, 2, projections="q_kv")(torch.randn(1, 6, 8), Grid(2, 3))
