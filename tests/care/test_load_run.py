"""A trained run in Python, and what starts from one."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import linsight
from linsight.errors import CheckpointError, ImageError
from linsight.train import LoadedRun, evaluate, load_trained, predict, resolve, train

TINY = "patch_size=2,embed_dim=16,depth=1,num_heads=2,class_token=False,global_pool=avg"
DIGITS = {"model": "vit_tiny", "attention": "inline", "model_args": TINY, "epochs": 1, "figures": False}
DIGITS |= {"device": "cpu", "amp": "off", "threads": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on digits."""
    out = tmp_path_factory.mktemp("run") / "digits"
    train(resolve("digits", DIGITS), out=out)
    return out


@pytest.fixture
def pictures(tmp_path):
    """Two pictures larger than the model's, in colour."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(2)]
    for place, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{place}.png")
    return tmp_path, arrays


def test_a_run_is_loaded_with_what_it_takes_to_use_it(folder):
    run = linsight.load_run(folder)
    assert isinstance(run, LoadedRun) and not run.model.training
    assert run.classes == tuple("0123456789") and run.img_size == (8, 8)
    assert (run.mean, run.std) == ((0.3053,), (0.3763,))
    assert run.recipe == resolve("digits", DIGITS) and run.summary["classes"] == 10
    assert run.path == folder / "best.safetensors"
    assert run.model.blocks[0].attn.qkv.weight.requires_grad is not False  # ready to be tuned


def test_predictions_are_those_of_the_command(folder, pictures):
    where, arrays = pictures
    files = [where / "0.png", where / "1.png"]
    run = linsight.load_run(str(folder))
    known, bad = predict(load_trained(folder), files, top=10)
    found = run.predict([files[0], Image.fromarray(arrays[1])], top=10, batch_size=1)
    assert not bad and [entry.file for entry in found] == [str(files[0]), "image 1"]
    for ours, theirs in zip(found, known, strict=True):
        assert ours.classes == theirs.classes
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    (one,) = run.predict(arrays[0], top=3)
    assert one.classes == found[0].classes[:3] and one.file == "image 0"
    with torch.no_grad():
        logits = run.model(torch.stack([run.transform(arrays[0]), run.transform(str(files[1]))]))
    for row, entry in zip(logits.softmax(1), found, strict=True):
        best = row.sort(descending=True)
        assert tuple(run.classes[i] for i in best.indices) == entry.classes
        assert best.values.tolist() == pytest.approx(entry.probabilities, abs=1e-5)


def test_the_accuracy_is_that_of_the_run(folder):
    run = linsight.load_run(folder)
    assert evaluate(load_trained(folder), device="cpu", amp="off")["top1"] == pytest.approx(run.summary["top1"])


def test_predicting_leaves_a_model_in_training_as_it_is(folder, pictures):
    run = linsight.load_run(folder)
    run.model.train()
    run.predict(pictures[1][0])
    assert run.model.training and all(module.training for module in run.model.modules())


def test_weights_alone_do_without_the_rest_of_the_folder(folder, tmp_path, pictures):
    shutil.copy(folder / "best.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["another program's"]}))
    run = linsight.load_run(tmp_path / "mine.safetensors")
    assert run.summary == {} and run.classes == linsight.load_run(folder).classes
    assert run.predict(pictures[1][0]) == linsight.load_run(folder).predict(pictures[1][0])


def test_what_cannot_be_loaded_or_read_is_one_line(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        linsight.load_run(tmp_path / "none")
    (tmp_path / "a.png").write_bytes(b"no picture")
    run = linsight.load_run(folder)
    for bad in (tmp_path / "a.png", tmp_path / "none.png", None, np.zeros((3, 4), dtype=complex)):
        with pytest.raises(ImageError) as error:
            run.predict([np.zeros((8, 8), dtype=np.uint8), bad])
        assert "\n" not in str(error.value)
        assert not isinstance(bad, pathlib.Path) or str(bad) in str(error.value)
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        linsight.load_runs  # noqa: B018
