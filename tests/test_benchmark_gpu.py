"""The benchmark of the kernels, as far as a machine without a GPU can tell."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--csv", str(tmp_path / "a.csv")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in gpu.FUNCTIONS if name != "softmax"])
def test_operators_read_slices_of_a_projection(name):
    """They are what they say: finite, of the shape of v, with gradients, and none of them the mean alone."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 36, 3, gpu.HEADS, gpu.WIDTH, requires_grad=True)
    q, k, v = qkv.unbind(2)
    out = gpu.FUNCTIONS[name](q, k, v)
    assert out.shape == v.shape and out.isfinite().all()
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert all(part.abs().max() > 0 for part in grad.unbind(2))


def row(tokens, forward=0.9, backward=0.7, ratio=0.5, **more):
    return {
        "operator": "linear", "tokens": tokens, "eager_ms": 0.1, "forward_ms": 1.0, "backward_ms": 2.0,
        "forward_share": forward, "backward_share": backward, "forward_ratio": ratio, **more,
    }  # fmt: skip


def test_goals_are_met_or_name_who_missed_them():
    finite = {"operator": "linear", "tokens": gpu.MILLION, "dtype": "float16", "finite": True}
    met = gpu.verdicts([row(4096, 0.6, 0.5), row(16384), finite])
    assert len(met) == 6 and all(line.endswith(": met") for line in met)
    missed = gpu.verdicts([row(4096, 0.5, 0.3, 1.2), row(16384, 0.7, 0.5), row(1024, 0.1, 0.1, 3.0)])
    assert [line.rpartition(": ")[2] for line in missed] == [
        "missed by linear at 16,384",
        "missed by linear at 16,384",
        "missed by linear at 4,096",
        "missed by linear at 4,096",
        "missed by linear at 4,096",
        "not measured",
    ]
    failed = {"operator": "linear", "tokens": 16384, "eager_ms": None, "forward_error": "out of memory"}
    assert "missed by linear at 16,384" in gpu.verdicts([failed])[0]


def test_the_page_shows_losses_and_failures():
    failed = {"operator": "inline", "tokens": 65536, "eager_ms": None, "forward_error": "out of memory"}
    conv = {"operator": "static depthwise convolution", "tokens": 196, "batch": 1, "channels": 8}
    conv |= {"forward_ms": 0.01, "plain_ms": None, "forward_error": ""}
    text = gpu.markdown([row(4096, ratio=1.5), failed, conv], {"device": "x"})
    assert "| `linear` | 4,096 | 1.000 | 2.000 | 90% | 70% | 1.50 | - | 0.100 |" in text
    assert "| `inline` | 65,536 | out of memory | - |" in text
    assert "| static depthwise convolution | 1 | 196 | 8 | 0.010 | - |" in text
    assert "missed by" in text
