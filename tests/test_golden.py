"""Published numbers: the cases in `golden/`, those of other sizes too when they are put there."""

import pytest
import timm
import torch

import linsight
from golden import cases
from golden.spec import tensor

LOADS = True


def check(module, call, trace, rules, recorded):
    """The outputs of `call` are the published ones; else fail with the first submodule that departs."""
    with torch.no_grad():
        found = cases.outputs(call())
        for name, out in found.items():
            published = recorded[name]
            assert out.shape == published.shape
            error = (out - published).abs().max() / published.abs().max()
            if not error <= cases.TOLERANCE:
                where = cases.first_difference(module, call, trace, rules)
                pytest.fail(f"{name}: error {error:.2e}; first to differ: {where}")
    required = {key for key in recorded if key.startswith("output")} or set(recorded)
    assert not required - found.keys()


@pytest.mark.parametrize("name", cases.names(models=False))
def test_part(name):
    spec, recorded = cases.load(name)
    run = cases.build(spec)
    cases.load_filled(run, spec)
    check(run.module.eval(), run.call, spec["trace"], list(cases.rules(run)), recorded)
    assert sum(p.numel() for p in run.module.parameters()) == spec["params"]
    if "gradients" not in spec:
        return
    found = cases.gradients(run, cases.outputs(run.call()), spec["gradients"]["rule"])
    for key in spec["gradients"]["keys"]:
        error = (found[key] - recorded[key]).abs().max() / recorded[key].abs().max()
        assert error <= cases.TOLERANCE, f"{key}: error {error:.2e}"


@pytest.mark.parametrize("name", cases.names(models=True))
def test_model(name):
    """As users do it: timm's factory, `load_published`, a forward; and back to the published keys."""
    spec, recorded = cases.load(name)
    state, model_name = cases.published_state(spec), cases.model_name(name)
    images = tensor(spec["input_shape"])
    makers = [timm.create_model]
    try:
        ours = type(linsight.create_model(model_name, device="meta"))
    except linsight.LinsightError:  # timm's own, and without a host here: timm renames its keys
        model = timm.create_model(model_name).eval()
        assert linsight.load_published(model, state).adapted == ("keys, by timm",)
        check(model, lambda: model(images), {}, [], recorded)
        assert sum(p.numel() for p in model.parameters()) == spec["params"]
        return
    if type(timm.create_model(model_name, device="meta")) is not ours:
        makers.append(linsight.create_model)  # a name that is timm's own, too
    for create in makers:
        model = create(model_name).eval()
        linsight.load_published(model, state)
        check(model, lambda model=model: model(images), spec["trace"], cases.model_rules(model), recorded)
        exported = linsight.export_published(model)
        buffers = ("running_mean", "running_var", "num_batches_tracked", "angle")
        counters = {key for key in exported if key.endswith("num_batches_tracked")}
        assert exported.keys() - counters == {key for key, _ in spec["state_dict"]} - counters
        assert all(torch.equal(tensor, state[key]) for key, tensor in exported.items() if key in state)
        own = [tensor for key, tensor in exported.items() if not key.endswith(buffers)]
        assert sum(tensor.numel() for tensor in own) == spec["params"]


def test_a_fault_is_located():
    """The trace names the first submodule behind a fault, here a scaled bias in block 5."""
    spec, recorded = cases.load("inline/inline_deit_tiny")
    model = timm.create_model("inline_deit_tiny").eval()
    linsight.load_published(model, cases.published_state(spec))
    with torch.no_grad():
        model.blocks[5].attn.proj.bias.mul_(1.5)
    images = tensor(spec["input_shape"])
    with pytest.raises(pytest.fail.Exception, match=r"'blocks.5.attn'"):
        check(model, lambda: model(images), spec["trace"], cases.model_rules(model), recorded)
