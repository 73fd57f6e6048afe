"""ConViT's attention: as timm's with timm's weights, its weights on any grid with prefix tokens, its local start."""

import math

import pytest
import timm
import torch
from timm.models.convit import GPSA as Timms

import linsight
from linsight import create_attention
from linsight.ops import Grid
from matrix.costs import Elements
from matrix.subject import close


def test_weights_of_timm_go_on():
    """Those of a whole model, layer by layer, at other sizes than it was built for."""
    model = timm.create_model("convit_tiny", img_size=64, num_classes=3, depth=3, local_up_to_layer=2).eval()
    torch.nn.init.normal_(model.blocks[1].attn.gating_param)
    torch.nn.init.normal_(model.blocks[1].attn.pos_proj.weight)
    theirs = model.blocks[1].attn
    ours = create_attention("gpsa", theirs.dim, theirs.num_heads)
    linsight.load_published(ours, theirs.state_dict())
    for side in (4, 6):
        x = torch.randn(2, side * side, theirs.dim)
        with torch.no_grad():
            close(ours(x, Grid(side, side)), theirs(x), 1e-5)
    assert linsight.export_published(ours).keys() == theirs.state_dict().keys()


def test_start_is_timms():
    theirs = Timms(36, 9, locality_strength=0.7)
    theirs.local_init()
    ours = create_attention("gpsa", 36, 9, locality_strength=0.7)
    close(ours.core.pos_proj.weight, theirs.pos_proj.weight)
    assert torch.equal(ours.core.gating_param, theirs.gating_param)
    assert torch.equal(ours.v.weight, torch.eye(36))
    assert {name for name, _ in ours.named_parameters() if name.endswith("bias")} == {"proj.bias", "core.pos_proj.bias"}


@pytest.mark.parametrize("dropping", [False, True])
def test_it_is_its_weights(dropping):
    """On an oblong grid; prefix tokens attend, and are attended to, by content alone."""
    layer, grid = create_attention("gpsa", 8, 2).double(), Grid(3, 4, 2)
    core = layer.core
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 14, 8, dtype=torch.float64)
    keep = torch.rand(1, 14) < 0.6 if dropping else torch.ones(1, 14, dtype=torch.bool)
    keep[0, 6:10] = not dropping  # a whole row, too
    keep[0, 2] = True
    q, k = layer.qk(x)[0].unflatten(-1, (2, 2, 4)).unbind(1)
    v = layer.v(x)[0].unflatten(-1, (2, 4))
    kept = keep[0].nonzero()[:, 0].tolist()
    truth = torch.zeros_like(v)
    for h in range(2):
        gate = core.gating_param[h].sigmoid()
        for i in range(14):
            content = (k[kept, h] @ q[i, h] / 2).softmax(dim=0)
            truth[i, h] = content @ v[kept, h]
            if i < 2:
                continue
            shifts = [(j % 4 - (i - 2) % 4, j // 4 - (i - 2) // 4) for j in (j - 2 for j in kept if j >= 2)]
            far = torch.tensor([(a, b, a * a + b * b) for a, b in shifts], dtype=torch.float64)
            local = (far @ core.pos_proj.weight[h] + core.pos_proj.bias[h]).softmax(dim=0)
            truth[i, h] = (1 - gate) * truth[i, h] + gate * local @ v[[j for j in kept if j >= 2], h]
    out = layer(x, grid, keep=keep if dropping else None)
    close(out[keep], layer.proj(truth.flatten(1))[None][keep])


def test_distance_takes_no_pairs_of_tokens():
    """The half by distance, of 64 x 64 tokens, in which all pairs would be 2^24 numbers a head."""
    core, grid = create_attention("gpsa", 8, 2).core, Grid(64, 64)
    v = torch.randn(1, grid.tokens, 2, 4)
    for keep in (None, torch.rand(1, grid.tokens) < 0.5):
        with Elements() as elements, torch.no_grad():
            core.nearby(v, grid, keep)
        assert elements.largest <= 2 * grid.tokens * 64


def test_heads_beyond_a_square_look_at_the_query():
    weight = create_attention("gpsa", 12, 6).core.pos_proj.weight
    assert weight[4:].tolist() == [[0.0, 0.0, -1.0]] * 2 and math.isqrt(6) == 2
