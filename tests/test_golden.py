"""Published numbers: the cases in `golden/`, those of other sizes too when they are put there."""

import pytest
import torch

from golden import cases


@pytest.mark.parametrize("name", cases.names())
def test_case(name):
    spec, published = cases.load(name)
    run = cases.build(spec)
    cases.load_filled(run, spec)
    run.module.eval()
    with torch.no_grad():
        out = run.call()
        assert out.shape == published.shape
        error = (out - published).abs().max() / published.abs().max()
        if not error <= cases.TOLERANCE:
            pytest.fail(f"error {error:.2e}; first to differ: {cases.first_difference(run, spec['trace'])}")
    assert sum(p.numel() for p in run.module.parameters()) == spec["params"]


def test_a_fault_is_located():
    """The trace names the first submodule behind a fault, here a scaled bias in block 5."""
    spec, _ = cases.load("inline/inline_deit_tiny")
    run = cases.build(spec)
    cases.load_filled(run, spec)
    with torch.no_grad():
        run.module.eval().blocks[5].attn.proj.bias.mul_(1.5)
        assert "'blocks.5.attn'" in cases.first_difference(run, spec["trace"])
