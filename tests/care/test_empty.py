"""A batch of no images: the answer is one of none, and a gradient of zeros, as of torch's own attention."""

import itertools

import pytest
import torch

import linsight
from linsight.convert import Attention2d, MultiheadAttention
from linsight.errors import CapabilityError
from linsight.ops import Grid, Layout, use_form
from matrix import subjects
from test_hosts import MECHANISMS, SMALL, build

GRID = Grid(4, 6)


def check(call, *shape):
    """What comes out of `call`, of an empty batch of this shape, and that gradients go through."""
    x = torch.zeros(0, *shape, requires_grad=True)
    found = call(x)
    outs = [found] if isinstance(found, torch.Tensor) else [out for out in found if out is not None]
    assert outs and all(out.shape[0] == 0 for out in outs)
    sum(out.sum() for out in outs).backward()
    assert x.grad.shape == x.shape
    return outs[0]


@pytest.mark.parametrize("subject", subjects(variants=True), ids=str)
def test_layers(subject):
    layer, can = subject.layer(), subject.can
    none = torch.zeros(0, 2, dtype=torch.long)
    keep = torch.ones(0, 24, dtype=torch.bool)
    calls = [lambda x: layer(x, GRID)]
    calls += [lambda x: layer(x, Layout(GRID, none))] * can.sizes
    calls += [lambda x: layer(x, GRID, keep=keep)] * can.keep
    calls += [lambda x: layer(x, GRID, context=x[:, :6], context_layout=Grid(2, 3))] * can.cross
    for call in calls:
        assert check(call, 24, 16).shape == (0, 24, 16)
        with use_form("plain"):
            check(call, 24, 16)
        with torch.autocast("cpu", torch.bfloat16):
            check(call, 24, 16)
        with torch.no_grad():
            assert call(torch.zeros(0, 24, 16)).shape == (0, 24, 16)
    with torch.no_grad():
        assert linsight.fuse(layer)(torch.zeros(0, 24, 16), GRID).shape == (0, 24, 16)
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("name", [entry.name for entry in linsight.list_attentions() if entry.kind == "core"])
def test_reduced_keys_and_adapters(name):
    if linsight.attention.mechanism(name).can("reduced"):
        for how in ({"reduction": 2}, {"pool": 2}):
            check(lambda x, how=how: linsight.create_attention(name, 16, 2, **how)(x, GRID), 24, 16)
    assert check(Attention2d(16, 2, name), 16, 4, 6).shape == (0, 16, 4, 6)
    try:
        module = MultiheadAttention(16, 2, attention=name, grid=(4, 6), batch_first=True)
    except CapabilityError:
        return
    assert check(lambda x: module(x, x, x)[0], 24, 16).shape == (0, 24, 16)


def of_hosts():
    """Each mechanism in every fifth host, from another one on; for `pytest -m full` in all."""
    for (i, host), (j, name) in itertools.product(enumerate(SMALL), enumerate(MECHANISMS)):
        yield pytest.param(host, name, marks=pytest.mark.full if (i + j) % 5 else ())


@pytest.mark.parametrize(("host", "attention"), [*of_hosts()])
def test_hosts(host, attention):
    model = build(host, attention)
    try:  # a quadratic mechanism is given windows, and in shifted ones has to drop tokens
        assert check(model.train(), 3, 64, 64).shape == (0, 7)
    except CapabilityError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        assert model.eval()(torch.zeros(0, 3, 33, 47)).shape == (0, 7)


@pytest.mark.parametrize("host", SMALL)
def test_other_ways_through_a_host(host):
    model = build(host)
    check(lambda x: model.forward_intermediates(x, intermediates_only=True), 3, 64, 64)
    check(build(host, features_only=True), 3, 64, 64)
    with torch.no_grad():
        assert linsight.fuse(model.eval())(torch.zeros(0, 3, 64, 64)).shape == (0, 7)
    model.train().set_grad_checkpointing(True)
    check(model, 3, 64, 64)


def test_padded_images():
    for arguments in ({}, {"class_token": False, "global_pool": "avg"}, {"pos_embed": "none"}):
        model, none = build("vit_tiny", **arguments), torch.zeros(0, 2, dtype=torch.long)
        assert check(lambda x, model=model, none=none: model(x, sizes=none), 3, 32, 40).shape == (0, 7)


@pytest.mark.parametrize("name", ["dynp_reg400m_t32", "steps_resnet18"])
def test_architectures(name):
    model = linsight.create_model(name, num_classes=7).eval()
    assert check(model, 3, 64, 64).shape == (0, 7)
