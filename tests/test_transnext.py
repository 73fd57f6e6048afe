"""TransNeXt's attention by its definition, on grids that its tables are not made for, and its distances."""

import pytest
import torch
from torch.nn import functional as F

from linsight import create_attention
from linsight.attention.parts.log_distance import LogDistance
from linsight.ops import Grid
from matrix import Subject, contract, geometry, precision
from matrix.subject import close

F64 = torch.float64
WINDOWS = Subject("transnext", (("sr_ratio", 2), ("routed_heads", 1)))  # its other form, which the matrix does not ask


def bias(distance, query, key):
    """Of each head, for two places."""
    r = [8 * (a - b) / max(side - 1, 1) for a, b, side in zip(query, key, distance.grid, strict=True)]
    u = torch.tensor([abs(x) + 1 for x in r], dtype=F64).log2() / 3 * torch.tensor(r, dtype=F64).sign()
    return distance.fc2(F.relu(distance.fc1(u)))


def centres(side, cells):
    place = torch.arange(side, dtype=F64)[None]
    return F.adaptive_avg_pool1d(place, cells)[0].tolist()


@pytest.mark.parametrize(("size", "cells"), [((4, 6), None), ((4, 6), (2, 3)), ((5, 7), (2, 3)), ((1, 3), (1, 1))])
def test_distances_are_those_of_centres(size, cells):
    made = LogDistance(2, (6, 1), dtype=F64)
    keys = [(y, x) for y in centres(size[0], (cells or size)[0]) for x in centres(size[1], (cells or size)[1])]
    truth = torch.stack(
        [torch.stack([bias(made, (y, x), key) for key in keys]) for y in range(size[0]) for x in range(size[1])]
    )
    close(made(torch.zeros((), dtype=F64), size, cells), truth.permute(2, 0, 1))


@pytest.mark.parametrize("size", [(5, 7), (1, 2)])
def test_windows_and_cells_are_their_definition(size):
    """One query after the other, one head after the other."""
    layer = create_attention("transnext", 8, 2, sr_ratio=2, grid=(4, 6), dtype=F64).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    (height, width), x = size, torch.randn(1, size[0] * size[1], 8, dtype=F64)
    cells = max(height // 2, 1), max(width // 2, 1)
    far = F.gelu(layer.sr(x)).transpose(1, 2).unflatten(2, size)
    far = layer.norm(F.adaptive_avg_pool2d(far, cells).flatten(2).transpose(1, 2))
    centre = [(y, x) for y in centres(height, cells[0]) for x in centres(width, cells[1])]
    out = torch.zeros_like(x[0])
    for h, own in enumerate((slice(0, 4), slice(4, 8))):
        q = F.normalize(layer.q(x)[0, :, own], dim=-1)
        (k, v), (far_k, far_v) = ([part[0, :, own] for part in layer.kv(t).chunk(2, dim=-1)] for t in (x, far))
        k, far_k = F.normalize(k, dim=-1), F.normalize(far_k, dim=-1)
        for i in range(height * width):
            row, column = divmod(i, width)
            near = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            places = [
                (j, (row + dy) * width + column + dx)
                for j, (dy, dx) in enumerate(near)
                if 0 <= row + dy < height and 0 <= column + dx < width
            ]
            count = torch.tensor(float(len(places) + len(centre)), dtype=F64)
            sharp = (q[i] + layer.query_embedding[h, 0]) * F.softplus(layer.temperature[h, 0, 0]) * count.log()
            scores = [sharp @ k[n] + layer.relative_pos_bias_local[h, j] for j, n in places]
            scores += [sharp @ far_k[p] + bias(layer.distance, (row, column), c)[h] for p, c in enumerate(centre)]
            weights = torch.stack(scores).softmax(0)
            for a, (j, n) in zip(weights, places, strict=False):
                more = q[i] @ layer.learnable_tokens[h, :, j] + layer.learnable_bias[h, 0, j]
                out[i, own] += (a + more) * v[n]
            out[i, own] += weights[len(places) :] @ far_v
    close(layer(x, Grid(*size))[0], layer.proj(out))


def test_gates_are_asked_for():
    """Without, the layer is plain TransNeXt's; with one option the other has its default."""
    assert create_attention("transnext", 8, 4).gates is None
    made = [create_attention("transnext", 8, 4, **{name: 1}).gates for name in ("shared_heads", "routed_heads")]
    assert [(gates.shared, gates.routed) for gates in made] == [(1, 2), (1, 1)]


@pytest.mark.parametrize(
    "check",
    [
        contract.gradients_are_right,
        contract.module_protocol,
        geometry.any_grid_and_prefix,
        geometry.packed_batch_is_each_image_alone,
        precision.autocast_is_finite,
        precision.half_models_are_finite,
        precision.no_number_is_left_unwritten,
    ],
    ids=lambda check: check.__name__,
)
def test_windows_meet_the_contract(check):
    check(WINDOWS)
