"""Rates that decay with depth, and first layers that are kept as they are."""

import pytest
import torch
from safetensors.torch import save_file
from small import TINY
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import linsight
from linsight.errors import LinsightError
from linsight.tasks import task_of
from linsight.train import load_trained, resolve, train
from linsight.train.freezing import freeze, layer_groups
from linsight.train.learner import Learner

CPU = torch.device("cpu")
# A host with batch norms in its stem and between its stages.
COMPACT = {"model": "compact_pico", "attention": "linear", "model_args": "stem=((8,1),),stages=((16,1,2),(16,2,2))"}


def learner(new=None, **given):
    task = task_of(resolve("digits", {**TINY, **given}), {"classes": tuple("0123456789")})
    torch.manual_seed(0)
    return Learner(task, task.build(), CPU, None, updates=5, new=new)


def rates(optimiser, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimiser.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("given", [{}, COMPACT], ids=["vit", "compact"])
def test_rates_decay_with_depth_as_in_timm(given):
    ours = learner(**given, layer_decay=0.6, sched="none", lr=0.1)
    model = ours.task.build()
    theirs = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.6)
    found = rates(ours.optimiser, ours.model)
    assert found == rates(theirs, model)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(groups.values())
    assert last > 2 and found.keys() == groups.keys()
    for name, (scale, _) in found.items():
        assert scale == pytest.approx(0.6 ** (last - groups[name])), name
    for group in ours.optimiser.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
    assert ours.lr == pytest.approx(0.1)


def test_no_decay_is_none_and_an_optimiser_s_own_goes_before():
    for off in (0, 1):
        one = learner(layer_decay=off)
        assert {scale for scale, _ in rates(one.optimiser, one.model).values()} == {1}
    one = learner(layer_decay=0.5, opt_args="layer_decay=0.9")
    assert min(scale for scale, _ in rates(one.optimiser, one.model).values()) == pytest.approx(0.9**3)
    with pytest.raises(LinsightError, match="layer_decay"):
        resolve("digits", {"layer_decay": 1.5})
    tuned = resolve("finetune", {"opt_args": "betas=(0.9,0.95)"})
    assert tuned.layer_decay == 0.75 and tuned.opt_args == {"betas": (0.9, 0.95)}


HEAD = ("head.weight", "head.bias")


def test_the_first_layers_are_those_of_timm_s_numbers():
    for count, kept in ((1, ("patch_embed.", "pos_embed")), (2, ("patch_embed.", "pos_embed", "blocks.0."))):
        ours = learner(HEAD, freeze_layers=count, layer_decay=0.5)
        trained = {name: p.requires_grad for name, p in ours.model.named_parameters()}
        assert trained == {name: not name.startswith(kept) for name in trained}
        assert ours.kept == sum(p.numel() for p in ours.model.parameters() if not p.requires_grad) < ours.params
        assert rates(ours.optimiser, ours.model).keys() == {name for name in trained if trained[name]}
    ours = learner(("blocks.0.attn.core.generator.0.weight",), freeze_layers=2)  # what is new is trained anywhere
    trained = [name for name, p in ours.model.named_parameters() if p.requires_grad and name.startswith("blocks.0.")]
    assert trained == ["blocks.0.attn.core.generator.0.weight"]


def test_stages_are_frozen_with_the_statistics_of_their_norms(tmp_path):
    given = {**TINY, **COMPACT, "epochs": 1, "warmup_epochs": 0}
    torch.manual_seed(1)
    start = task_of(resolve("digits", given), {"classes": tuple("0123456789")}).build()
    for module in start.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    state = {name: value.clone() for name, value in start.state_dict().items()}
    save_file(state, tmp_path / "start.safetensors")
    given |= {"init": str(tmp_path / "start.safetensors"), "freeze_stages": 2}
    train(resolve("digits", given), out=tmp_path / "run")
    after = load_trained(tmp_path / "run").model.state_dict()
    groups = layer_groups(start, "compact_pico", stages=True)
    assert set(groups.values()) == {0, 1, 2, 3}
    still = {name.rpartition(".")[0] for name, group in groups.items() if group < 2}
    assert any(f"{name}.running_mean" in state for name in still)
    for name, value in after.items():
        kept = name.rpartition(".")[0] in still or groups.get(name, 9) < 2
        assert torch.equal(value, state[name]) == kept, name


def test_layers_are_frozen_in_every_host():
    """With and without stages: the first group goes, the classifier stays."""
    for name in ("vit_tiny", "pvt_tiny", "pvt_v2_b0", "swin_tiny", "compact_nano", "mlla_tiny", "agent_cswin_tiny"):
        for field in ("freeze_layers", "freeze_stages"):
            model = linsight.create_model(name, device="meta")
            freeze(model, resolve("digits", {"model": name, field: 1}), ())
            trained = {name: p.requires_grad for name, p in model.named_parameters()}
            groups = layer_groups(model, name, stages=field == "freeze_stages")
            assert trained == {name: group > 0 for name, group in groups.items()}
            assert trained[list(trained)[-1]]


@pytest.mark.parametrize(
    ("new", "given", "message"),
    [
        (None, {"freeze_layers": 1}, "freeze_layers keeps what init fills as it is: give it weights, init="),
        (
            HEAD,
            {"freeze_layers": 4},
            "freeze_layers=4 leaves nothing to train: 'vit_tiny' has 3 groups before its last",
        ),
        (HEAD, {"freeze_stages": 9}, "freeze_stages=9 leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_told(new, given, message):
    with pytest.raises(LinsightError, match=message):
        learner(new, **given)
