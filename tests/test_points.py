"""Points that a group moves, voxels in windows: the definitions read pair by pair, invariance, padding, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from linsight.errors import LinsightError, UnknownNameError
from linsight.models.points import GROUPS, LieAttention, LieTransformer, VoxelAttention, VoxelBlock, lift, voxel_windows

F64 = torch.float64
OPTIONS = [
    {"group": "T", "axes": 2},
    {"group": "T", "axes": 3, "kernel": "relative", "weights": "mean"},
    {"group": "SE2", "weights": "exp"},
    {"group": "SE2", "kernel": "relative"},
]


def matrix(element):
    """The 3 x 3 matrix of an element of SE(2), by the exponential of its matrix in the algebra."""
    angle, a, b = element.tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0, -angle, a], [angle, 0, b], [0, 0, 0]], dtype=F64))


def coordinates(motion):
    """The algebra's coordinates of a 3 x 3 matrix, by the exponential of which it is found again."""
    angle = math.atan2(motion[1, 0], motion[0, 0])
    sides = torch.stack([matrix(torch.tensor([angle, *row]))[:2, 2] for row in ((1.0, 0.0), (0.0, 1.0))], dim=1)
    return torch.tensor([angle, *torch.linalg.solve(sides, motion[:2, 2]).tolist()], dtype=F64)


def drawn(options, points=9):
    torch.manual_seed(0)
    layer = LieAttention(8, 2, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(2, points, layer.axes, dtype=F64), torch.randn(2, points, 8, dtype=F64)


@pytest.mark.parametrize("still", [0.0, 1e-7, 2e-3])
def test_pairs_of_rigid_motions(still):
    """Also where the angle between two is zero, or nearly so."""
    elements = torch.randn(1, 5, 3, dtype=F64)
    elements[0, 1, 0] = elements[0, 0, 0] + still
    elements[0, 2, 0] = still
    pairs = GROUPS["SE2"](elements)
    for i in range(5):
        for j in range(5):
            wanted = coordinates(torch.linalg.inv(matrix(elements[0, j])) @ matrix(elements[0, i]))
            torch.testing.assert_close(pairs[0, i, j], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scores_as_the_paper_has_them(options):
    layer, elements, x = drawn(options)
    q, k, v = (part(x).unflatten(-1, (2, 4)) for part in (layer.q, layer.k, layer.v))
    pairs = GROUPS[layer.group](elements)
    out = torch.empty(2, 9, 2, 4, dtype=F64)
    for image in range(2):
        for head in range(2):
            for i in range(9):
                scores = []
                for j in range(9):
                    far = pairs[image, i, j]
                    one, other = q[image, i, head], k[image, j, head]
                    if layer.kernel == "mlp":
                        for part in layer.place:
                            far = F.silu(far @ part.weight[head] + part.bias[head])
                        scores.append(one @ other / 2 + far[0])
                    else:
                        far = layer.place(far).unflatten(0, (2, 4))[head]
                        beside = (one + layer.place_bias[head, 0]) @ far + layer.key_bias[head, 0] @ other
                        scores.append((one @ other + beside) / 2)
                row = torch.stack(scores)
                row = {"softmax": row.softmax(0), "exp": row.exp() / 9, "mean": row / 9}[layer.weights]
                out[image, i, head] = row @ v[image, :, head]
    torch.testing.assert_close(layer(elements, x), layer.proj(out.flatten(2)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_motion_of_all_points_changes_nothing(options):
    layer, elements, x = drawn(options)
    if layer.group == "T":
        moved = elements + torch.randn(layer.axes, dtype=F64)
    else:
        motion = matrix(torch.tensor([0.8, -1.0, 2.0]))
        moved = torch.stack([torch.stack([coordinates(motion @ matrix(one)) for one in image]) for image in elements])
    torch.testing.assert_close(layer(moved, x), layer(elements, x), rtol=1e-4, atol=1e-6)  # logs near pi lose digits
    model = LieTransformer(8, 3, dim=8, depth=2, num_heads=2, **options).double()
    torch.testing.assert_close(model(moved, x), model(elements, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dropped_points_are_never_seen(options):
    layer, elements, x = drawn(options)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    model = LieTransformer(8, 3, dim=8, depth=2, num_heads=2, **options).double()
    alone = elements[1:, :5], x[1:, :5]
    torch.testing.assert_close(layer(elements, x, keep)[1:, :5], layer(*alone))
    poisoned = [part.masked_fill(~keep[..., None], math.nan) for part in (elements, x)]
    torch.testing.assert_close(model(*poisoned, keep)[1:], model(*alone))


def test_points_are_lifted_to_what_moves_the_origin_there():
    points = torch.randn(2, 4, 2, dtype=F64)
    elements = lift(points, 3, torch.Generator().manual_seed(0))
    assert elements.shape == (2, 12, 3)
    for where, three in zip(points.flatten(0, 1), elements.unflatten(1, (4, 3)).flatten(0, 1), strict=True):
        for one in three:
            torch.testing.assert_close(matrix(one)[:2, 2], where, rtol=1e-6, atol=1e-7)
        turns = (three[:, 0] - three[0, 0]) % (2 * math.pi)
        torch.testing.assert_close(turns.sort().values, torch.arange(3, dtype=F64) * 2 * math.pi / 3)


def test_points_that_fit_no_model_are_refused():
    with pytest.raises(UnknownNameError, match="SE3"):
        LieAttention(8, 2, group="SE3")
    with pytest.raises(LinsightError, match="does not divide"):
        LieAttention(8, 3)
    with pytest.raises(LinsightError, match="ask for"):
        LieAttention(8, 2)(torch.zeros(1, 4, 3), torch.zeros(1, 4, 8))
    with pytest.raises(LinsightError, match="lifts=0"):
        lift(torch.zeros(1, 1, 2), 0)


def one_line(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_points_are_looked_at_before_they_are_used():
    """Also those of no point, whose mean would be no number."""
    model = LieTransformer(3, 2, dim=8, depth=1, num_heads=2)
    elements, x = torch.rand(2, 4, 2), torch.randn(2, 4, 3)
    for wrong in (x[..., :2], x[0], x[:, :0], x.long(), x.half(), x.to("meta"), x.tolist()):
        one_line(lambda wrong=wrong: model(elements, wrong), "features")
    for wrong in (elements.tolist(), elements.to("meta"), elements[:1], elements[..., :1]):
        one_line(lambda wrong=wrong: model(wrong, x), "elements")
    for keep in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool), [[True] * 4] * 2):
        one_line(lambda keep=keep: model(elements, x, keep), "keep")
        one_line(lambda keep=keep: model.blocks[0].attn(elements, torch.randn(2, 4, 8), keep), "keep")
    one_line(lambda: model.blocks[0].attn(elements, x), "features")
    assert model(elements[:0], x[:0]).shape == (0, 2)
    for sizes in ({"dim": 0}, {"dim": 8.0}, {"depth": 0}, {"num_heads": 0}, {"axes": 0}, {"kernel_dim": "4"}):
        one_line(lambda sizes=sizes: LieTransformer(3, 2, **{"dim": 8, "depth": 1, "num_heads": 2, **sizes}), *sizes)
    one_line(lambda: LieTransformer(0, 2), "in_features")
    for points in (torch.rand(4, 2), torch.rand(1, 4, 3), torch.ones(1, 4, 2, dtype=torch.long)):
        one_line(lambda points=points: lift(points), "points")


def voxels(signals=("xyz", "rgb")):
    torch.manual_seed(0)
    layer = VoxelAttention(8, 2, window_size=3, quant_size=2, signals=signals).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    cells = torch.unique(torch.randint(0, 6, (60, 3)), dim=0)
    told = torch.cat([cells % 3 + torch.rand(len(cells), 3), torch.rand(len(cells), 3 * len(signals) - 3) * 2 - 1], 1)
    return layer, torch.randn(len(cells), 8, dtype=F64), told.double(), cells


@pytest.mark.parametrize("signals", [("xyz",), ("xyz", "rgb", "norm")], ids=len)
def test_voxels_see_those_of_their_window(signals):
    layer, x, told, cells = voxels(signals)
    windows = voxel_windows(cells, 3)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(1)
    out = torch.zeros(len(x), 2, 4, dtype=F64)
    for i in range(len(x)):
        mine = [j for j in range(len(x)) if (cells[i] // 3).equal(cells[j] // 3)]
        scores, values = [], []
        for j in mine:
            sums = {of: torch.zeros(2, 4, dtype=F64) for of in ("query", "key", "value")}
            for place, (name, step, reach) in enumerate(zip(signals, layer.steps, layer.reach, strict=True)):
                for axis in range(3):
                    far = step * told[i, 3 * place + axis] - step * told[j, 3 * place + axis] + reach
                    at = min(max(math.floor(far), 0), 2 * reach - 1)
                    for of in sums:
                        sums[of] = sums[of] + layer.get_parameter(f"{of}_{name}_table")[axis, at]
            query = q[i] * layer.scale
            scores.append((query * (k[j] + sums["query"]) + k[j] * sums["key"]).sum(-1))
            values.append(v[j] + sums["value"])
        weights = torch.stack(scores).softmax(0)
        out[i] = (weights[..., None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(layer(x, told, windows), layer.proj(out.flatten(1)))


def test_the_order_of_voxels_and_the_numbers_of_windows_do_not_matter():
    layer, x, told, cells = voxels()
    windows = voxel_windows(cells, 3, shift=1)
    order = torch.randperm(len(x))
    again = layer(x[order], told[order], 7 * windows[order] - 3)
    torch.testing.assert_close(again, layer(x, told, windows)[order])
    block = VoxelBlock(8, 2, window_size=3, quant_size=2).double().requires_grad_()
    block(x, told, windows).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_windows_of_voxels_are_of_one_image():
    cells = torch.tensor([[0, 0, 0], [2, 2, 2], [3, 0, 0], [-1, 0, 0], [0, 0, 0]])
    windows = voxel_windows(cells, 3, image=torch.tensor([0, 0, 0, 0, 1]))
    assert windows[0] == windows[1] and len(windows.unique()) == 4
    assert len(voxel_windows(cells[:3], 3, shift=1).unique()) == 3
    assert VoxelAttention(8, 2)(torch.zeros(0, 8), torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)).shape == (0, 8)


def test_voxels_that_fit_no_model_are_refused():
    for options in ({"signals": ("rgb",)}, {"window_size": 0}, {"num_heads": 3}):
        with pytest.raises(LinsightError):
            VoxelAttention(8, **{"num_heads": 2, **options})
    with pytest.raises(LinsightError, match="signals are of shape"):
        VoxelAttention(8, 2)(torch.zeros(4, 8), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(LinsightError, match="whole numbers"):
        voxel_windows(torch.zeros(4, 3), 3)
    cells = torch.zeros(4, 3, dtype=torch.long)
    for image in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 1, dtype=torch.long)):
        one_line(lambda image=image: voxel_windows(cells, 3, image=image), "image")
    one_line(lambda: voxel_windows(cells, 0), "window_size=0")
    x, told, windows = torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
    for make in (VoxelAttention, VoxelBlock):
        for wrong in (x[:, :4], x[None], x.half(), x.long(), x.tolist()):
            one_line(lambda make=make, wrong=wrong: make(8, 2)(wrong, told, windows), "features")
        one_line(lambda make=make: make(8, 2)(x, told, windows.float()), "windows")
        one_line(lambda make=make: make(8, 2)(x, told.to("meta"), windows), "signals")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_models_are_near_and_coordinates_may_be_wider_or_whole(dtype):
    for options in OPTIONS:
        layer, elements, x = drawn(options)
        whole = elements.mul(3).round()
        for places in (elements, whole.long()):
            wanted = layer(places.double(), x)
            narrow = LieAttention(8, 2, **options, dtype=dtype)
            narrow.load_state_dict(layer.state_dict())
            out = narrow(places if places.dtype == torch.long else places.float(), x.to(dtype))
            assert out.dtype == dtype
            assert (out - wanted).abs().max() / wanted.abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)
    layer, x, told, cells = voxels()
    narrow = VoxelAttention(8, 2, window_size=3, quant_size=2, dtype=dtype)
    narrow.load_state_dict(layer.state_dict())
    wanted, out = layer(x, told, voxel_windows(cells, 3)), narrow(x.to(dtype), told.float(), voxel_windows(cells, 3))
    assert (out - wanted).abs().max() / wanted.abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


def test_points_of_any_weights_and_gradients_at_equal_ones():
    for options in OPTIONS:
        layer, elements, x = drawn(options)
        given = dict(layer.named_parameters())
        called = torch.func.functional_call(
            layer, {name: tensor.detach() for name, tensor in given.items()}, (elements, x)
        )
        torch.testing.assert_close(called, layer(elements, x))
        equal = elements[:, :1].expand_as(elements).clone().requires_grad_()
        layer(equal, x).sum().backward()
        assert equal.grad.isfinite().all()
    layer, x, told, cells = voxels()
    weights = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    windows = voxel_windows(cells, 3)
    torch.testing.assert_close(torch.func.functional_call(layer, weights, (x, told, windows)), layer(x, told, windows))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="this torch has it no more")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_points_by_linear_layers_in_int8(options):
    model = LieTransformer(8, 3, dim=8, depth=1, num_heads=2, **options).eval()
    x, elements = torch.randn(2, 9, 8), torch.randn(2, 9, model.blocks[0].attn.axes)
    with torch.no_grad():
        wanted = model(elements, x)
        found = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})(elements, x)
    assert (found - wanted).norm() <= 0.5 * wanted.norm()
