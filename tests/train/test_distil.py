"""Learning from another model: the losses beside formulas, whole runs, and teachers that are none."""

import json
import shutil

import pytest
import timm
import torch
from small import TINY, assert_same_end, colours
from timm.models import _builder, save_for_hf
from torch import nn
from torch.nn import functional as F

from linsight.data.images import Batch, Normalise, Samples, eval_transform
from linsight.errors import LinsightError
from linsight.export import save_for_hub
from linsight.runtime.signals import Interrupted
from linsight.tasks import list_tasks, task_of
from linsight.tasks.distil import apart, hard, soft
from linsight.tasks.teacher import Seeing, see
from linsight.train import evaluate, load_run, load_trained, open_data, predict, resolve, resume, train
from linsight.train.learner import Learner
from linsight.train.progress import Silent
from linsight.train.teachers import load_teacher

CPU = torch.device("cpu")
DIGITS = tuple("0123456789")
VIT = "patch_size={},embed_dim={},depth=1,num_heads=2,global_pool=avg,class_token=False"
QUICK = {**TINY, "batch_size": 256, "lr": "1e-2", "warmup_epochs": 0, "threads": 1}
DISTIL = {**QUICK, "task": "distil", "model_args": VIT.format(2, 16), "epochs": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run on digits of another width, size of images and scale of them."""
    given = {**QUICK, "model_args": VIT.format(4, 24), "img_size": 12, "mean": 0.25, "std": 0.5, "epochs": 6}
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(resolve("digits", {**given, "batch_size": 64}), out=out)
    return out


def learner(teacher, classes=DIGITS, **given):
    recipe = resolve("digits", {**DISTIL, "teacher": str(teacher), "smoothing": 0.1, **given})
    torch.manual_seed(0)
    task = task_of(recipe, {"classes": classes})
    return Learner(task, task.build(), CPU, None, updates=5)


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(10, (count,), generator=generator), [])


class Notes(Silent):
    """Keeps what a run says; like a lost connection at a step, where one is told."""

    def __init__(self, at=0):
        self.notes, self.left = [], at

    def note(self, text):
        self.notes.append(text)

    def step(self, *done):
        self.left -= 1
        if not self.left:
            raise Interrupted("stopped", 130)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_losses_beside_their_formulas():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 7, generator=generator, dtype=torch.float64).float() for _ in range(2))
    for temperature in (1.0, 3.0):
        p, q = (torch.exp(x / temperature) for x in (theirs, ours))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        expected = temperature**2 * sum(
            float(p[i, k] * torch.log(p[i, k] / q[i, k])) for i in range(5) for k in range(7)
        )
        assert float(soft(ours, theirs, temperature)) == pytest.approx(expected / 5, rel=1e-5)
    expected = sum(float(ours[i].exp().sum().log() - ours[i, int(theirs[i].argmax())]) for i in range(5)) / 5
    assert float(hard(ours, theirs)) == pytest.approx(expected, rel=1e-5)
    a, b = (
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt() for x in (ours, theirs)
    )
    assert float(apart(ours, theirs, "mse")) == pytest.approx(float(((a - b) ** 2).sum()) / 35, rel=1e-5)
    cosine = float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
    assert float(apart(ours, theirs, "cosine")) == pytest.approx(1 - cosine, rel=1e-5)
    assert float(apart(5 * ours + 3, ours, "mse")) < 1e-3  # neither scale nor offset counts
    assert float(soft(ours, ours + 1, 2.0)) == pytest.approx(0, abs=1e-6)


def test_maps_are_compared_on_the_grid_of_the_student():
    ours, theirs = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    doubled = theirs.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert float(apart(ours, theirs, "mse")) == pytest.approx(
        float(F.mse_loss(F.layer_norm(ours, (8,)), F.layer_norm(theirs, (8,)))), rel=1e-6
    )
    flat = torch.randn(2, 1, 1, 8)
    same = apart(ours, flat.expand(2, 4, 6, 8), "mse")
    torch.testing.assert_close(same, apart(ours, flat.expand(2, 2, 3, 8), "mse"))
    assert apart(ours, doubled, "mse").isfinite() and not torch.equal(apart(ours, doubled, "mse"), same)


def as_the_teacher_sees(images, run):
    """Images of the student on the teacher's scale, by way of the levels 0..255."""
    recipe = load_trained(run).recipe
    levels = (images * 0.3763 + 0.3053) * 255
    resized = F.interpolate(levels, (12, 12), mode="bilinear", antialias=True, align_corners=False)
    return (resized / 255 - recipe.mean[0]) / recipe.std[0]


@pytest.mark.parametrize("kind", ["soft", "hard", "features", "map"])
def test_the_loss_of_a_batch_is_the_share_of_each(teacher, kind):
    ours = learner(teacher, distil_kind=kind, distil_weight=0.3, distil_temperature=3.0)
    images, targets = ours.task.inputs(batch().images), batch().targets
    loss, count = ours.loss(batch(), 0)
    model, run = ours.model, load_trained(teacher).model
    labels = F.cross_entropy(model(images), targets, label_smoothing=0.1)
    with torch.no_grad():
        told = as_the_teacher_sees(images, teacher)
        if kind in ("soft", "hard"):
            other = soft(model(images), run(told), 3.0) if kind == "soft" else hard(model(images), run(told))
        else:
            (project,) = (m for m in ours._run.modules() if isinstance(m, nn.Linear) and m.out_features == 24)
            pooled = kind == "features"
            one, two = (
                m.forward_head(m.forward_features(x), pre_logits=True) if pooled else m.forward_features(x)
                for m, x in ((model, images), (run, told))
            )
            if not pooled:
                one, two = one.unflatten(1, (4, 4)), two.unflatten(1, (3, 3))
            other = apart(project(one), two, "mse")
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * other)
    assert count == 6
    loss.backward()
    assert all(p.grad is not None for p in [*ours.model.parameters(), *ours.beside.values()])


def test_the_teacher_sees_the_mixed_images_and_mesa_goes_on(teacher):
    ours = learner(teacher, mixup=0.8, ema=0.5, mesa=1.5, mesa_start=0.0)
    seen = []
    for model in (ours.model, ours.task.teacher.model, ours.ema.module):
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    loss, _ = ours.loss(batch(), 0)
    (_, student), (_, taught), (_, averaged) = seen
    assert torch.equal(student, averaged) and not torch.equal(student, ours.task.inputs(batch().images))
    torch.testing.assert_close(taught, as_the_teacher_sees(student, teacher))
    ours.recipe = ours.task.recipe = ours.task.recipe.changed(mesa=0.0)
    plain, _ = ours.loss(batch(), 0)
    assert loss.item() > plain.item()  # by 1.5 times a cross entropy


def test_the_teacher_is_neither_trained_nor_kept(teacher):
    ours = learner(teacher, distil_kind="features", ema=0.9, clip_grad=1.0)
    model = ours.task.teacher.model.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, _ = ours.loss(batch(), 0)
    ours.backward(loss)
    ours.step(0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    trained = {id(p) for group in ours.optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*ours.model.parameters(), *ours.beside.values()]}
    assert ours.ema.module.state_dict().keys() == ours.state()["model"].keys() == ours.model.state_dict().keys()
    assert {name: tuple(value.shape) for name, value in ours.state()["beside"].items()} == {
        "project.weight": (24, 16),
        "project.bias": (24,),
    }
    decays = {tuple(p.shape): g["weight_decay"] for g in ours.optimiser.param_groups for p in g["params"]}
    assert decays[24, 16] == 0.05 and decays[24,] == 0
    assert not learner(teacher, distil_kind="soft").beside


def test_features_come_with_the_logits_of_every_host():
    for name, more in (
        ("vit_tiny", {"depth": 1, "img_size": 32}),
        ("pvt_v2_b0", {}),
        ("compact_pico", {}),
        ("swin_tiny", {"depths": (1, 1, 1, 1), "embed_dim": 24}),
        ("mlla_tiny", {"img_size": 64}),
        ("resnet18", {}),
    ):
        model = timm.create_model(name, num_classes=5, **more).eval()
        channels, side = model.pretrained_cfg["input_size"][0], more.get("img_size", 64)
        side = 8 if name == "compact_pico" else 224 if name == "swin_tiny" else side
        images = torch.randn(2, channels, side, side)
        for kind in ("features", "map"):
            logits, features = see(model, images, kind)
            torch.testing.assert_close(logits, model(images), msg=f"{name} {kind}")
            assert features.shape[0] == 2 and features.ndim == (2 if kind == "features" else 4)
            assert features.shape[-1] == model.num_features
        assert torch.equal(Seeing(model, "map", 7, 9).eval()(images), model(images))


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_their_names(teacher):
    other = tuple("9876543210")
    ours = learner(teacher, other)
    assert ours.task.order.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    images = ours.task.inputs(batch().images)
    loss, _ = ours.loss(batch(), 0)
    told = load_trained(teacher).model(as_the_teacher_sees(images, teacher)).flip(-1)
    labels = F.cross_entropy(ours.model(images), batch().targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, 0.5 * labels + 0.5 * soft(ours.model(images), told, 2.0))
    assert learner(teacher).task.order is None


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_student_comes_closer_to_its_teacher_and_is_used_without_it(teacher, tmp_path):
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    given = {**DISTIL, "teacher": str(gone), "epochs": 8, "batch_size": 64, "distil_weight": 1.0, "report": True}
    summary = train(resolve("digits", given), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"] and summary["top1"] > 50 and summary["task"] == "distil"
    shutil.rmtree(gone)
    trained = load_trained(tmp_path / "run")
    assert trained.classes == DIGITS and trained.facts["teacher"]
    held_out = Samples(open_data(resolve("digits", given)).val, eval_transform(trained.recipe, (8, 8)), 1, 0)
    images = Normalise(trained.recipe, CPU)(torch.stack([held_out[0, number][0] for number in range(64)]))
    with torch.no_grad():
        told = load_trained(teacher).model(as_the_teacher_sees(images, teacher))
        fresh = task_of(trained.recipe, {"classes": DIGITS}).build().eval()
        assert float(soft(trained.model(images), told, 2.0)) < 0.5 * float(soft(fresh(images), told, 2.0))
    assert evaluate(trained, device="cpu", amp="off")["top1"] == pytest.approx(summary["top1"])
    picture = next(iter(colours(tmp_path / "data", {"a": 1}).rglob("*.png")))
    (found,), _ = predict(trained, [picture], device="cpu")
    assert set(found.classes) <= set(DIGITS)
    save_for_hub(load_run(tmp_path / "run"), tmp_path / "hub")
    again = load_run(tmp_path / "hub")
    assert again.classes == DIGITS and torch.equal(again.model(images), trained.model(images))
    assert str(tmp_path) not in (tmp_path / "hub" / "config.json").read_text()
    started = resolve("finetune", {"init": str(tmp_path / "run" / "best.safetensors"), "data": "digits"})
    assert started.task == "classify" and started.model_args == trained.recipe.model_args


@pytest.mark.parametrize("kind", ["features", pytest.param("soft", marks=pytest.mark.full)])
def test_a_stopped_run_goes_on_bit_for_bit(teacher, tmp_path, kind):
    given = {**DISTIL, "teacher": str(teacher), "distil_kind": kind, "save_every": 1, "ema": 0.9, "mixup": 0.2}
    train(resolve("digits", given), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(resolve("digits", given), out=tmp_path / "run", report=Notes(8))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    one, other = (torch.load(tmp_path / name / "state.pt", weights_only=True)["beside"] for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert bool(one) == (kind == "features")


def test_a_stopped_run_wants_the_teacher_that_it_had(teacher, tmp_path):
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    with pytest.raises(Interrupted):
        train(resolve("digits", {**DISTIL, "teacher": str(mine), "save_every": 1}), out=tmp_path / "r", report=Notes(2))
    train(resolve("digits", {**QUICK, "epochs": 1}), out=tmp_path / "other")
    shutil.copy(tmp_path / "other" / "best.safetensors", mine / "best.safetensors")
    with pytest.raises(LinsightError, match=r"has changed \(teacher\): it cannot be resumed"):
        resume(tmp_path / "r")
    shutil.rmtree(mine)
    with pytest.raises(LinsightError, match="the teacher cannot be used: no such run folder or weights"):
        resume(tmp_path / "r")


# -- teachers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def softmax(tmp_path):
    """A softmax model of timm, for grey images of 16x16, in a folder of timm's layout."""
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 16, "patch_size": 8, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **args)
    save_for_hf(model, tmp_path / "timm", safe_serialization=True, model_args={**args, "num_classes": 10})
    return model.eval(), tmp_path / "timm"


def test_a_model_of_timm_teaches(softmax):
    model, folder = softmax
    for name in (folder, f"local-dir:{folder}"):
        ours = learner(name, distil_weight=1.0)
        images = ours.task.inputs(batch().images)
        loss, _ = ours.loss(batch(), 0)
        levels = images * 0.3763 + 0.3053
        resized = F.interpolate(levels, (16, 16), mode="bilinear", antialias=True, align_corners=False)
        told = model((resized - 0.5) / 0.5)
        torch.testing.assert_close(loss, soft(ours.model(images), told, 2.0))
    with pytest.raises(
        LinsightError, match=r"gives nothing for distil_kind=soft of images of 20x24: Input height \(20\)"
    ):
        learner(folder, teacher_size=(20, 24))


def test_a_name_of_timm_is_a_model_with_its_weights(monkeypatch):
    torch.manual_seed(3)
    model = timm.create_model("resnet18").eval()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *args, **kwargs: model.state_dict())
    monkeypatch.setattr(_builder, "has_hf_hub", lambda necessary=False: True)
    images = torch.randn(1, 3, 64, 64)
    for name in ("resnet18", "timm/resnet18", "timm/resnet18.a1_in1k"):
        found = load_teacher(name)
        assert torch.equal(found.model(images), model(images)) and not found.run
        assert found.recipe.mean == (0.485, 0.456, 0.406) and found.recipe.img_size == (224, 224)
        assert len(found.classes) == 1000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": None}, "the task distil learns from a teacher: name it, as in teacher=runs/NAME"),
        ({"teacher": "runs/none"}, "the teacher cannot be used: no such run folder or weights: 'runs/none'"),
        ({"teacher": "resnt18"}, "the teacher cannot be used: no such run folder or weights: 'resnt18'"),
        ({"teacher": "timm/resnt18"}, "the teacher cannot be used: unknown model of timm 'resnt18': did you mean"),
        (
            {"teacher": "vit_tiny"},
            "'vit_tiny' is the name of a model, without weights: .* with teacher_checkpoint FILE",
        ),
        ({"teacher": "https://host/a.pth"}, "does not tell which model .* give the address as teacher_checkpoint"),
        (
            {"teacher": "run"},
            "the teacher cannot be used: no such run folder or weights: 'run'",
        ),  # the run's own folder
        ({"in_chans": 3}, "the teacher '.*' takes images of 1 channels: set in_chans=1, not 3"),
        ({"num_classes": 12}, "the teacher '.*' has 10 classes, and the student 12: distil_kind=features or map"),
        ({"task": "classify"}, "unknown recipe field 'teacher': .*task=distil has it"),
        (
            {"model": "dynp_resnet18_025_t32_cifar", "attention": None, "model_args": ""},
            "distil needs a model with one set of logits",
        ),
    ],
)
def test_what_is_no_teacher_is_told_in_a_line_before_there_is_a_folder(teacher, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LinsightError, match=message) as caught:
        train(resolve("digits", {**DISTIL, "teacher": str(teacher), **given}), out="run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_other_classes_are_told_and_features_are_learned_from_any(teacher, tmp_path):
    for classes, message in (
        ((*DIGITS[:9], "x"), r"knows other classes than the data has, as it has no class 'x'"),
        (DIGITS[:9], "has 10 classes, and the student 9"),
    ):
        with pytest.raises(LinsightError, match=message):
            learner(teacher, classes)
        assert learner(teacher, classes, distil_kind="features").loss(batch(), 0)[0].isfinite()


def test_the_task_is_known():
    assert "distil" in {task.name for task in list_tasks()}
