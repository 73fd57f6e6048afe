"""Starting from softmax models of timm by name. timm's own loader runs; a stand-in gives it what the Hub would."""

import pytest
import timm
import torch
from timm.models import _builder
from timm.models._registry import get_pretrained_cfg

from linsight.errors import CheckpointError, LinsightError
from linsight.tasks import task_of
from linsight.train import resolve, train
from linsight.train.loop import Trainer
from linsight.train.progress import Silent
from linsight.train.run import Run

DEIT = "timm/deit_tiny_patch16_224.fb_in1k"
QUICK = {"device": "cpu", "amp": "off", "workers": 0, "figures": False, "report": False, "data": "digits"}


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def hub(monkeypatch):
    """The weights that the Hub has, by the id of a repository."""
    there = {}
    for name in ("deit_tiny_patch16_224.fb_in1k", "pvt_v2_b0.in1k"):
        torch.manual_seed(len(there))
        there[f"timm/{name}"] = timm.create_model(name).state_dict()

    def load(hub_id, *args, **kwargs):
        if hub_id not in there:
            raise OSError("no network")
        return dict(there[hub_id])

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", load)
    monkeypatch.setattr(_builder, "has_hf_hub", lambda necessary=False: True)
    return there


def started(out, **overrides):
    """The learner of a run before its first step, and what it said."""
    notes = Notes()
    recipe = resolve("finetune", {**QUICK, "init": DEIT, **overrides})
    task = task_of(recipe)
    return Trainer(Run.start(recipe, out, "run"), task, task.open(), notes).learner, "\n".join(notes.notes)


def test_a_softmax_model_of_timm_starts_another_mechanism_in_its_host(hub, tmp_path):
    deit = hub[DEIT]
    learner, notes = started(tmp_path / "run", model="inline_deit_tiny", in_chans=1)
    ours = learner.model.state_dict()
    filled = [name for name in ours if name in deit and not name.startswith(("head.", "patch_embed.proj.weight"))]
    assert len(filled) > 140 and all(torch.equal(ours[name], deit[name]) for name in filled)
    torch.testing.assert_close(ours["patch_embed.proj.weight"], deit["patch_embed.proj.weight"].sum(1, keepdim=True))
    new = {name for name in ours if ".attn.core.generator." in name} | {"head.weight", "head.bias"}
    assert set(learner.new) == new and len(new) == 50
    assert f"loaded {len(filled) + 1} tensors from {DEIT}" in notes
    assert "adapted: patch_embed.proj.weight" in notes and "new: " in notes


def test_the_name_tells_the_model_and_how_images_are_prepared(hub, tmp_path):
    recipe = resolve("finetune", {"init": DEIT})
    cfg = get_pretrained_cfg(DEIT.removeprefix("timm/"))
    assert recipe.model == DEIT.removeprefix("timm/")
    assert (recipe.mean, recipe.std, recipe.crop_pct, recipe.eval_crop) == (cfg.mean, cfg.std, 0.9, "center")
    assert resolve("finetune", {"init": DEIT, "model": "vit_tiny"}).model == "vit_tiny"
    learner, notes = started(tmp_path / "run", attention="linear", num_classes=1000)
    assert torch.equal(learner.model.head.weight, hub[DEIT]["head.weight"])
    assert "deit_tiny_patch16_224.fb_in1k (linear)" in notes
    probe, _ = started(tmp_path / "probe", attention="linear", num_classes=1000, freeze=True)
    assert probe.new == ["head.bias", "head.weight"] and not probe.model.blocks[0].attn.qkv.weight.requires_grad


def test_so_does_one_of_another_host(hub, tmp_path):
    source = "timm/pvt_v2_b0.in1k"
    learner, _ = started(tmp_path / "run", init=source, model="focused_pvt_v2_b0", img_size=32)
    ours, theirs = learner.model.state_dict(), hub[source]
    assert torch.equal(ours["stages.3.blocks.1.attn.kv.weight"], theirs["stages.3.blocks.1.attn.kv.weight"])
    assert set(learner.new) == ours.keys() - theirs.keys() | {"head.weight", "head.bias"}
    assert all(".attn.core." in name for name in ours.keys() - theirs.keys())


def test_other_sizes_resample_the_position_table(hub, tmp_path):
    learner, notes = started(tmp_path / "run", model="inline_deit_tiny", img_size=(64, 96))
    assert learner.model.pos_embed.shape == (1, 25, 192) and "resized: pos_embed from 14x14 to 4x6" in notes


def test_what_is_no_start_is_refused_in_a_line_before_there_is_a_folder(hub, tmp_path, monkeypatch):
    small = {"model_args": "depth=2"}
    for given, error, message in (
        ({"init": "timm/resnet81"}, LinsightError, r"unknown model of timm 'resnet81': did you mean 'resnet18'"),
        ({"init": "timm/deit_tiny_patch16_224.none"}, LinsightError, "Invalid pretrained tag"),
        ({"init": "timm/vit_tiny_patch16_224"}, LinsightError, "could not be fetched from .*: no network"),
        ({"init": "timm/resnet18"}, LinsightError, "'resnet18' is a model of timm without a linsight host"),
        ({"model": "inline_swin_tiny"}, CheckpointError, "fits? the model|of another host"),
        ({"model": "inline_deit_tiny", **small}, CheckpointError, "of another host: 120 tensors .* as blocks.2.norm1"),
    ):
        with pytest.raises(error, match=message) as caught:
            train(resolve("finetune", {**QUICK, "init": DEIT, **given}), out=tmp_path / "run")
        assert not (tmp_path / "run").exists() and len(str(caught.value).splitlines()) < 20
    learner, _ = started(tmp_path / "partly", model="inline_deit_tiny", init_partial=True, **small)
    assert torch.equal(learner.model.blocks[1].mlp.fc1.weight, hub[DEIT]["blocks.1.mlp.fc1.weight"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm" / "mine").mkdir(parents=True)  # a folder here goes before a name
    with pytest.raises(CheckpointError, match=r"best\.safetensors"):
        train(resolve("finetune", {**QUICK, "init": "timm/mine"}), out=tmp_path / "run")
