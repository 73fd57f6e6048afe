"""Models for inference: equal to the plain ones, quick to copy and to keep, and not to be trained."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn

import linsight
from linsight import Grid, create_attention
from linsight.attention import TokenConv
from linsight.bench.counting import count_parameters
from linsight.errors import CheckpointError, LinsightError
from linsight.fuse import fused, is_fused
from linsight.fuse.blocks import add_into
from linsight.ops import Layout
from matrix.subject import close
from test_hosts import SMALL, build

MECHANISM = {"mlla_pyramid_tiny": "mlla", "swin_tiny": "agent,inline,softmax,focused"}


def small(host):
    model = build(host, MECHANISM.get(host, "inline")).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # of a model that was trained
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("host", SMALL)
def test_fused_is_plain(host):
    model, x = small(host), torch.randn(2, 3, 40, 56)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        truth = model(x)
        for made in (linsight.fuse(model), reparameterize_model(model), fused(model)):
            close(made(x), truth, 1e-5)
            close(made(x), truth, 1e-5)  # of what it kept
    assert not is_fused(model) and all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_in_place_is_the_model_itself():
    model, x = small("vit_tiny"), torch.randn(1, 3, 32, 32)
    truth = model(x)
    plain = count_parameters(model)
    assert linsight.fuse(model, inplace=True) is model and is_fused(model)
    close(model(x), truth, 1e-5)
    assert 0.5 * plain < count_parameters(model) < 2 * plain  # of another form, and not none, though it learns no more


@pytest.mark.parametrize("make", [linsight.fuse, reparameterize_model], ids=["linsight", "timm"])
def test_it_refuses_to_train(make):
    model = make(small("vit_tiny"))
    with pytest.raises(LinsightError, match="form for inference: train the one"):
        model.train()
    assert model.eval() is model


def test_published_weights_come_before():
    model = small("vit_tiny")
    weights = linsight.export_published(model)
    for refused in (lambda m: linsight.export_published(m), lambda m: linsight.load_published(m, weights)):
        with pytest.raises(CheckpointError, match="fused, its weights folded"):
            refused(linsight.fuse(model))


def test_it_copies_and_pickles():
    model, x = linsight.fuse(small("swin_tiny")), torch.randn(1, 3, 40, 40)
    truth = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), truth) and is_fused(twin)


def test_batch_norm_is_a_part_of_the_convolution():
    model = linsight.fuse(small("mlla_pyramid_tiny"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("thing", [None, "inline_deit_tiny", {}], ids=repr)
def test_takes_modules_only(thing):
    with pytest.raises(linsight.LinsightError, match=r"torch\.nn\.Module: a \w+ came"):
        linsight.fuse(thing)


def test_half_precision_folds_nothing():
    """Weights would be rounded once more."""
    model, x = small("mlla_pyramid_tiny").bfloat16(), torch.randn(1, 3, 40, 40).bfloat16()
    with torch.no_grad():
        assert torch.equal(linsight.fuse(model)(x), model(x))


def agent():
    layer = create_attention("agent", 16, 2, agents=4, grid=(4, 4)).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_biases_are_kept_for_the_grids_they_were_made_for(monkeypatch):
    layer, calls = agent(), []
    plain = type(layer.core.tables).forward
    monkeypatch.setattr(type(layer.core.tables), "forward", lambda *given: calls.append(given) or plain(*given))
    quick, grids = linsight.fuse(layer), (Grid(4, 4), Grid(5, 3), Grid(4, 4))
    for grid in grids:
        x = torch.randn(2, grid.tokens, 16)
        truth, before = layer(x, grid), len(calls)
        close(quick(x, grid), truth, 1e-6)
        assert len(calls) - before == (0 if grid is grids[-1] else 2)


def test_biases_follow_dtype_padding_and_inference_mode():
    layer, grid = agent(), Grid(4, 4)
    quick, x = linsight.fuse(layer), torch.randn(2, 16, 16)
    with torch.inference_mode():
        quick(x, grid)
    padded = Layout(grid, torch.tensor([[4, 4], [2, 3]]))
    for given in (grid, padded):
        close(quick(x, given), layer(x, given), 1e-6)
    x.requires_grad_()
    (found,), (truth,) = (torch.autograd.grad(each(x, grid).sum(), x) for each in (quick, layer))
    close(found, truth, 1e-5)
    close(quick.double()(x.double(), grid), layer.double()(x.double(), grid))


def test_not_many_grids_are_kept():
    quick = linsight.fuse(agent())
    for height in range(1, 12):
        quick(torch.randn(1, height, 16), Grid(height, 1))
    assert len(quick.core.tables.kept) <= 8


def test_sums_leave_what_others_hold_alone():
    """Features taken between blocks are not written over by later ones."""
    model = linsight.fuse(linsight.create_model("vit_tiny", attention="inline", **SMALL["vit_tiny"]))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first = model.forward_intermediates(x, [0], intermediates_only=True)[0].clone()
        both = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert torch.equal(both[0], first) and not torch.equal(both[0], both[1])


def test_modules_that_are_not_ours_stay():
    theirs = timm.create_model("resnet18", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(linsight.fuse(theirs)(x), theirs(x))


def test_hooks_fire_in_the_plain_model():
    model, seen = small("mlla_pyramid_tiny"), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | TokenConv):
            module.register_forward_hook(lambda module, args, out: seen.append(module))
    convolutions = {m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40))
    assert set(seen) == convolutions


@pytest.mark.parametrize("make", [linsight.fuse, fused, reparameterize_model], ids=["fuse", "view", "timm"])
def test_hooks_of_the_plain_model_go_on(make):
    """What they saw or gave is not written over, and what they are at is not left out."""
    model, x, seen = small("vit_tiny"), torch.randn(1, 3, 32, 32), []
    block = model.blocks[0]
    given = torch.randn_like(block(torch.randn(1, 17, block.norm1.weight.shape[0]), Grid(4, 4, 1)))
    block.mlp.register_forward_hook(lambda *_: given)
    block.mlp.act.register_forward_hook(lambda module, args, out: seen.append((args[0], args[0].clone())))
    kept = given.clone()
    with torch.no_grad():
        close(make(model)(x), model(x), 1e-5)
    assert torch.equal(given, kept) and len(seen) == 2 and all(torch.equal(*pair) for pair in seen)


def test_branches_that_are_expanded_are_added():
    x, branch = torch.randn(2, 3, 4), torch.randn(2, 1, 4).expand(2, 3, 4)
    assert torch.equal(add_into(x, branch), x + branch)


def test_former_names_warn():
    import linsight.ops

    for name in ("SMALL", "add_products", "foldable", "unrecorded", "watched"):
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(linsight.ops, name) is not None
    with pytest.raises(AttributeError):
        linsight.ops.no_such_name  # noqa: B018
