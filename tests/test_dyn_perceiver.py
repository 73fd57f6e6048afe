"""Dynamic Perceiver: exits that compute what they need and no more, states to go on from, sizes as published."""

import copy
import json
import math
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

import linsight
from golden import cases
from golden.builders.dyn_perceiver import model as from_golden
from linsight import catalogue
from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver, ExitLogits, Latents, Network
from linsight.models.hosts.dyn_perceiver.cnn import cut
from linsight.tasks.exits import leaving

CASES = [name for name in cases.names(models=True) if name.startswith("dyn_perceiver/")]
MODELS = {name: entry for name, entry in ARCHITECTURES.items() if entry.model_cls is DynamicPerceiver}
PUBLISHED = {name: entry for name, entry in MODELS.items() if "params" in entry.published}


def tiny(network="resnet18", width=0.125, stem_stride=2, *, latents=None, num_classes=5, **args):
    """Statistics and zero scales are stirred, so that no branch is idle."""
    latents = latents or {}
    small = Latents(**{"tokens": 8, "depth_factor": (1 / 3, 1 / 3, 1 / 9, 1 / 3), "mlp_ratio": 1, "pool": 3, **latents})
    model = DynamicPerceiver(Network(network, width, stem_stride), small, num_classes=num_classes, **args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not module.weight.is_meta:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_all_exits_are_as_published(name):
    spec, recorded = cases.load(name)
    run = from_golden(spec)
    cases.load_filled(run, spec)
    with torch.no_grad():
        found = run.call()
    assert found.keys() == recorded.keys() and len(found) == 5
    for key, out in found.items():
        assert (out - recorded[key]).abs().max() <= cases.TOLERANCE * recorded[key].abs().max(), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name):
    params = sum(p.numel() for p in linsight.create_model(name, device="meta").parameters())
    assert params == pytest.approx(PUBLISHED[name].published["params"], abs=0.05e6 if params > 1e8 else 0.006e6)


@pytest.mark.parametrize("name", [name for name, entry in PUBLISHED.items() if "exit_top1" in entry.published])
def test_costs_of_exits_are_as_published(name):
    """The table is rounded, and the published counter, by hooks on modules, counts a little differently."""
    published = PUBLISHED[name].published
    costs = [cost / 1e9 for cost in linsight.create_model(name, device="meta").exit_costs()]
    known = published.get("exit_gmacs", (published["gmacs"],))
    assert costs[-len(known) :] == pytest.approx(known, rel=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_the_published_model(name):
    """The json has the operations of the published whole, of two images, and what its counter said at each exit."""
    spec = cases.load(name)[0]
    costs = linsight.create_model(cases.model_name(name), device="meta").exit_costs(spec["input_shape"][2:])
    assert 4 * costs[-1] == spec["matmul_conv_flops"]
    counted = spec["published_flop_counter_G_per_exit"]
    assert counted is None or [cost / 1e9 for cost in costs] == pytest.approx(counted, rel=6e-3)


def test_the_resnet_is_torchvisions():
    theirs, ours = resnet18(num_classes=1).eval(), cut("resnet18")
    parts = nn.ModuleDict({"stem": ours.stem, **{f"layer{i}": part for i, part in enumerate(ours.stages, 1)}}).eval()
    state = {k.replace("bn1.", "stem.1.", 1) if k.startswith("bn1") else k: v for k, v in theirs.state_dict().items()}
    state["stem.0.weight"] = state.pop("conv1.weight")
    parts.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    images = torch.randn(1, 3, 64, 48)
    x = images
    for part in parts.values():
        x = part(x)
    expected = images
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        expected = getattr(theirs, name)(expected)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("latents", [{}, {"isc": False}])
@torch.no_grad()
def test_stages_are_the_whole_and_states_can_be_split(latents):
    model, images = tiny(latents=latents), torch.randn(6, 3, 32, 24)
    whole = [found.logits for found in model.exits(images)]
    torch.testing.assert_close(model(images), whole[-1])
    which = torch.tensor([True, False, True, True, False, True])
    found = model.start(images)
    for number in (2, 3, 4):
        assert len(found.state) == len(which) and len(found.state[which]) == 4
        found = model.resume(found.state[which])
        which = torch.ones(4, dtype=torch.bool)
        assert found.number == number
        torch.testing.assert_close(found.logits, whole[number - 1][[0, 2, 3, 5]])
    jump = model.resume(model.start(images, to=2).state[1:3], to=4)
    torch.testing.assert_close(jump.logits, whole[3][1:3])
    torch.testing.assert_close(model.start(images, to=3).logits, whole[2])


def test_an_exit_computes_nothing_of_later_ones():
    model, called = tiny(), []
    for name, module in model.named_modules():
        if name and name.count(".") <= 1:
            module.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    new = [
        {"stem", "exchanges.0", "stages.0", "exchanges.1", "stages.1", "exchanges.2", "head_early"},
        {"stages.2", "exchanges.3", "feedback_att", "head_att"},
        {"stages.3", "head_cnn"},
        {"last_write", "feedback_merge", "head_merge"},
    ]
    tops = set().union(*new)
    for found, expected in zip(model.exits(torch.randn(2, 3, 32, 32)), new, strict=True):
        assert tops.intersection(called) == expected, found.number
        called.clear()
    model.start(torch.randn(2, 3, 32, 32), to=4)
    assert tops.intersection(called) == tops - {"head_cnn"}  # the only one that no other needs


def test_costs_are_those_of_what_runs():
    model = tiny()
    costs = model.exit_costs(32)
    assert sorted(costs) == list(costs) and len(set(costs)) == 4
    without = model.exit_costs(32, numbers=(1, 2, 4))
    assert without[:2] == costs[:2] and costs[3] - without[2] == model.widths[-1] * 5  # the classifier of exit 3
    assert model.exit_costs((64, 32)) > costs
    assert not model.training and next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("thresholds", [None, (math.inf, 0.25, math.inf), (0.25, 0.0, 1.0), (2, 2, 2)])
@torch.no_grad()
def test_images_leave_when_an_exit_is_sure(thresholds):
    model, images = tiny(), torch.randn(24, 3, 16, 16)
    logits = torch.stack([found.logits for found in model.exits(images)], 1)
    confidences = logits.softmax(2).amax(2)
    typical = thresholds is None
    thresholds = confidences[:, :3].median(0).values.tolist() if typical else thresholds
    expected = leaving(confidences, thresholds)
    found = model.predict(images, thresholds)
    assert torch.equal(found.exits, expected + 1)
    torch.testing.assert_close(found.logits, logits[torch.arange(24), expected])
    assert not typical or set(expected.tolist()) == {0, 1, 2, 3}, "the case is idle"


@torch.no_grad()
def test_images_that_are_done_are_not_computed_on():
    model, sizes = tiny(), []
    model.stages[2].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    images = torch.randn(8, 3, 16, 16)
    sure = model.start(images).logits.softmax(1).amax(1).sort().values
    model.predict(images, (sure[4].item(), 0.0, 0.0))
    model.predict(images, (0.0, 0.0, 0.0))
    assert sizes == [4]


def test_no_number_is_no_image_left_behind():
    images = torch.randn(3, 3, 16, 16)
    images[1] = math.nan
    found = tiny().predict(images, (2, 2, 2))
    assert found.logits[1].isnan().all() and found.logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("network", "width", "size"),
    [("resnet50", 0.125, (33, 47)), ("mobilenet_v3_large", 0.25, (64, 40)), ("regnet_y_400mf", 1.0, (40, 64))],
)
def test_any_size_of_images_channels_and_classes(network, width, size):
    model = tiny(network, width, None, in_chans=2, num_classes=3)
    assert [tuple(found.logits.shape) for found in model.exits(torch.randn(2, 2, *size))] == [(2, 3)] * 4
    assert model(torch.randn(1, 2, 1, 7)).isfinite().all()
    outputs = model.train()(torch.randn(2, 2, 64, 64))
    assert isinstance(outputs, ExitLogits) and {tuple(y.shape) for y in outputs} == {(2, 3)}


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v3_large"])
def test_stems_for_small_images(network, stem_stride):
    parts = cut(network, 0.25, stem_stride)
    assert parts.stem(torch.randn(1, 3, 32, 32)).shape[2:] == (32 // stem_stride, 32 // stem_stride)
    assert cut("regnet_y_400mf", stem_stride=1).stem(torch.randn(1, 3, 32, 32)).shape[2:] == (32, 32)


@pytest.mark.parametrize("flag", ["isc", "last_z2x", "dwc", "x2z", "z2x"])
def test_parts_can_be_left_out(flag):
    whole, part = tiny(), tiny(latents={flag: False})
    gone = {key.rpartition(".")[0] for key in whole.state_dict().keys() - part.state_dict().keys()}
    named = {
        "isc": {"feedback_att.0", "feedback_merge.1"},
        "last_z2x": {"last_write.attn.q"},
        "dwc": {f"exchanges.{i}.dwc" for i in range(4)},
        "x2z": {f"exchanges.{i}.read.attn.q" for i in (1, 2, 3)},  # the first one stays
        "z2x": {f"exchanges.{i}.write.attn.q" for i in (1, 2, 3)},
    }
    assert named[flag] <= gone and "exchanges.0.read.attn.q" not in gone
    images = torch.randn(2, 3, 16, 16)
    part(images).sum().backward()
    assert part.exit_costs(32)[-1] < whole.exit_costs(32)[-1]


def test_the_loss_is_that_of_the_paper():
    outputs = ExitLogits(*torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True))
    targets = torch.randint(5, (6,))
    early, att, cnn, merge = (F.cross_entropy(y, targets) for y in outputs)
    teacher = outputs.merge.softmax(1)
    kl = sum((teacher * (teacher.log() - y.log_softmax(1))).sum(1).mean() for y in outputs[:3])
    loss = tiny().training_loss(outputs, targets, F.cross_entropy)
    torch.testing.assert_close(loss, cnn + merge + 0.5 * (att + early) + 0.5 * kl)
    grads = torch.autograd.grad(loss, outputs.merge)[0], torch.autograd.grad(merge, outputs.merge)[0]
    torch.testing.assert_close(*grads)  # nothing is learnt from the pupils


@pytest.mark.parametrize("batch", [1, 3])
def test_training_reaches_every_parameter(batch):
    """Of one image too, which the published batch norms of the exits refuse."""
    model, images = tiny(drop_path_rate=0.1).train(), torch.randn(batch, 3, 64, 64)
    targets = torch.randint(5, (batch,))
    grads = {}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        model.training_loss(model(images), targets, F.cross_entropy).backward()
        grads[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads[False].values())
    torch.testing.assert_close(grads[False], grads[True])


def test_stochastic_depth_changes_no_weight_and_no_evaluation():
    plain, dropped = tiny(), tiny(drop_path_rate=0.9)
    dropped.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(plain(images), dropped(images))
    norms = [module for module in dropped.modules() if hasattr(module, "rate")]
    assert [norm.rate for norm in norms] == pytest.approx([0.9 * i / 7 for i in range(8)])
    x = torch.randn(64, norms[-1].num_features, 2, 2)
    idle = (norms[-1].train()(x) == 0).flatten(1).all(1).float().mean()
    assert 0.75 < idle < 1.0


def test_dtype_device_copies_and_pickles():
    model = tiny(dtype=torch.float64)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    out = model(images)
    assert out.dtype == torch.float64
    torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(model)))(images), out)
    assert all(p.is_meta for p in tiny(device="meta").parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny().predict(images.float(), (0.3, 0.3, 0.3))
    assert found.logits.isfinite().all()


def test_classifiers_can_be_replaced():
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    model.reset_classifier(7)
    assert {y.shape[1] for y in model.train()(images)} == {7} and len(model.get_classifier()) == 4
    model.reset_classifier(0)
    assert model.eval()(images).shape == (2, model.num_features)
    assert [found.logits.shape[1] for found in model.exits(images)] == [16, 32, 64, 96]


def test_weights_with_other_classes():
    source = linsight.create_model("dynp_resnet18_025_t32_cifar", num_classes=10)
    target = linsight.create_model("dynp_resnet18_025_t32_cifar", num_classes=4)
    report = linsight.load_published(target, linsight.export_published(source), head=False)
    assert {key.partition(".")[0] for key in report.kept} == {
        *(f"head_{name}" for name in ("early", "att", "cnn", "merge")),
        "feedback_att",
        "feedback_merge",
    }
    assert torch.equal(target.latent, source.latent)


def test_timm_can_group_parameters():
    model = tiny()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert {"latent", "exchanges.3.read.attn.key_embed"} <= model.no_weight_decay()
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [model.stem[0], model.exchanges[0].read.attn.q, model.stages[0][0].conv1, model.exchanges[1].read.attn.q]
    scales = [scale[id(module.weight)] for module in (*order, model.stages[3][0].conv1, model.head_merge[1])]
    assert scales == sorted(scales) and len(set(scales)) == 6


@pytest.mark.full
def test_it_exports_whole():
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported.module()(more), model(more))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: tiny("resnet19"), "did you mean 'resnet18'"),
        (lambda: tiny(stem_stride=3), "one of 1, 2, 4"),
        (lambda: tiny().resume(tiny().start(torch.randn(1, 3, 16, 16), to=4).state), "4 in all"),
        (lambda: tiny().resume(tiny().start(torch.randn(1, 3, 16, 16), to=2).state, to=1), "not ahead of exit 2"),
        (lambda: tiny().predict(torch.randn(1, 3, 16, 16), (0.5, 0.5)), "3 exits before the last"),
        (lambda: linsight.create_model("dynp_reg400m_t32", attention="inline"), "takes no attention mechanism"),
        (lambda: timm.create_model("dynp_reg400m_t32", attention="inline"), "takes no attention mechanism"),
        (lambda: timm.create_model("dynp_reg400m_t32", features_only=True), "no features_only"),
        (lambda: linsight.create_model("dynp_reg400m_t33"), "did you mean 'dynp_reg400m_t32'"),
        (lambda: linsight.create_model("dynp_reg400m_t32", pretrained=True), "no address of weights is known"),
    ],
)
def test_errors_offer_a_way_out(call, line):
    with pytest.raises(LinsightError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_models_are_known_to_timm_and_told_of():
    assert set(timm.list_models("dynp_*")) == set(MODELS)
    row = json.loads(json.dumps(catalogue.info("dynp_resnet18_025_t32_cifar")))
    assert row["image_size"] == "32x32" and row["exit_gmacs"][-1] == pytest.approx(row["gmacs"], rel=0.02)
