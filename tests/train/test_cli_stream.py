"""`linsight predict --stream`: what it says is what the model says of the whole image; and how it stops and goes on."""

import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from linsight.streaming import tiled
from linsight.tasks import ClassifyRecipe
from linsight.train import load_trained, tiling
from linsight.train.model import build, save
from linsight.train.progress import TileBar, TileLines

SIDES = (30, 26)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIDES, 3), dtype=np.uint8)
MODEL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
PLAIN = ("--device", "cpu", "--amp", "off", "--tile", "16")


def trained(path, attention):
    own = {"img_size": (24, 24), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    recipe = ClassifyRecipe(model="vit_tiny", attention=attention, model_args=MODEL, **own)
    torch.manual_seed(0)
    model = build(recipe, 3)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    save(path, model.state_dict(), recipe, {"classes": ("blue", "green", "red")})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "best.safetensors", "inline")


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@torch.inference_mode()
def expected(weights):
    """Probabilities, features and the last map, of the whole image."""
    model = load_trained(weights).model
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    x = model.forward_features(((torch.from_numpy(PIXELS) / 255 - mean) / std).permute(2, 0, 1)[None])
    logits, features = model.forward_head(x), model.forward_head(x, pre_logits=True)
    return logits.softmax(-1)[0].numpy(), features.numpy(), x[0, 1:].unflatten(0, (8, 7)).numpy()


def near(found, truth):
    assert found.shape == truth.shape and np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def test_classes_features_and_the_map(weights, photo, linsight, tmp_path):
    classes, features, spatial = expected(weights)
    code, out, err = linsight("predict", weights, photo, photo, "--stream", "--json", *PLAIN)
    first, second = json.loads(out)["predictions"]
    assert code == 0 and err == "" and first == second and first["file"] == str(photo)
    names = ("blue", "green", "red")
    near(np.array([first["probabilities"][first["classes"].index(name)] for name in names]), classes)
    assert first["probabilities"] == sorted(first["probabilities"], reverse=True)
    code, out, _ = linsight("predict", weights, photo, "--stream", "--top", "1", *PLAIN)
    assert code == 0 and names[classes.argmax()] in out and names[classes.argmin()] not in out
    file, scratch = tmp_path / "found.npy", tmp_path / "scratch"
    for output, truth in (("features", features), ("map", spatial)):
        for more in ((), ("--scratch", scratch)):
            command = ("predict", weights, photo, "--stream", "--output", output, "--out", file, *PLAIN, *more)
            code, out, err = linsight(*command)
            assert code == 0 and err == "" and " x ".join(map(str, truth.shape)) in out
            near(np.load(file), truth)
            file.unlink()
    assert os.listdir(scratch) == [] and sorted(os.listdir(tmp_path)) == ["a.png", "scratch"]
    code, out, _ = linsight(*command, "--json", "--dtype", "bfloat16")
    assert code == 0 and json.loads(out)["shape"] == [8, 7, 16]
    assert 1e-4 < np.abs(np.load(file) - spatial).max() / np.abs(spatial).max() < 5e-2


def test_mixed_precision(weights, photo, linsight):
    classes, *_ = expected(weights)
    code, out, _ = linsight("predict", weights, photo, "--stream", "--json", "--device", "cpu", "--amp", "bf16")
    (found,) = json.loads(out)["predictions"]
    assert code == 0 and found["probabilities"][0] == pytest.approx(classes.max(), abs=0.02)


def stop_at(monkeypatch, count, number):
    """A signal in the tile `count` of all blocks."""
    calls, run = [], tiled.TiledBlock.run

    def stopping(self, x, tile):
        calls.append(tile)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return run(self, x, tile)

    monkeypatch.setattr(tiled.TiledBlock, "run", stopping)
    return calls


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on(weights, photo, linsight, tmp_path, monkeypatch, number, code):
    calls, scratch = stop_at(monkeypatch, 12, number), tmp_path / "scratch"  # in the second block
    before = signal.getsignal(signal.SIGINT)
    command = ("predict", weights, photo, "--stream", "--scratch", scratch, "--json", *PLAIN)
    stopped, out, err = linsight(*command)
    assert stopped == code and out == "" and err.count("\n") == 1
    assert err.startswith("linsight: stopped at 67 % of ") and f"--resume (what is done is in '{scratch}')" in err
    assert len(calls) == 12 and signal.getsignal(signal.SIGINT) is before
    again, out, err = linsight(*command)
    assert again == 2 and out == "" and "--resume" in err and err.count("\n") == 1
    again, out, err = linsight(*command, "--resume")
    assert again == 0 and len(calls) == 12 + 8  # that block's two passes, of four tiles each
    near(np.array(json.loads(out)["predictions"][0]["probabilities"]), np.sort(expected(weights)[0])[::-1])


def test_without_scratch_nothing_is_kept_of_a_stopped_run(weights, photo, linsight, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGINT)
    file = tmp_path / "map.npy"
    code, _, err = linsight("predict", weights, photo, "--stream", "--output", "map", "--out", file, *PLAIN)
    assert code == 130 and "nothing is kept without --scratch" in err and os.listdir(tmp_path) == ["a.png"]


def test_bad_images_are_skipped_or_refused(weights, photo, linsight, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photo.read_bytes()[:500])
    code, out, err = linsight("predict", weights, bad, photo, "--stream", *PLAIN)
    assert code == 0 and "a.png" in out and err.startswith("linsight: skipped ") and "bad.png" in err
    for more, word in ((("--on-bad-image", "refuse"), "bad.png"), ((), "no image could be read")):
        images = (bad, photo) if more else (bad,)
        code, out, err = linsight("predict", weights, *images, "--stream", *PLAIN, *more)
        assert code == 2 and out == "" and err.count("\n") == 1 and word in err


def test_what_cannot_be_is_one_line(weights, photo, linsight, tmp_path):
    (tmp_path / "out").mkdir()
    soft = trained(tmp_path / "soft.safetensors", "softmax")
    file = tmp_path / "a.npy"
    cases = [
        ((photo, "--tile", "16"), "--tile goes with --stream"),
        ((photo, "--output", "map"), "--output goes with --stream"),
        ((photo, "--resume"), "--resume goes with --stream"),
        ((photo, "--stream", "--resume"), "--resume needs --scratch"),
        ((photo, "--stream", "--output", "mop"), "did you mean 'map'"),
        ((photo, "--stream", "--output", "map"), "--out FILE.npy goes with"),
        ((photo, "--stream", "--out", file), "--out FILE.npy goes with"),
        ((photo, photo, "--stream", "--output", "map", "--out", file), "for one image"),
        ((photo, photo, "--stream", "--scratch", tmp_path / "s"), "for one image"),
        ((photo, "--stream", "--output", "map", "--out", tmp_path / "a.png"), "end in .npy"),
        ((photo, "--stream", "--output", "map", "--out", tmp_path / "no" / "a.npy"), "is no folder"),
        ((photo, "--stream", "--dtype", "float16"), "did you mean 'bfloat16'"),
        ((photo, "--stream", "--scratch", photo), "is no folder"),
        ((tmp_path / "nowhere.tif", "--stream"), "no such image"),
        ((tmp_path, "--stream"), "is a folder"),
    ]
    for arguments, message in cases:
        code, out, err = linsight("predict", weights, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", arguments
    code, _, err = linsight("predict", soft, photo, "--stream")
    assert code == 2 and "'softmax' does not support images in tiles" in err and "inline" in err
    assert not file.exists()


def test_a_map_that_cannot_be_moved_is_kept(weights, photo, linsight, tmp_path, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiling.shutil, "move", full)
    scratch, file = tmp_path / "scratch", tmp_path / "a.npy"
    command = ("predict", weights, photo, "--stream", "--output", "map", "--out", file, "--scratch", scratch, *PLAIN)
    code, _, err = linsight(*command)
    assert code == 2 and "No space left" in err and f"the map is in '{scratch / 'map.npy'}'" in err
    assert sorted(os.listdir(tmp_path)) == ["a.png", "scratch"]
    near(np.load(scratch / "map.npy"), expected(weights)[2])


def test_progress_tells_the_share_and_the_time_left(monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr("linsight.train.progress.time.perf_counter", lambda: float(next(clock)))
    lines = TileLines(Console(file=io.StringIO(), width=20))
    with lines.of("a[b].tif"):
        for done in range(3, 9):  # of a resumed run, 40 seconds each
            lines.tile(done, 10)
    said = lines.console.file.getvalue().splitlines()
    assert said[0] == "a[b].tif: 40 % of 10 tiles, about 4:00 left" and len(said) == 3
    monkeypatch.undo()
    bar = TileBar(Console(file=io.StringIO(), width=120, force_terminal=True))
    with bar.of("a[b].tif"):
        bar.tile(3, 10)
        bar.tile(5, 10)
        bar.bar.refresh()
    shown = bar.console.file.getvalue()
    assert "a[b].tif" in shown and "50 %" in shown and "5/10" in shown and "left" in shown
