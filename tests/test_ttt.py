"""Test-time training in layers: the published definition through autograd, what a step is made of, inheritance."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core, drive
from linsight.errors import CheckpointError, LinsightError
from linsight.ops import Grid, Layout, Tile
from matrix.subject import cast, random_tokens

F64 = torch.float64


def make_core(name, dim=16, num_heads=2, **options):
    """A core in float64 whose parameters are not those it starts with."""
    core = create_core(name, dim, num_heads, **options).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return core


def trained(weights, loss, norm_of):
    """One step of `weights` on the scalar `loss`, clipped over the axes `norm_of`."""
    gradients = torch.autograd.grad(loss, weights)
    return [w - g / (g.norm(dim=norm_of, keepdim=True) + 1) for w, g in zip(weights, gradients, strict=True)]


@pytest.mark.parametrize("prefix", [0, 2])
def test_vit3_is_two_models_trained_by_autograd(prefix):
    """Steps 3 to 5 of the definition, losses written out. Prefix tokens train and are answered by the heads alone."""
    grid, heads, width = Grid(4, 5, prefix), 2, 8
    core = make_core("ttt")
    tokens = random_tokens(core, 1, grid)
    q, k, v = (x.transpose(1, 2) for x in tokens[:3])  # (B, H, N, d)
    w1, w2 = (core.get_parameter(name).detach().requires_grad_() for name in ("w1", "w2"))
    loss = -(1 / 3) / grid.tokens * ((k @ w1) * F.silu(k @ w2) * v).sum()
    w1, w2 = trained((w1, w2), loss, -2)
    first = ((q @ w1) * F.silu(q @ w2)).transpose(1, 2)

    def conv(x, kernel):
        return F.conv2d(x, kernel, padding=1, groups=width)

    q, k, v = (x.transpose(1, 2).unflatten(2, (4, 5)) for x in tokens.extra[:, prefix:].chunk(3, dim=-1))
    kernel = core.kernel.detach().requires_grad_()
    loss = -(1 / 3) / 20 * (conv(k, kernel) * v).sum()
    (kernel,) = trained((kernel,), loss, (-2, -1))
    last = F.pad(conv(q, kernel).flatten(2).transpose(1, 2), (0, 0, prefix, 0))
    out = core(tokens, Layout(grid))
    assert out.shape == (1, grid.tokens, heads + 1, width)
    torch.testing.assert_close(out[:, :, :heads], first)
    torch.testing.assert_close(out[:, :, heads], last)


@pytest.mark.parametrize("clip", [True, False])
def test_only_the_clip_bounds_the_step(clip):
    """At activations of 1e3 a clipped column moves by less than 1, one that is not by their cube."""
    core, layout = make_core("ttt", clip=clip, conv=False), Layout(Grid(4, 4))
    tokens = random_tokens(core, 1, layout.grid)
    tokens = tokens._replace(k=1e3 * tokens.k, v=1e3 * tokens.v)
    (trained,) = drive(core, lambda now: [(tokens, Tile.whole(layout.grid))])
    moved = (trained - core.matrices(F64)).norm(dim=-2)
    assert moved.max() < 1 if clip else moved.max() > 1e6


def test_heads_need_three_products():
    """W1 and W2 side by side: keys forward, gradient, queries forward."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Products.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    core = make_core("ttt", conv=False)
    tokens = random_tokens(core, 2, Grid(4, 4))
    with torch.no_grad(), Products():
        core(tokens, Layout(Grid(4, 4)))
    assert Products.count == 3


def test_half_precision_over_long_sequences():
    """v / N has a digit or two left in float16 here; applied to the finished sums, 1 / N loses nothing."""
    layout, core = Layout(Grid(128, 256)), make_core("ttt", 8, 2, clip=False, conv=False)
    tokens = random_tokens(core, 1, layout.grid, 8)
    tokens = cast(tokens._replace(k=10 * tokens.k, v=torch.full_like(tokens.v, 0.012)), torch.float16)
    with torch.no_grad():
        found = core.half()(tokens, layout).double()
        exact = core.double()(cast(tokens, F64), layout)
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_the_convolution_needs_its_projections():
    layer = create_attention("ttt", 16, 2, projections="qkv")
    with pytest.raises(LinsightError, match="projections='qkvx'"):
        layer(torch.randn(1, 6, 16), Grid(2, 3))
    assert create_attention("ttt", 16, 2, conv=False)(torch.randn(1, 6, 16), Grid(2, 3)).shape == (1, 6, 16)
    with pytest.raises(LinsightError, match="divisible by 4, not 18"):
        create_attention("ttt", 18, 2, rotary=True)


@pytest.mark.parametrize("name, options", [("t5", {}), ("t5", {"inner_model": "mlp2", "local": False}), ("ttt", {})])
def test_a_shift_of_all_keys(name, options):
    """Normed keys do not see it, as in softmax attention; those of ViT^3 do."""
    core, grid = make_core(name, **options), Grid(3, 4)
    tokens = random_tokens(core, 2, grid)
    shifted = core(tokens._replace(k=tokens.k + torch.randn(2, 8, dtype=F64)), Layout(grid))
    assert torch.allclose(shifted, core(tokens, Layout(grid))) == (name == "t5")


def test_key_norm_shrinks_small_keys():
    """Its epsilon is 1: the norm of keys of variance 0.01 divides by about 1, not by 0.1."""
    core, grid = make_core("t5"), Grid(16, 16)
    tokens = random_tokens(core, 1, grid)
    tokens = tokens._replace(k=0.1 * tokens.k)
    whole = Tile.whole(grid)
    norm, _ = drive(core, lambda now: [(tokens, whole)])
    k = tokens.k.flatten(2)
    torch.testing.assert_close(norm.mean, k.mean(1, keepdim=True))
    torch.testing.assert_close(norm.scale, (k.var(1, correction=0, keepdim=True) + 1).rsqrt())


def test_dit5_is_half_attention_where_windows_cover_the_grid():
    """On 3x4 tokens every window is the grid, which the published code refuses."""
    core, grid = make_core("dit5"), Grid(3, 4)
    tokens = random_tokens(core, 2, grid)
    softmax = create_core("softmax", 16, 2)(Tokens(*tokens[:3]), Layout(grid))
    inner = make_core("t5", inner_model="mlp2", loss="mse")
    inner.load_state_dict({key: x for key, x in core.state_dict().items() if not key.startswith("qk_")})
    q, k = (
        (x.flatten(2) * core.qk_scale[..., i] + core.qk_offset[..., i]).unflatten(2, (2, 8))
        for i, x in enumerate(tokens[:2])
    )
    out = core(tokens, Layout(grid))
    torch.testing.assert_close(out, (softmax + inner(tokens._replace(q=q, k=k), Layout(grid))) / 2)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


@pytest.mark.parametrize("attention", ["t5", "dit5", "ttt"])
def test_a_softmax_checkpoint_is_inherited(attention):
    """Every weight that has the same name and shape; what is new stays as it was."""
    shape = {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}
    deit = linsight.create_model("vit_tiny", attention="softmax", **shape)
    model = linsight.create_model("vit_tiny", attention=attention, **shape)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    report = linsight.load_published(model, deit.state_dict(), strict=False)
    after = model.state_dict()
    wider = {f"blocks.{i}.attn.{key}" for i in range(2) for key in ("qkv.weight", "qkv.bias", "proj.weight")}
    wider = wider if attention == "ttt" else set()
    new = {key for key in after if ".core." in key}
    assert set(report.loaded) == set(after) - new - wider
    for key, x in deit.state_dict().items():
        assert torch.equal(after[key], before[key] if key in wider else x), key
    assert all(torch.equal(after[key], before[key]) for key in new)


def test_the_row_of_a_class_token_is_left_out():
    """A DeiT's table has one position more than T5's."""
    deit = linsight.create_model("vit_tiny", attention="softmax", **SMALL)
    shape = {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}
    model = linsight.create_model("vit_tiny", attention="t5", **shape)
    linsight.load_published(model, deit.state_dict(), strict=False)
    assert torch.equal(model.pos_embed, deit.pos_embed[:, 1:])


def test_a_checkpoint_of_another_inner_model_is_refused():
    """The three share names; shapes and missing keys tell them apart."""
    layers = [
        create_attention("t5", 16, 2),
        create_attention("t5", 16, 2, inner_model="mlp2"),
        create_attention("dit5", 16, 2),
    ]
    for layer in layers:
        for other in layers:
            state = linsight.export_published(other)
            if other is layer:
                linsight.load_published(layer, state)
                continue
            with pytest.raises(CheckpointError):
                linsight.load_published(layer, state)
