"""Rates, warm-ups, guesses and arguments: said as they are, or refused in one line."""

import io

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from test_commands import TINY, data  # noqa: F401

import linsight
from linsight import bench
from linsight.errors import LinsightError
from linsight.tasks import task_of
from linsight.train import resolve, train
from linsight.train.learner import Learner
from linsight.train.model import build
from linsight.train.progress import Silent, reporter


def learner(**overrides):
    recipe = resolve("digits", {**TINY, "model_args": TINY["model_args"].replace("depth=1", "depth=3"), **overrides})
    torch.manual_seed(0)
    task = task_of(recipe, {"classes": tuple("abc")})
    return Learner(task, build(recipe, 3), torch.device("cpu"), None, updates=4)


@pytest.mark.parametrize("sched", ["none", "cosine", "step"])
def test_layer_decay_acts_with_and_without_a_schedule_and_the_rate_told_is_the_peak(sched):
    one = learner(sched=sched, opt_args="layer_decay=0.5", lr=0.01)
    if one.schedule is not None:
        one.schedule.step_update(0)
    scales = sorted({group["lr_scale"] for group in one.optimiser.param_groups})
    rates = sorted({group["lr"] for group in one.optimiser.param_groups})
    assert len(scales) > 3 and rates == pytest.approx([0.01 * scale for scale in scales]) and rates[-1] == 0.01
    assert one.lr == 0.01


def test_layer_decay_changes_the_run(data, tmp_path):  # noqa: F811
    losses = []
    for decay in (1.0, 0.3):
        values = {**TINY, "data": data, "sched": "none", "epochs": 2, "opt_args": f"layer_decay={decay}", "lr": 0.01}
        train(resolve("digits", values), out=tmp_path / str(decay))
        losses.append((tmp_path / str(decay) / "metrics.jsonl").read_text())
    assert '"lr": 0.01,' in losses[1] and losses[0].partition("images")[0] != losses[1].partition("images")[0]


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_warm_up_as_long_as_the_run_is_shortened_and_said(data, tmp_path):  # noqa: F811
    report = Notes()
    values = {**TINY, "data": data, "epochs": 4, "warmup_epochs": 5, "lr": 0.01}
    train(resolve("digits", values), out=tmp_path / "run", report=report)
    assert "a warm-up of 5 epochs would take all 4: it is 1 of them" in report.notes
    one = learner(epochs=4, warmup_epochs=5, lr=0.01)
    one.schedule.step_update(4)  # the first update of the second epoch
    assert one.lr > 0.008
    report = Notes()
    train(resolve("digits", {**values, "warmup_epochs": 1}), out=tmp_path / "other", report=report)
    assert not any("warm-up" in note for note in report.notes)


def rows(name, time):
    found = []
    for side in (14, 28):
        tokens = float(side * side)
        row = {"kind": "operator", "model": name, "tokens": tokens, "dim": 192.0, "heads": 6.0, "date": "2026"}
        row |= {"beside": "" if name == "softmax" else "softmax", "device": "cpu: Xeon", "precision": "float32"}
        row |= {"infer_batch_size": 1.0, "infer_step_time": time(tokens), "infer_img_size": str(side)}
        if name != "softmax":
            row["infer_ratio"] = time(tokens) / softmax(tokens)
        found.append(row)
    return found


def softmax(n):
    return 1e-6 * n**2.3  # from a cache to memory


def linear(n):
    return 0.01 * n**0.5  # overhead


def test_beyond_the_data_a_time_grows_at_least_with_the_tokens_and_at_most_with_their_square():
    question = bench.Question(16 * 112, 16 * 112, device="cpu")  # 16 times the tokens of the largest
    found = bench.advise(rows("inline", linear) + rows("softmax", softmax), question)
    inline, base = found.choices
    assert inline.milliseconds == pytest.approx(16 * linear(784)) and base.milliseconds == pytest.approx(
        256 * softmax(784)
    )
    assert 1 / inline.ratio == pytest.approx(16 * softmax(784) / linear(784))
    assert "as fast as softmax, beyond what was measured: " in found.words[0]
    inside = bench.advise(rows("inline", linear) + rows("softmax", softmax), bench.Question(448, 448, device="cpu"))
    assert "beyond" not in " ".join(inside.words)
    small = bench.advise(rows("inline", linear) + rows("softmax", softmax), bench.Question(64, 64, device="cpu"))
    assert small.choices[0].beyond > 1 and small.choices[-1].milliseconds == pytest.approx(linear(16))


def test_a_terminal_is_told_what_a_run_is_at_before_its_first_step(data, tmp_path):  # noqa: F811
    texts = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        values = {**TINY, "data": data}
        train(resolve("digits", values), out=tmp_path / str(terminal), report=reporter(console))
        texts.append(console.file.getvalue())
    for word in ("reading what data there is", "building the model", "the first batch"):
        assert word in texts[0] and word not in texts[1]
    assert all("top-1" in text and "top-5" not in text for text in texts)  # of three classes


HOSTS = ["vit_tiny", "swin_tiny", "pvt_tiny", "pvt_v2_b0", "cswin_tiny", "mlla_tiny", "compact_pico", "wfm_tiny"]
SIZES = [0, -5, 2.5, "224", "x", (224,), (0, 224), (8, 8, 8), 64.0, True, ("64", "64"), 10**9, float("nan"), np.eye(2)]


@pytest.mark.parametrize("host", [*HOSTS, "deit_tiny_patch16_224"])
def test_sizes_of_images_at_the_door_of_a_model(host):
    for size in SIZES:
        with pytest.raises(LinsightError, match="img_size=") as refused:
            linsight.create_model(host, img_size=size, device="meta")
        assert "\n" not in str(refused.value)
    for size in (np.int64(64), [64, 64], (np.int32(64), 64), torch.Size((64, 64))):
        linsight.create_model(host, img_size=size, device="meta")


def test_images_smaller_than_a_patch_are_refused():
    for host in ("vit_tiny", "swin_tiny", "inline_deit_tiny", "wfm_tiny", "deit_tiny_patch16_224"):
        with pytest.raises(LinsightError, match=r"img_size.*a side is at least that of a patch"):
            linsight.create_model(host, img_size=(1, 64), device="meta")


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": "x"},
        {"num_classes": -1},
        {"in_chans": 0},
        {"drop_path_rate": 2},
        {"drop_rate": "x"},
        {"drop_path_rate": float("nan")},
        {"patch_size": 0},
        {"patch_size": "x"},
        {"mlp_ratio": -1},
        {"embed_dim": 0},
        {"num_heads": 5},
        {"depth": 0},
        {"norm_layer": "x"},
        {"global_pool": "x"},
        {"attention": 5},
        {"attention_options": "x"},
    ],
    ids=str,
)
def test_arguments_at_the_door_of_a_model(arguments):
    (name,) = arguments
    for create in (linsight.create_model, timm.create_model):
        with pytest.raises(LinsightError, match=name) as refused:
            create("vit_tiny" if create is linsight.create_model else "inline_deit_tiny", **arguments)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [5, None, ["vit_tiny"], b"x", ""])
def test_names_are_text(name):
    for create in (linsight.create_model, lambda name: linsight.create_attention(name, 16, 2)):
        with pytest.raises(LinsightError):
            create(name)
