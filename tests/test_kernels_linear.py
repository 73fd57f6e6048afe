"""The fused form of linear attention against the plain one; without a GPU, in Triton's interpreter."""

import importlib
import itertools
import math
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from linsight.errors import LinsightError
from linsight.ops import (
    FEATURE_MAPS,
    Features,
    Grid,
    LinearState,
    Tile,
    Turn,
    affine_read,
    central_absorb,
    linear_absorb,
    linear_read,
    use_form,
)
from linsight.ops.triton import launch, linear
from linsight.ops.triton import linear_kernels as kernels
from linsight.ops.triton.maps import MAPS

pytestmark = pytest.mark.timeout(300)  # the interpreter is slow where cores are shared
F64, HALF = torch.float64, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = Grid(5, 9, 3)  # 48 tokens: two blocks of the interpreter, one for each of two programs
HEADS = 2


@contextmanager
def poisoned():
    """Freshly allocated memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64).to(DEVICE, dtype)


def close(ours, truth, tolerance=1e-12):
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def run(form, compute, leaves):
    """What `compute` gives of `leaves`, and their gradients."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    with use_form(form), poisoned():
        out = compute(*leaves)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in out]
        return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, weights)]


def compare(compute, leaves, tolerance=1e-12):
    close(run("triton", compute, leaves), run("plain", compute, leaves), tolerance)


LAYOUTS = {
    "dense": lambda x: x,
    "qkv": lambda x: torch.stack([x, x, x], dim=2)[:, :, 1],  # a slice of a fused projection
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}
KINDS = ["raw", "central", "normalised", "affine"]
WIDTHS = [(8, 20), (6, 3), (16, 16)]  # of queries and keys, of values
TURNED = [False, True]
CASES = [
    (*which, *how)
    for which, *how in zip(
        itertools.product(sorted(MAPS), KINDS),
        *map(itertools.cycle, (LAYOUTS, WIDTHS, [True, False, True], [True, "heads", "heads", False, False])),
        strict=False,
    )
]


def case(name, kind, layout, widths, masked, turns, dtype=F64, grid=GRID, batch=2):
    """(function of leaves, leaves): one operator on random tokens."""
    d, e = widths
    lay = LAYOUTS[layout]
    x = lay(randn(batch, grid.tokens, HEADS, d, dtype=dtype))
    values = lay(randn(batch, grid.tokens, HEADS, e, dtype=dtype))
    acc = torch.promote_types(dtype, torch.float32)
    heads = HEADS if turns == "heads" else 1  # each head alone, or all channels together
    turn = (
        Turn.of(Tile.whole(grid), HEADS * d, heads=heads, device=x.device, dtype=acc) if turns and d % 2 == 0 else None
    )
    keep = (torch.rand(batch, grid.tokens) < 0.7).to(DEVICE) if masked else None
    if kind in ("raw", "central"):
        operator = {"raw": linear_absorb, "central": central_absorb}[kind]
        first = 1 if kind == "central" else 0  # a count has no gradient
        return lambda x, v: operator(Features(x, name, turn=turn), v, keep)[first:], [x, values]
    matrix, add = randn(batch, HEADS, d, e, dtype=acc), values[:, grid.prefix :] if masked else None
    leaves = [x, matrix] + ([] if add is None else [add])
    if kind == "affine":
        shift = randn(batch, HEADS, e, dtype=acc)

        def affine(x, matrix, shift, add=None):
            return affine_read(Features(x, name, turn=turn), matrix, shift, add=add, dtype=dtype)

        return affine, [x, matrix, shift, *leaves[2:]]
    total = torch.rand(batch, HEADS, d).to(DEVICE, acc) + 0.5

    def normalised(x, matrix, total, add=None):
        x = x.abs() if name in ("identity", "leaky_relu") else x  # norms away from 0
        return linear_read(Features(x, name, turn=turn), LinearState(matrix, total), 0.5, add=add, dtype=dtype)

    return normalised, [x, matrix, total, *leaves[2:]]


def test_maps_are_all_here():
    assert MAPS.keys() == FEATURE_MAPS.keys()


@pytest.mark.parametrize("chosen", CASES, ids=lambda c: "-".join(map(str, c)).replace(" ", ""))
def test_equals_plain(chosen):
    compare(*case(*chosen))


@pytest.mark.parametrize("power", [2, 3, 2.5])
@pytest.mark.parametrize("kind", ["raw", "read"])
def test_power_and_factors(kind, power):
    x, values = randn(2, 40, HEADS, 6), randn(2, 40, HEADS, 5)
    column, before, after = (torch.rand(*s, dtype=F64, device=DEVICE) + 0.5 for s in ((HEADS, 6), (2, 40), (2, 40)))
    map = "positive" if power == 2.5 else "identity"
    if kind == "raw":
        keep = (torch.rand(2, 40) < 0.7).to(DEVICE)

        def absorb(x, values, column, after):
            return linear_absorb(Features(x, map, power, column, before, after), values, keep)

        compare(absorb, [x, values, column, after])
        return
    matrix, shift = randn(2, HEADS, 6, 5), randn(2, HEADS, 5)

    def read(x, matrix, shift, column, after):
        return affine_read(Features(x, map, power, column, before, after), matrix, shift)

    compare(read, [x, matrix, shift, column, after])


@pytest.mark.parametrize(("tokens", "widths"), [(1, (8, 8)), (0, (8, 8)), (33, (1, 1)), (64, (40, 128))])
def test_any_number_of_tokens_and_width(tokens, widths):
    grid = Grid(1, tokens)
    for kind in ("raw", "central", "affine") if tokens else ("raw", "affine"):
        compare(*case("elu+1", kind, "dense", widths, False, False, grid=grid, batch=1))


@pytest.mark.parametrize("kind", ["raw", "central"])
def test_dropped_tokens_are_not_even_read(kind):
    """NaN in them changes nothing, and their gradients are zero; of one image nothing is kept."""
    keep = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    keep[0, ::3] = True
    operator = {"raw": linear_absorb, "central": central_absorb}[kind]

    def absorb(k, v):
        return operator(Features(k, "elu+1"), v, keep)[-3:]

    clean = [randn(2, 40, HEADS, 8).masked_fill(~keep[..., None, None], 0) for _ in range(2)]
    dropped = [t.masked_fill(~keep[..., None, None], bad) for t, bad in zip(clean, (math.nan, math.inf), strict=True)]
    ours, truth = run("triton", absorb, dropped), run("plain", absorb, clean)
    close(ours, truth)
    assert not any(gradient[~keep].any() for gradient in ours[-2:])


@pytest.mark.parametrize("what", ["wide heads", "rotation across heads"])
def test_what_does_not_fit_is_plain(what, monkeypatch):
    monkeypatch.setattr(launch.Inputs, "plan", lambda *_, **__: pytest.fail("a kernel was run"))
    d = 130 if what == "wide heads" else 6
    x, v, turn = randn(1, 4, 4, d), randn(1, 4, 4, 8), None
    if what == "rotation across heads":
        x = randn(1, 4, 4, 5)
        turn = Turn.of(Tile.whole(Grid(2, 2)), 20, device=x.device, dtype=F64)
    compare(lambda x, v: linear_absorb(Features(x, turn=turn), v), [x, v])


@pytest.mark.parametrize("kind", KINDS)
def test_many_shares_some_of_them_empty(kind, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", launch.Blocks(16, 1, 1))
    monkeypatch.setattr(launch, "shares", lambda *_: (5, 16))  # of 48 tokens
    compare(*case("elu+1", kind, "qkv", (8, 8), True, True, batch=1))


@pytest.mark.parametrize("tokens", [0, 1, 49, 256, 4096, 1_000_003])
@pytest.mark.parametrize("programs", [1, 6, 100_000])
def test_shares_of_a_gpu_cover_all_tokens(tokens, programs, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    for blocks in (launch.Blocks(16, 4, 1), launch.Blocks(128, 4, 3)):
        splits, share = launch.shares(tokens, programs, blocks, torch.device("cuda"))
        assert 1 <= splits <= 64
        assert share % blocks.tokens == 0
        assert (splits - 1) * share < max(1, tokens) <= splits * share


@pytest.mark.parametrize(
    ("kilobytes", "dtype", "width"),
    [(227, F64, 64), (227, HALF, 128), (163, HALF, 128), (99, HALF, 64), (64, HALF, 32)],
)
def test_heads_as_wide_as_shared_memory_allows(kilobytes, dtype, width, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(launch, "properties_of", lambda device: properties)
    assert launch.widest(SimpleNamespace(device=torch.device("cuda"), dtype=dtype)) == width


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter checks")
def test_addresses_are_of_64_bits(monkeypatch):
    """Tokens 2^30 numbers apart, none of which is kept, or read: no product of 32 bits overflows."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    x, keep = randn(1, 48, 1, 8), torch.zeros(1, 48, dtype=torch.bool)
    plan = launch.Inputs.of(Features(x)).plan(8, F64, F64, False, CENTRAL=False)
    matrix, left, far = x.new_empty(2, 1, 1, 8, 8), x.new_empty(2, 1, 1, 8), (1, 2**30, 2**30, 2**30)
    tensors = (x, far, plan.factors, None, x, far, keep, keep.stride(), matrix, left, None, None)
    kernels.absorb_kernel[(1, 2)](*tensors, 48, 1, plan.share, **plan.constants)
    assert not matrix.any()


@pytest.mark.full
def test_central_moments_of_many_tokens_around_100(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", launch.Blocks(256, 1, 1))
    k, v = (randn(1, 2**17, 1, 4).float() + 100 for _ in range(2))
    truth = central_absorb(k.double(), v.double()).covariance()
    with use_form("triton"):
        assert (central_absorb(k, v).covariance() - truth).abs().max() < 1e-6


def test_autocast_changes_nothing():
    compute, leaves = case("elu+1", "normalised", "dense", (8, 8), True, False, dtype=torch.float32)
    alone = run("triton", compute, leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run("triton", compute, leaves)
    close(inside, alone, 0)


def test_states_of_halves_are_float32():
    for kind in ("raw", "central"):
        compute, leaves = case("relu", kind, "dense", (8, 8), True, False, dtype=torch.float16)
        *states, dk, dv = run("triton", compute, leaves)
        assert {t.dtype for t in states} == {torch.float32}
        assert dk.dtype == dv.dtype == torch.float16


def features_of(x):
    """With everything that features can have."""
    _, n, heads, d = x.shape
    turn = Turn.of(Tile.whole(Grid(4, n // 4)), heads * d, device=x.device, dtype=x.dtype)
    column, before, after = (
        torch.rand(*s, dtype=x.dtype, device=x.device) + 0.5 for s in (x.shape[2:], (1, n), (1, n))
    )
    return Features(x, "positive", 2, column.requires_grad_(), before, after.requires_grad_(), turn)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_opcheck():
    x, v, keep = randn(1, 40, 2, 4).requires_grad_(), randn(1, 40, 2, 6).requires_grad_(), torch.rand(1, 40) < 0.7
    keep, full, plain = keep.to(DEVICE), launch.Inputs.of(features_of(x)), launch.Inputs.of(Features(x))
    matrix, total, shift = (randn(1, 2, *s).requires_grad_() for s in ((4, 6), (4,), (6,)))
    add = randn(1, 37, 2, 6).requires_grad_()
    empty = v.new_empty(0)
    for operator, *arguments in (
        (linear.absorb_tokens, *full, v, keep, False),
        (linear.absorb_tokens, *plain, v, None, True),
        (linear.read_tokens, *full, matrix, total, add, 0.1, True, F64),
        (linear.read_tokens, *plain, matrix, shift, None, 0.0, False, F64),
        (linear.absorb_backward, *full, v, keep, False, total, empty, matrix, total, empty),
        (linear.read_backward, *full, matrix, total, 0.1, True, v),
    ):
        if operator in (linear.absorb_backward, linear.read_backward):
            arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(operator, tuple(arguments))


def attention(x, v):
    return linear_read(Features(x, "elu+1"), linear_absorb(Features(x, "elu+1"), v), 1e-6)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiles_into_one_graph_of_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((1, 40), (2, 33)):
        leaves = [randn(batch, tokens, 2, d) for d in (4, 6)]
        close(run("triton", compiled, leaves), run("triton", attention, leaves))


def test_second_derivatives_are_refused():
    x, v = randn(1, 5, 1, 4).requires_grad_(), randn(1, 5, 1, 4)
    with use_form("triton"):
        (gradient,) = torch.autograd.grad(attention(x, v).sum(), x, create_graph=True)
        with pytest.raises(LinsightError, match="no second derivatives"):
            gradient.sum().backward()


def test_nothing_needs_triton():
    """The library imports and runs where it is not installed, and imports no kernels until they are chosen."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, linsight; from linsight.ops import linear_attention;"
        "x = torch.rand(1, 5, 1, 4, requires_grad=True); linear_attention(x, x, x).sum().backward();"
        "assert not any(name.startswith('linsight.ops.triton.') for name in sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
