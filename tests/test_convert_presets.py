"""Published conversions: every one that is here converts a model and trains it; the others say what is missing."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from linsight.attention import create_core
from linsight.convert import converted_layers, distil, distil_layers, linearize
from linsight.convert.presets import HERE, LOSSES, PRESETS, READ, Stage, preset
from linsight.errors import LinsightError, UnknownNameError

NAMES = "t5 hedgehog lolcats linfusion clear supra lizard xatl mohawk vit_linearizer linvideo linmu"
MISSING = ("xatl", "mohawk", "vit_linearizer", "linmu")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def test_all_are_there():
    assert set(PRESETS) == set(NAMES.split()) and all(preset(name).name == name for name in PRESETS)
    with pytest.raises(UnknownNameError, match="did you mean 'lolcats'"):
        preset("lolcat")


@pytest.mark.parametrize("row", PRESETS.values(), ids=PRESETS)
def test_rows_are_whole(row):
    assert row.paper.arxiv and row.models and row.layers and row.new and row.stages and row.gaps
    assert set(row.inherits) <= {"q", "k", "v", "out"}
    for stage in row.stages:
        assert stage.trains in ("new", "all", "attention", "lora") and set(stage.losses) <= set(LOSSES[stage.of])
        assert stage.lr is None or 0 < stage.lr < 1
        assert set(stage.unmet) == set(stage.losses) - set(HERE[stage.of])
    for figure in row.figures:
        assert figure.read in READ and figure.what in str(figure) and "→" in str(figure)
    if row.attention:
        create_core(row.attention, 32, 2, **row.options)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(MISSING)))
def test_those_that_are_here_convert_and_train(name):
    teacher = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    method, images = preset(name), [torch.randn(2, 3, 32, 32)]
    student = linearize(teacher, **method.conversion())
    assert all(layer.hybrid == method.hybrid for layer in converted_layers(student).values())
    for stage in method.stages:
        if not set(stage.losses) - set(stage.unmet):
            with pytest.raises(LinsightError, match="is not in linsight"):
                stage.keywords()
            continue
        labels = torch.tensor([0, 1])
        found = (
            distil_layers(teacher, student, images, steps=1, **stage.keywords())
            if stage.of == "layers"
            else distil(
                teacher,
                student,
                images,
                steps=1,
                task=lambda outputs, batch: F.cross_entropy(outputs, labels),  # noqa: B023
                **stage.keywords(),
            )
        )
        assert found and all(math.isfinite(loss) for loss in found.values())
        if stage.of == "model":
            assert set(found) == set(stage.losses) - set(stage.unmet)


@pytest.mark.parametrize("name", MISSING)
def test_the_others_say_so(name):
    with pytest.raises(LinsightError, match=f"nothing here is like the mechanism of '{name}'"):
        preset(name).conversion()


def test_stages_are_arguments():
    first, second = preset("lolcats").stages
    assert first.keywords() == {"loss": "outputs", "lr": 1e-2}
    how = second.keywords()["recovery"]
    assert (how.train, how.rank, how.lr, how.task, how.logits, how.hidden) == ("lora", 8, 1e-4, 1, 0, 0)
    (stage,) = preset("t5").stages
    how = stage.keywords()["recovery"]
    assert (how.train, how.lr, how.new_lr_scale) == ("all", 2e-5, 20)
    (stage,) = preset("clear").stages
    how = stage.keywords()["recovery"]
    assert (how.distance, how.logits, how.task) == ("mse", 0.5, 1) and stage.unmet == ("outputs",)
    assert preset("hedgehog").stages[0].keywords() == {"loss": "weights"}
    with pytest.raises(LinsightError, match="losses that are not told"):
        Stage("model", {}).keywords()


def test_what_is_inherited():
    given = preset("lizard").conversion()
    assert "inherit" not in given and given["hybrid"].window == 128
    assert preset("linvideo").conversion()["hybrid"].selected
    assert preset("xatl").inherits == ("out",) and preset("vit_linearizer").inherits == ()


def test_stages_in_words():
    assert str(preset("t5").stages[0]).startswith("model: task, all, lr 2e-05, 20 times that for new ones, 30 epochs")
    assert str(preset("linvideo").stages[0]) == "model: distribution + 0.01 selection, all, 3k steps"
