"""Wrappers of training scripts, and prefixes of wrapped modules."""

import pytest
import torch

import linsight
from linsight.checkpoints.unwrap import EMA, PLAIN, PREFIXES, unwrap
from linsight.errors import CheckpointError

TRAINED, AVERAGED = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}


def test_bare_state_dict():
    found = unwrap(TRAINED, "file", ema=None)
    assert found.tensors == TRAINED and found.wrapper == "" and found.others == ()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("average", EMA)
def test_every_wrapper(name, average):
    content = {"epoch": 3, average: AVERAGED, name: TRAINED, "optimizer": {"state": {}}}
    for ema, prefer, wanted, wrapper in [
        (None, False, TRAINED, name),
        (None, True, AVERAGED, average),
        (False, True, TRAINED, name),
        (True, False, AVERAGED, average),
    ]:
        found = unwrap(content, "file", ema=ema, prefer_ema=prefer)
        assert found.tensors["a.weight"] is wanted["a.weight"] and found.wrapper == wrapper


def test_only_one_kind():
    assert unwrap({"state_dict_ema": AVERAGED}, "file", ema=None).wrapper == "state_dict_ema"
    assert unwrap({"model": TRAINED}, "file", ema=None, prefer_ema=True).wrapper == "model"
    with pytest.raises(CheckpointError, match=r"no trained weights: pass ema=True"):
        unwrap({"state_dict_ema": AVERAGED}, "file", ema=False)
    with pytest.raises(CheckpointError, match=r"no averaged \(EMA\) weights: pass ema=False"):
        unwrap({"model": TRAINED}, "file", ema=True)


def test_nested():
    assert unwrap({"model": {"state_dict": TRAINED}}, "file", ema=None).wrapper == "model.state_dict"
    both = {"state_dict": {"model": TRAINED, "ema": {"module": AVERAGED, "decay": 0.999}}}
    assert unwrap(both, "file", ema=None).wrapper == "state_dict.model"
    assert unwrap(both, "file", ema=True).wrapper == "state_dict.ema.module"


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "_orig_mod.module.", "module.model.backbone."])
def test_shared_prefixes_go(prefix):
    state = {prefix + key: torch.zeros(1) for key in ("a.weight", "b")}
    assert list(unwrap({"model": state}, "file", ema=None).tensors) == ["a.weight", "b"]


def test_other_prefixes_stay():
    state = {"encoder.a": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert list(unwrap(state, "file", ema=None).tensors) == list(state)


def test_what_is_no_tensor_is_named():
    assert unwrap({**TRAINED, "version": 3}, "file", ema=None).others == ("version",)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"teacher": TRAINED, "epoch": 1}, {"state_dict": {"a": 1}}])
def test_no_weights(content):
    with pytest.raises(CheckpointError, match=r"^file holds no weights .* its entries are: "):
        unwrap(content, "file", ema=None)


def test_a_variant_says_which_weights_count(monkeypatch):
    """An entry of the variant's published data, no code."""
    from linsight.models import VARIANTS

    layer = linsight.create_model("inline_deit_tiny", depth=1, num_classes=2)
    state = linsight.export_published(layer)
    content = {"model": state, "state_dict_ema": {key: value + 1 for key, value in state.items()}}
    assert linsight.load_published(layer, content).wrapper == "model"
    variant = VARIANTS["inline_deit_tiny"]
    monkeypatch.setitem(variant.published, "ema", True)
    assert linsight.load_published(layer, content).wrapper == "state_dict_ema"
    assert torch.equal(layer.norm.bias, state["norm.bias"] + 1)
