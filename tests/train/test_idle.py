"""Fields that do nothing beside others: who sets them is told so, and what would use them."""

import pytest
from PIL import Image
from small import TINY

from linsight.data.images import train_transform
from linsight.data.random import seed_sample
from linsight.tasks import record_of
from linsight.train import resolve
from linsight.train.idle import USES, told_idle

# A field that is told, with what leaves it idle, and what puts it to use.
CASES = [
    ({"scale": "0.5,1", "crop_mode": "pad"}, {"crop_mode": "rkrr"}),
    ({"ratio": "0.5,2", "crop_mode": "none"}, {"crop_mode": "rrc"}),
    ({"crop_padding": 2, "crop_mode": "rrc"}, {"crop_mode": "pad"}),
    ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, {"auto_augment": "none"}),
    ({"color_jitter": 0.4, "task": "segment", "in_chans": 1}, {"in_chans": 3}),
    ({"re_mode": "const", "re_prob": 0}, {"re_prob": 0.1}),
    ({"cache_dir": "here", "cache": "memory"}, {"cache": "disk"}),
    ({"val_fraction": 0.2, "val_split": "test"}, {"val_split": None}),
    ({"init_partial": True}, {"init": "a/file.pth"}),
    ({"from_size": "224"}, {"init": "a/file.pth"}),
    ({"freeze_layers": 1, "freeze": True}, {"freeze": False}),
    ({"freeze_stages": 1, "freeze": True}, {"freeze": False}),
    ({"sched_args": "decay_rate=0.5", "sched": "none"}, {"sched": "step"}),
    ({"warmup_epochs": 0, "warmup_updates": 500}, {"warmup_updates": 0}),
    ({"warmup_updates": 5, "sched": "none"}, {"sched": "cosine"}),
    ({"warmup_lr": "1e-5", "warmup_epochs": 0, "warmup_updates": 0}, {"warmup_epochs": 2}),
    ({"warmup_lr": "1e-5", "warmup_epochs": 2, "sched": "none"}, {"sched": "cosine"}),
    ({"min_lr": "1e-5", "sched": "multistep"}, {"sched": "poly"}),
    ({"cooldown_epochs": 1, "sched": "step"}, {"sched": "tanh"}),
    ({"ema_warmup": True, "ema": 0}, {"ema": 0.9}),
    ({"ema_base_batch": 64, "ema": 0}, {"ema": 0.9}),
    ({"mixup_prob": 0.5, "mixup": 0, "cutmix": 0}, {"cutmix": 1}),
    ({"mixup_switch_prob": 0.5, "mixup": 0.5, "cutmix": 0}, {"cutmix": 1}),
    ({"mesa_start": 0.5, "ema": 0.9}, {"mesa": 1}),
    ({"distil_temperature": 1, "task": "distil", "distil_kind": "hard"}, {"distil_kind": "soft"}),
    ({"distil_distance": "mse", "task": "distil", "distil_kind": "soft"}, {"distil_kind": "map"}),
    ({"transfer_lr": "1e-3", "task": "linearize", "transfer_steps": 0}, {"transfer_steps": 5}),
    ({"eval_stride": 0.5, "task": "segment", "eval_mode": "whole"}, {"eval_mode": "slide"}),
    ({"head_width": 64, "task": "detect", "method": "retinanet"}, {"method": "faster_rcnn"}),
]


def told(field, given):
    return [line for line in told_idle(resolve("digits", given), "digits", given) if line.startswith(f"{field}=")]


@pytest.mark.parametrize(("given", "use"), CASES, ids=["-".join(given) for given, _ in CASES])
def test_a_field_is_told_until_another_uses_it(given, use):
    field = next(iter(given))
    (line,) = told(field, given)
    beside, _, how = line.partition(" has no effect with ")[2].partition(": set ")
    assert how and all(f"{word}=" in beside for word in use) and "\n" not in line
    assert told(field, {**given, **use}) == []
    assert not any(line.startswith(f"{field}=") for line in told_idle(resolve("digits", given), "digits", use))


def test_each_field_of_the_table_has_a_case():
    assert {next(iter(given)) for given, _ in CASES} == set(USES)


@pytest.mark.parametrize("task", ["segment", "detect", "linearize"])
def test_fields_that_a_task_does_not_use(task):
    unused = record_of(task).UNUSED
    for field, instead in unused.items():
        plain = record_of(task).model_fields[field].default
        given = {"task": task, field: "rand-m9" if field == "auto_augment" else plain}
        assert told(field, given)[0].endswith(f" has no effect with task={task}: {instead}")
        words = instead.removeprefix("see ").replace(" and ", ", ").split(", ") if instead.startswith("see") else []
        assert set(words) <= record_of(task).model_fields.keys()


@pytest.mark.parametrize(
    ("field", "value", "idle", "used"),
    [
        ("crop_padding", 9, {"crop_mode": "rrc"}, {"crop_mode": "pad"}),
        ("scale", "0.2,0.3", {"crop_mode": "pad"}, {"crop_mode": "rrc"}),
        ("ratio", "3,4", {"crop_mode": "none"}, {"crop_mode": "rkrc"}),
        ("color_jitter", 0.9, {"auto_augment": "rand-m1-n1"}, {"auto_augment": "3a"}),
    ],
)
def test_they_are_idle_indeed(field, value, idle, used):
    image = Image.radial_gradient("L").convert("RGB").resize((40, 30))

    def seen(given):
        recipe = resolve("photos", {"img_size": 24, "hflip": 0, "crop_mode": "rrc", "auto_augment": "none", **given})
        found = []
        for number in range(8):  # some change an image now and then
            seed_sample(number)
            found.append(train_transform(recipe, (24, 24))(image).tolist())
        return found

    assert seen({**idle, field: value}) == seen(idle)
    assert seen({**used, field: value}) != seen(used)


def test_the_command_says_it(linsight, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if not isinstance(value, bool)]
    quick = ("--no-report", "--no-figures", "--epochs=1", "--warmup-epochs=0", "--crop-mode=rrc")
    (tmp_path / "mine.toml").write_text('recipe = "digits"\ncrop_padding = 3\nre_mode = "pixel"\n')
    command = ("train", "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "run", *options, *quick)
    code, out, err = linsight(*command, "--ema-warmup")
    assert code == 0, err
    assert "crop_padding=3 has no effect with crop_mode='rrc': set crop_mode=pad" in out
    assert "ema_warmup=True has no effect" in out and out.count("has no effect") == 2
