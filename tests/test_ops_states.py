"""States: what merging gives is what absorbing everything at once gives, and what the formula says."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linsight.ops import LogSumExp, Moments, accumulator, count_tokens, full_precision, mask_tokens, merge, take_tokens

F64 = torch.float64
CUTS = st.lists(st.integers(1, 30), min_size=0, max_size=4)


def parts(n, cuts):
    """Slices of range(n) between random cuts."""
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def fold(states):
    total, *rest = states
    for state in rest:
        total = merge(total, state)
    return total


def same(a, b, tolerance=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@given(n=st.integers(1, 30), cuts=CUTS, masked=st.booleans())
def test_moments(n, cuts, masked):
    k, v = torch.randn(2, n, 3, 4, dtype=F64) + 5, torch.randn(2, n, 3, 2, dtype=F64) - 7
    keep = torch.rand(2, n) < 0.5 if masked else None
    whole = Moments.absorb(k, v, keep)
    merged = fold([Moments.absorb(k[:, s], v[:, s], None if keep is None else keep[:, s]) for s in parts(n, cuts)])
    same(merged, whole)
    for i in range(2):
        ki, vi = (t[i] if keep is None else t[i, keep[i]] for t in (k, v))
        if len(ki):
            cross = torch.einsum("nhd,nhe->hde", ki - ki.mean(0), vi - vi.mean(0))
            same([whole.k[i], whole.v[i], whole.cross[i]], [ki.mean(0), vi.mean(0), cross])
            same([whole.covariance()[i]], [cross / len(ki)])
        assert whole.count[i] == len(ki)


@given(n=st.integers(1, 30), cuts=CUTS, masked=st.booleans())
def test_stacked_moments_are_those_of_all_tokens(n, cuts, masked):
    k, v = torch.randn(2, n, 3, 4, dtype=F64) + 5, torch.randn(2, n, 3, 2, dtype=F64) - 7
    keep = torch.rand(2, n) < 0.5 if masked else None
    each = [Moments.absorb(k[:, s], v[:, s], None if keep is None else keep[:, s]) for s in parts(n, cuts)]
    same(Moments.stacked(each), Moments.absorb(k, v, keep))


@given(n=st.integers(1, 30), cuts=CUTS, masked=st.booleans(), scale=st.sampled_from([1.0, 100.0, 1e4]))
def test_log_sum_exp(n, cuts, masked, scale):
    scores, v = torch.randn(2, n, 3, 4, dtype=F64) * scale, torch.randn(2, n, 3, 2, dtype=F64)
    keep = torch.rand(2, n) < 0.5 if masked else torch.ones(2, n, dtype=torch.bool)
    whole = LogSumExp.absorb(scores, v, keep)
    merged = fold([LogSumExp.absorb(scores[:, s], v[:, s], keep[:, s]) for s in parts(n, cuts)])
    same([merged.mean()], [whole.mean()])
    for i in range(2):
        weights = scores[i, keep[i]].softmax(0)
        same([whole.mean()[i]], [torch.einsum("nhd,nhe->hde", weights, v[i, keep[i]])])


@pytest.mark.parametrize("masked", [False, True])
def test_log_sum_exp_gradient_needs_no_gradient_of_the_maximum(masked):
    scores, v = torch.randn(1, 5, 1, 2, dtype=F64), torch.randn(1, 5, 1, 2, dtype=F64)
    keep = torch.tensor([[True, True, False, True, False]]) if masked else None

    def mean(scores, v):
        a, b = slice(0, 2), slice(2, 5)
        states = [LogSumExp.absorb(scores[:, s], v[:, s], None if keep is None else keep[:, s]) for s in (a, b)]
        return merge(*states).mean()

    assert torch.autograd.gradcheck(mean, (scores.requires_grad_(), v.requires_grad_()))


def test_a_million_tokens_around_100():
    """Why moments are central: raw sums lose in float32 what the central form keeps."""
    n = 1_000_000
    k, v = torch.randn(2, 1, n, 1, 2, dtype=F64) + 100
    exact = Moments.absorb(k, v).covariance()
    k, v = k.float(), v.float()
    central = fold([Moments.absorb(k[:, s], v[:, s]) for s in (slice(0, n // 3), slice(n // 3, n))]).covariance()
    raw = torch.einsum("bnhd,bnhe->bhde", k, v) / n - k.mean(1)[..., None] * v.mean(1)[..., None, :]
    assert (central - exact).abs().max() < 1e-6
    assert (raw - exact).abs().max() > 1e-3


class Pair(NamedTuple):
    total: torch.Tensor
    moments: Moments


def test_merge_of_nested_states():
    x = torch.randn(1, 6, 2, 3, dtype=F64)
    first, last = (Pair(x[:, s].sum(1), Moments.absorb(x[:, s], x[:, s])) for s in (slice(0, 2), slice(2, 6)))
    merged = merge(first, last)
    assert isinstance(merged, Pair)
    same([merged.total], [x.sum(1)])
    same(merged.moments, Moments.absorb(x, x))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)],
)
def test_accumulator(dtype, wanted):
    assert accumulator(dtype) == wanted
    assert count_tokens(torch.zeros(1, 3, dtype=dtype), None).dtype == wanted


def test_counts_beyond_half_precision():
    """float16 ends at 65504 and bfloat16 counts to 256; counts are neither."""
    x = torch.zeros(1, 70_001, dtype=torch.float16)
    assert count_tokens(x, None).item() == count_tokens(x, torch.ones(1, 70_001, dtype=torch.bool)).item() == 70_001


def test_mask_takes_out_nan():
    x = torch.tensor([[[1.0], [float("nan")], [float("inf")]]])
    assert mask_tokens(x, torch.tensor([[True, False, False]])).flatten().tolist() == [1.0, 0.0, 0.0]
    assert mask_tokens(x, None) is x


@pytest.mark.parametrize("rows", [1, 3])
def test_take_tokens(rows):
    x, places = torch.randn(3, 5, 2, 4, requires_grad=True), torch.randint(5, (rows, 7))
    truth = torch.stack([x[i, places[i % rows]] for i in range(3)])
    assert torch.equal(take_tokens(x, places), truth)
    weight = torch.randn_like(truth)
    ours, right = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (take_tokens(x, places), truth))
    torch.testing.assert_close(ours, right)
    none = places[:1] if rows == 1 else places[:0]
    assert take_tokens(x[:0], none).shape == (0, 7, 2, 4)


def test_full_precision_under_autocast():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [1, 2])
def test_the_mean_of_log_sum_exp_has_the_gradient_of_softmax(n):
    """Of one token, too, whose weight is 1 whatever its score: at the rim of a clamp the gradient would be lost."""
    scores, v = torch.randn(2, n, 1, 3, dtype=F64, requires_grad=True), torch.randn(2, n, 1, 2, dtype=F64)
    mean = LogSumExp.absorb(scores, v).mean()
    truth = torch.einsum("bnhd,bnhe->bhde", scores.softmax(dim=1), v)
    torch.testing.assert_close(mean, truth)
    ours, right = (torch.autograd.grad(out.square().sum(), scores)[0] for out in (mean, truth))
    torch.testing.assert_close(ours, right)
