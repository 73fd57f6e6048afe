"""Published numbers: the cases in `golden/`, those of other sizes too when they are put there."""

import pytest
import timm
import torch

import linsight
from golden import cases


def check(module, call, trace, rules, published):
    """The output of `call` is the published one; else fail with the first submodule that departs."""
    with torch.no_grad():
        out = call()
        assert out.shape == published.shape
        error = (out - published).abs().max() / published.abs().max()
        if not error <= cases.TOLERANCE:
            pytest.fail(f"error {error:.2e}; first to differ: {cases.first_difference(module, call, trace, rules)}")


@pytest.mark.parametrize("name", cases.names(models=False))
def test_part(name):
    spec, published = cases.load(name)
    run = cases.build(spec)
    cases.load_filled(run, spec)
    check(run.module.eval(), run.call, spec["trace"], list(cases.rules(run)), published)
    assert sum(p.numel() for p in run.module.parameters()) == spec["params"]


@pytest.mark.parametrize("name", cases.names(models=True))
def test_model(name):
    """As users do it: timm's factory, `load_published`, a forward; and back to the published keys."""
    spec, published = cases.load(name)
    state, model_name = cases.published_state(spec), cases.model_name(name)
    images = cases.tensor(spec["input_shape"])
    makers = [timm.create_model]
    if type(timm.create_model(model_name, device="meta")) is not type(linsight.create_model(model_name, device="meta")):
        makers.append(linsight.create_model)  # a name that is timm's own, too
    for create in makers:
        model = create(model_name).eval()
        linsight.load_published(model, state)
        check(model, lambda model=model: model(images), spec["trace"], cases.model_rules(model), published)
        exported = linsight.export_published(model)
        assert exported.keys() == {key for key, _ in spec["state_dict"]}
        assert all(torch.equal(tensor, state[key]) for key, tensor in exported.items())
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == spec["params"]


def test_a_fault_is_located():
    """The trace names the first submodule behind a fault, here a scaled bias in block 5."""
    spec, published = cases.load("inline/inline_deit_tiny")
    model = timm.create_model("inline_deit_tiny").eval()
    linsight.load_published(model, cases.published_state(spec))
    with torch.no_grad():
        model.blocks[5].attn.proj.bias.mul_(1.5)
    images = cases.tensor(spec["input_shape"])
    with pytest.raises(pytest.fail.Exception, match=r"'blocks.5.attn'"):
        check(model, lambda: model(images), spec["trace"], cases.model_rules(model), published)
