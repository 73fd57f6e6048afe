"""Backbones for dense tasks: the maps of a classifier, each with a norm where it was published so."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight.models import Variant
from linsight.models.registry import build

SIZE = (70, 45)


def backbone(kind, **more):
    """One that a row of data describes."""
    small = {"embed_dim": 8, "num_heads": (1, 2, 2, 2), **more}
    return build(Variant("toy_dense", "swin_tiny", "inline", dense=kind), **small).eval()


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_maps_are_those_of_the_classifier(kind):
    dense = backbone(kind)
    model = linsight.create_model("swin_tiny", attention="inline", embed_dim=8, num_heads=(1, 2, 2, 2)).eval()
    report = linsight.load_published(dense, linsight.export_published(model), head=False)
    assert set(report.kept) == {key for key in dense.state_dict() if key.startswith("norm")}
    x = torch.randn(1, 3, *SIZE)
    maps, wanted = dense(x), model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[1] for m in maps] == dense.feature_info.channels() == [8, 16, 32, 64]
    for i, (ours, theirs) in enumerate(zip(maps, wanted, strict=True)):
        norm = getattr(dense, f"norm{i}", None)
        if norm is not None:
            torch.nn.init.normal_(norm.weight)
            ours = dense(x)[i]
            theirs = F.layer_norm(theirs.permute(0, 2, 3, 1), theirs.shape[1:2], norm.weight).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, theirs)


def test_published_keys_go_both_ways():
    dense = backbone("normed")
    state = linsight.export_published(dense)
    assert "norm2.weight" in state and "patch_embed.proj.weight" in state and "head.weight" not in state
    other = backbone("normed")
    linsight.load_published(other, state)
    assert all(torch.equal(tensor, dense.state_dict()[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_some_stages(kind):
    """Asked for in timm's words."""
    some, dense = backbone(kind, features_only=True, out_indices=(0, 2)), backbone(kind)
    linsight.load_published(some, linsight.export_published(dense))
    x = torch.randn(1, 3, *SIZE)
    assert some.feature_info.channels() == [8, 32] and len(some.model.layers) == 3
    for ours, theirs in zip(some(x), dense(x)[::2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_training_asks_of_it():
    dense = build(Variant("toy_dense", "swin_tiny", "inline:1/softmax", dense="normed"), embed_dim=24)
    inner = dense.model
    dense.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in inner.layers)
    kept = dense.no_weight_decay() & {name for name, _ in dense.named_parameters()}
    assert any(name.endswith("relative_position_bias_table") for name in kept)
    dense.set_input_size(img_size=(96, 160))
    assert inner.patch_embed.grid_size == (24, 40)
