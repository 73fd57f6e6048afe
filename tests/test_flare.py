"""FLARE against its two softmaxes, with a scale of 1 and latents that are not transposed; masks; its mistakes."""

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_two_softmaxes(norm, dropping):
    core, grid = create_core("flare", 8, 2, latents=3, norm=norm).double(), Grid(2, 4, 1)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    kept = torch.arange(grid.tokens) % 3 != 1 if dropping else torch.ones(grid.tokens, dtype=torch.bool)
    tokens = random_tokens(core, 1, grid, dim=8, keep=kept[None] if dropping else None)
    out, flat = core(tokens, Layout(grid)), core.latent_q.flatten()
    for h in range(2):
        latents = torch.stack([flat[(h * 3 + m) * 4 : (h * 3 + m + 1) * 4] for m in range(3)])
        q, k, v = (x[0, kept, h] for x in tokens[:3])
        if norm != "none":
            latents, q, k = core.q_norm(latents), core.k_norm(q), core.k_norm(k)
        gathered = (latents @ k.T).softmax(-1) @ v
        close(out[0, kept, h], (q @ latents.T).softmax(-1) @ gathered)


def test_keys_are_the_queries():
    layer = create_attention("flare", 16, 2, latents=4)
    tokens = layer.tokens(x := torch.randn(1, 6, 16), x, Layout(Grid(2, 3)), None)
    assert torch.equal(tokens.q, tokens.k)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items() if "weight" not in key}
    assert shapes["core.latent_q"] == (16, 4)
    linear = create_attention("flare", 16, 2, latents=4, depth=-1)
    assert {"k_proj.fc.weight", "v_proj.fc.weight"} < linear.state_dict().keys()


def test_mistakes_are_told():
    for mistake in ({"latents": 0}, {"depth": -2}, {"projections": "qkv"}):
        with pytest.raises(LinsightError, match=next(iter(mistake))):
            create_attention("flare", 16, 2, **mistake)
