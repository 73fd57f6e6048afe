"""EcoFormer against its sums over pairs, the gradient that passes its signs, its hash, its keys, its mistakes."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core
from linsight.attention.mechanisms.ecoformer import supervised_bits
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


def centred(core, x, h):
    """kappa of the tokens `x` `(N, D)` of head h."""
    x, anchors = x / x.norm(dim=-1, keepdim=True), core.anchor[0, h]
    distances = (x[:, None] - anchors).square().sum(-1)
    return torch.exp(-distances / (2 * distances.mean())) - core.mvec[0, h]


def hashed(core, x, h):
    """What the bits of the tokens `x` `(N, D)` of head h are signs of."""
    return centred(core, x, h) @ core.A[h].T


@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_pairs(dropping):
    core, grid = create_core("ecoformer", 8, 2, bits=5, anchors=7).double(), Grid(3, 4, 1)
    kept = torch.arange(grid.tokens) % 3 != 1 if dropping else torch.ones(grid.tokens, dtype=torch.bool)
    tokens = random_tokens(core, 2, grid, dim=8, keep=kept.expand(2, -1) if dropping else None)
    tokens = tokens._replace(k=tokens.q)
    out = core(tokens, Layout(grid))
    for image in range(2):
        for h in range(2):
            q, v = tokens.q[image, kept, h], tokens.v[image, kept, h]
            y = hashed(core, q, h).sign()
            assert 0.1 < (y > 0).double().mean() < 0.9
            products = y @ y.T
            close(out[image, kept, h], (products @ v + 6 * v) / (products.sum(-1, keepdim=True) + 6 * len(q)))


def test_gradients_pass_signs_between_one_and_minus_one():
    core = create_core("ecoformer", 4, 1, bits=3, anchors=5).double()
    x = torch.randn(1, 40, 1, 4, dtype=F64, requires_grad=True)
    y = core.features("q", x, None, (torch.ones(1, 1, 1, 1, dtype=F64),)).x
    distances = core.distances(x)[0, :, 0]
    sums = (torch.exp(-distances / 2) - core.mvec[0, 0]) @ core.A[0].T
    assert torch.equal(y[0, :, 0], sums.sign())
    inside = sums.abs() < 1
    assert inside.any() and not inside.all()
    (ours,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (truth,) = torch.autograd.grad(sums[inside].sum(), x)
    close(ours, truth)


def test_hash_is_drawn():
    core = create_core("ecoformer", 16, 2)
    before = {name: buffer.clone() for name, buffer in core.named_buffers()}
    core.redraw()
    assert not torch.equal(core.A, before["A"]) and not torch.equal(core.anchor, before["anchor"])
    close(core.anchor.norm(dim=-1), torch.ones(1, 2, 25), 1e-6)
    assert not list(core.parameters())


def test_fitted_hash_tells_near_from_far():
    grid = Grid(8, 8)
    core = create_core("ecoformer", 16, 2)
    tokens = random_tokens(core, 2, grid, dim=16)
    # tokens about a few directions, as those of images are
    centres = torch.randn(6, 2, 8, dtype=tokens.q.dtype)
    q = centres[torch.arange(64) % 6] + 0.3 * tokens.q[:1]
    keep = torch.arange(64).expand(2, -1) >= torch.tensor([[64], [4]])
    tokens = tokens._replace(q=q.expand(2, -1, -1, -1), keep=keep)

    def apart():
        """How many more bits of a token are those of its nearest tokens than are those of its farthest."""
        found = []
        for h in range(2):
            x = q[0, 4:, h]
            y = hashed(core, x, h).sign()
            cosines = (x / x.norm(dim=-1, keepdim=True)) @ (x / x.norm(dim=-1, keepdim=True)).T
            order, products = cosines.argsort(dim=1, descending=True), y @ y.T
            found.append((products.gather(1, order[:, 1:10]) - products.gather(1, order[:, -9:])).mean() / 16)
        return torch.stack(found)

    core = core.to(q.dtype)
    random = apart()
    core.fit(tokens)
    assert (apart() > 1.2).all() and (random < apart() - 0.2).all()
    # the anchors are tokens that are kept, and mu is the mean over those
    x = torch.nn.functional.normalize(q[0], dim=-1).transpose(0, 1)
    assert torch.cdist(core.anchor[0], x[:, 4:]).amin(dim=-1).max() < 1e-6
    close(hashed(core, q[0, 4:, 0], 0).mean(0), torch.zeros(16, dtype=q.dtype), 1e-5)
    # bits differ, and their rows are those of the centred kernel
    y = hashed(core, q[0, 4:, 0], 0).sign()
    alike = (y.T @ y / len(y)).abs() - torch.eye(16, dtype=q.dtype)
    assert alike.mean() < 0.5
    kappa = torch.stack([centred(core, q[0, 4:, h], h) for h in range(2)])
    close(core.A.abs(), supervised_bits(kappa, x[:, 4:], 16).abs(), 1e-6)
    before = core.A.clone()
    core.fit(tokens._replace(keep=torch.zeros(2, 64, dtype=torch.bool)))
    assert torch.equal(core.A, before)  # no token, no fit


def test_hash_is_fitted_to_fewer_tokens_than_it_has_anchors():
    core = create_core("ecoformer", 8, 2)
    for count in (1, 2, 7):
        core.fit(random_tokens(core, 1, Grid(1, count), dim=8))
        assert all(buffer.isfinite().all() for buffer in core.buffers())


def test_published_keys():
    layer = create_attention("ecoformer", 64, 4)
    shapes = {key: tuple(tensor.shape) for key, tensor in linsight.export_published(layer).items()}
    linear = {f"{name}.{part}" for name in ("to_qk", "to_v", "proj") for part in ("weight", "bias")}
    assert set(shapes) - linear == {f"fast_attention.{name}" for name in (
        "projection_matrix", "ksh.A", "ksh.mvec", "ksh.anchor"
    )}  # fmt: skip
    assert shapes["fast_attention.projection_matrix"] == (44, 16)
    assert shapes["fast_attention.ksh.mvec"] == (1, 4, 1, 25)


def test_keys_are_queries():
    layer = create_attention("ecoformer", 16, 2)
    tokens = layer.tokens(x := torch.randn(1, 6, 16), x, Layout(Grid(2, 3)), None)
    assert isinstance(tokens, Tokens) and torch.equal(tokens.q, tokens.k)


def test_mistakes_are_told():
    for mistake in ({"bits": 0}, {"anchors": 0}):
        with pytest.raises(LinsightError, match=next(iter(mistake))):
            create_attention("ecoformer", 16, 2, **mistake)
