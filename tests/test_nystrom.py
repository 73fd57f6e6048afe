"""Nystrom attention step by step; its segments, its start, its convolution; the matrix with fewer landmarks."""

import copy

import pytest
import torch

import linsight
import matrix
from linsight import create_attention
from linsight.attention import create_core, run_rounds
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, tiles
from matrix import geometry, graphs, precision
from matrix.subject import cast, close, random_tokens

F64 = torch.float64
# With 64 landmarks the small grids of the matrix have exact softmax.
FEW = matrix.Subject("nystrom", (("landmarks", 4),))


def published_segments(total, count):
    """Where each segment begins and ends."""
    if total % count == 0:
        lengths = [total // count] * count
    else:
        short = total // count
        first = (short + 1) * count - total
        lengths = [short] * first + [short + 1] * (count - first)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert ends[-1] == total
    return list(zip([0, *ends[:-1]], ends, strict=True))


def published(core, tokens, scale=None):
    """The steps of the paper, one head after the other; the start couples all of them if it is the original one."""
    q, k, v = tokens[:3]
    batch, total, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    out, kernels = torch.zeros_like(v), {}
    for b in range(batch):
        for h in range(heads):
            one_q, one_k, one_v = q[b, :, h] * scale, k[b, :, h], v[b, :, h]
            if core.landmarks >= total:
                out[b, :, h] = (one_q @ one_k.T).softmax(-1) @ one_v
                continue
            runs = published_segments(total, core.landmarks)
            mean_q, mean_k = (torch.stack([x[a:z].mean(0) for a, z in runs]) for x in (one_q, one_k))
            f, a, g = (one_q @ mean_k.T).softmax(-1), (mean_q @ mean_k.T).softmax(-1), (mean_q @ one_k.T).softmax(-1)
            kernels[b, h] = f, a, g @ one_v
    if kernels:
        largest = max(a.sum(0).max() for _, a, _ in kernels.values())
        for (b, h), (f, a, values) in kernels.items():
            z = a.T / (largest if core.start == "original" else a.sum(0).max())
            one = torch.eye(core.landmarks, dtype=F64)
            for _ in range(6):
                z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
            out[b, :, h] = f @ z @ values
    if core.conv is not None:
        weight = core.conv.weight[:, 0, :, 0]
        half = weight.shape[1] // 2
        for i in range(total):
            for tap in range(weight.shape[1]):
                if 0 <= i + tap - half < total:
                    out[:, i] += weight[:, tap, None] * v[:, i + tap - half]
    return out


@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(1, 7), Grid(3, 5, 2), Grid(1, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"landmarks": 4},
        {"landmarks": 5, "start": "original"},
        {"landmarks": 7, "conv": 3},
        {"landmarks": 1},
        {"landmarks": 3, "scale": 0.2},
        {"conv": 9},
    ],
    ids=str,
)
def test_core_is_the_published_steps(options, grid):
    core = create_core("nystrom", 8, 2, **options).double()
    tokens = random_tokens(core, 2, grid, dim=8)
    tokens.q[0] *= 3  # so that the images' starts differ
    close(core(tokens, Layout(grid)), published(core, tokens, options.get("scale")))


@pytest.mark.parametrize(
    "check",
    [
        *(check for check in matrix.VARIANT_CHECKS if check is not geometry.dropped_tokens_never_leak),
        geometry.packed_batch_is_each_image_alone,
        precision.autocast_is_finite,
        precision.states_are_full_precision,
        graphs.exports_with_dynamic_sizes,
    ],
    ids=lambda check: check.__name__,
)
def test_matrix_with_more_tokens_than_landmarks(check):
    """Padded and packed images are on both sides of 4, in one batch."""
    check(FEW)


def test_states_do_not_grow_with_the_image():
    core = create_core("nystrom", 8, 2, landmarks=4)
    for grid in (Grid(1, 3), Grid(8, 8), Grid(30, 50)):
        tokens = cast(random_tokens(core, 1, grid, dim=8), torch.float32)
        done = ()
        for now in core.rounds:
            state = now.absorb(core, tokens, tiles(grid, 99, 99)[0], done)
            assert sum(field.numel() for field in state) <= 4 * 8 + 4 * 2 * 2
            done += (now.finish(core, state, done),)


def test_the_original_start_couples_the_batch():
    """And "exact" does not; so a batch that is padded or packed is refused."""
    grid = Grid(4, 6)
    cores = {start: create_core("nystrom", 8, 2, landmarks=4, start=start).double() for start in ("exact", "original")}
    tokens = random_tokens(cores["exact"], 2, grid, dim=8)
    tokens.q[1] *= 5
    tokens.k[1] *= 5
    apart = {}
    for start, core in cores.items():
        alone = core(tokens.each(lambda x: x[:1]), Layout(grid))
        apart[start] = (core(tokens, Layout(grid))[:1] - alone).abs().max() / alone.abs().max()
    assert apart["exact"] < 1e-12 and apart["original"] > 1e-3
    layer = create_attention("nystrom", 8, 2, start="original")
    x = torch.randn(1, 6, 8)
    for layout in (Layout(Grid(2, 3), torch.tensor([[2, 2]])), Layout.packed([Grid(2, 3)])):
        with pytest.raises(CapabilityError, match="'nystrom' does not support"):
            layer(x, layout)


def test_a_convolution_has_no_tiles_and_no_padding():
    layer, grid = create_attention("nystrom", 8, 2, landmarks=4, conv=3), Grid(4, 6)
    tokens = cast(random_tokens(layer.core, 1, grid, dim=8), torch.float32)
    with pytest.raises(CapabilityError, match="'nystrom' does not support tiles"):
        run_rounds(layer.core, tokens, tiles(grid, 2, 3))
    with pytest.raises(CapabilityError, match="padded batches"):
        layer(torch.randn(1, 24, 8), Layout(grid, torch.tensor([[2, 2]])))
    run_rounds(create_core("nystrom", 8, 2, landmarks=4), tokens, tiles(grid, 2, 3))  # others keep theirs
    assert set(linsight.export_published(layer)) == {
        *("qkv.weight", "qkv.bias", "conv.weight", "proj.weight", "proj.bias"),
    }


def test_packed_images_with_a_convolution():
    geometry.packed_batch_is_each_image_alone(matrix.Subject("nystrom", (("landmarks", 4), ("conv", 3))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_inverse_is_computed_in_float32(dtype):
    """Half the precision of A would cost percents of Z."""
    core, grid = create_core("nystrom", 64, 1, landmarks=16).to(dtype), Grid(16, 16)
    tokens = cast(random_tokens(core, 1, grid, dim=64), dtype)
    tokens = tokens._replace(q=tokens.q * 3)
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    ours = core(tokens, Layout(grid)).double()
    assert (ours - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("options", [{"landmarks": 0}, {"conv": 4}, {"conv": -1}], ids=str)
def test_mistakes_are_told(options):
    ((name, value),) = options.items()
    with pytest.raises(LinsightError, match=f"{name}={value} of 'nystrom'"):
        create_attention("nystrom", 8, 2, **options)
