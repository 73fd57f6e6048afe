"""What streaming refuses, what it leaves behind when it is stopped, and how it goes on."""

import contextlib
import copy
import errno
import json
import os

import numpy as np
import pytest
import torch

import linsight
from linsight.errors import CapabilityError, LinsightError
from linsight.streaming import store, tiled

from .hosts import PLAIN, close, image, small, whole

PICTURE = image(30, 26)
ARGUMENTS = {"tile": 16, **PLAIN}


@pytest.fixture(scope="module")
def model():
    return small("vit_tiny", "inline", cpe=True)


def one_line(kind, *words, **arguments):
    with pytest.raises(kind) as caught:
        linsight.stream(**{"image": PICTURE, **ARGUMENTS, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


class Stopping:
    """A picture whose reader fails, or is interrupted, at a certain read."""

    def __init__(self, at, error):
        self.shape, self.at, self.error, self.reads = PICTURE.shape, at, error, 0

    def __getitem__(self, place):
        self.reads += 1
        if self.reads == self.at:
            raise self.error
        return PICTURE[place]


def test_who_cannot_is_told_who_can(model):
    assert "inline" in one_line(CapabilityError, "softmax", model=small("vit_tiny", "softmax"))
    one_line(CapabilityError, "Swin", "windows", model=small("swin_tiny", "inline", attention_window=3))
    one_line(CapabilityError, "causal", model=small("vit_tiny", "linear", attention_options={"causal": True}))
    one_line(CapabilityError, "vit", "mlla", model=torch.nn.Conv2d(3, 3, 3))
    one_line(CapabilityError, "map", model=small("vit_tiny", "inline", global_pool="max", class_token=False))


def test_bad_arguments(model):
    for words, arguments in (
        (["tile=0"], {"tile": 0}),
        (["output", "map"], {"output": "mop"}),
        (["float16"], {"dtype": torch.float16}),
        (["scratch"], {"resume": True}),
        (["(4, 30, 26)"], {"image": torch.zeros(4, 30, 26)}),
        (["no pixels"], {"image": torch.zeros(3, 0, 26)}),
        (["unknown"], {"image": [[0]]}),
        (["no such image", "picture.png"], {"image": "picture.png"}),
    ):
        one_line(LinsightError, *words, model=model, **arguments)
    model.train()
    one_line(LinsightError, "eval", model=model)
    model.eval()


def test_images_of_any_axes_and_type(model):
    pixels = torch.randint(0, 256, (3, 30, 26), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    model.pretrained_cfg.update(mean=mean.flatten().tolist(), std=std.flatten().tolist())
    expected = whole(model, (pixels / 255 - mean) / std)[1]
    for picture in (pixels, pixels.permute(1, 2, 0).numpy(), pixels.numpy().astype(np.uint16) * 257, pixels / 255):
        close(linsight.stream(model, picture, tile=16, output="features"), expected)


def test_the_model_is_untouched(model):
    before = dict(model.named_modules())
    linsight.stream(model, PICTURE, **ARGUMENTS)
    assert dict(model.named_modules()) == before
    assert all("forward" not in vars(module) for module in before.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_files_are_memory(model, dtype, tmp_path):
    told = []
    arguments = {**ARGUMENTS, "dtype": dtype, "output": "map"}
    expected = linsight.stream(model, PICTURE, **arguments)
    found = linsight.stream(
        model, PICTURE, scratch=tmp_path / "s", report=lambda *counts: told.append(counts), **arguments
    )
    assert torch.equal(found, expected)
    close(found.flatten(0, 1), whole(model, PICTURE)[0], 1e-4 if dtype == torch.float32 else 5e-2)
    assert os.listdir(tmp_path / "s") == ["map.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "map.npy", mmap_mode="r"), expected.numpy())
    assert told == [(i + 1, told[-1][1]) for i in range(told[-1][1])]


def test_a_stopped_run_goes_on_from_its_last_step(model, tmp_path, monkeypatch):
    expected = linsight.stream(model, PICTURE, **ARGUMENTS)
    calls, run = [], tiled.TiledBlock.run

    def interrupted(self, x, tile):
        calls.append(tile)
        if len(calls) == 12:  # in the second block
            raise KeyboardInterrupt
        return run(self, x, tile)

    monkeypatch.setattr(tiled.TiledBlock, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        linsight.stream(model, PICTURE, scratch=tmp_path, **ARGUMENTS)
    assert json.loads((tmp_path / "stream.json").read_text())["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["linsight-1.map", "stream.json"]
    one_line(LinsightError, "resume=True", model=model, scratch=tmp_path)
    again = {"model": model, "scratch": tmp_path, "resume": True}
    one_line(LinsightError, "another image", **{**again, "image": PICTURE + 1})
    one_line(LinsightError, "another model", **{**again, "model": small("vit_tiny", "inline", cpe=True, depth=3)})
    one_line(LinsightError, "another dtype", dtype=torch.bfloat16, **again)
    assert torch.equal(linsight.stream(image=PICTURE, **ARGUMENTS, **again), expected)
    assert len(calls) == 12 + 8  # the second block's two passes, of four tiles each
    assert os.listdir(tmp_path) == []


def test_a_stopped_run_is_of_one_model(model, tmp_path):
    """The same with other weights, even in its last tensor alone, is another one; so is an image but for a pixel."""

    def stop(done, total):
        if done == total - 4:  # the last step, which pools
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linsight.stream(model, PICTURE, scratch=tmp_path, report=stop, **ARGUMENTS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        list(other.parameters())[-1][-1] += 1
    retouched = PICTURE.clone()
    retouched[:, -1, -1] += 1
    again = {"scratch": tmp_path, "resume": True}
    one_line(LinsightError, "another model", model=other, **again)
    one_line(LinsightError, "another image", model=model, image=retouched, **again)
    assert linsight.stream(model, PICTURE, **again, **ARGUMENTS).isfinite().all()


def test_a_scratch_folder_is_of_one_run_and_keeps_what_is_not_ours(model, tmp_path):
    (tmp_path / "step-5.bin").write_text("of somebody")
    inside = []

    def report(done, total):
        if not inside:
            inside.append(done)
            one_line(LinsightError, "another run works in", model=model, scratch=tmp_path)

    linsight.stream(model, PICTURE, scratch=tmp_path, report=report, **ARGUMENTS)
    linsight.stream(model, PICTURE, scratch=tmp_path, **ARGUMENTS)
    assert inside and os.listdir(tmp_path) == ["step-5.bin"]
    (tmp_path / store.LOCK).mkdir()
    one_line(LinsightError, "nothing can be written to", model=model, scratch=tmp_path)


def test_models_of_one_channel(tmp_path):
    """Their configuration may still know of colours."""
    model = small("vit_tiny", "inline", in_chans=1, depth=1).eval()
    grey = torch.randint(0, 256, (30, 26), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).mean() for key in ("mean", "std"))
    expected = whole(model, ((grey / 255 - mean) / std)[None])[1]
    for picture in (grey, grey[None], grey[..., None]):
        close(linsight.stream(model, picture, tile=16, output="features"), expected)
    one_line(LinsightError, "mean= has 3 values", "1 channel", model=model, image=grey, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("state", ["{", "[]", '{"step": 0, "shape": [1], "prefix": null, "work": null}'])
def test_a_damaged_state_is_not_gone_on_with(model, state, tmp_path):
    (tmp_path / "stream.json").write_text(state)
    one_line(LinsightError, "stream.json", "start again", model=model, scratch=tmp_path, resume=True)


def test_a_tile_that_cannot_be_read(model, tmp_path):
    for picture in (Stopping(3, OSError("bad\nsector")), Stopping(3, ValueError("strip 7"))):
        one_line(LinsightError, "rows 16 to 30", "cannot be read", model=model, image=picture)
    one_line(LinsightError, "cannot be read", model=model, image=Stopping(3, OSError()), scratch=tmp_path, output="map")
    assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def disk_of(size):
    """While entered, no file can be larger: the system's own error, as of a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MAP = 8 * 7 * 16 * 4  # bytes of each map of the model here


def test_a_disk_that_fills(model, tmp_path):
    with disk_of(MAP - 1):
        one_line(LinsightError, "no place", "linsight-0", model=model, scratch=tmp_path)
    assert os.listdir(tmp_path) == []
    with disk_of(MAP):  # the last one has a header
        one_line(LinsightError, "no place for the final map", model=model, scratch=tmp_path, output="map")
    assert sorted(os.listdir(tmp_path)) == ["linsight-2.map", "stream.json"]
    found = linsight.stream(model, PICTURE, scratch=tmp_path, output="map", resume=True, **ARGUMENTS)
    close(found.flatten(0, 1), whole(model, PICTURE)[0])


def test_files_have_their_place_before_they_are_written(tmp_path):
    """A mapped file with holes ends the process when the disk is full."""
    store.allocate(tmp_path / "map", 2**20)
    blocks = getattr(os.stat(tmp_path / "map"), "st_blocks", None)
    if blocks is None:
        pytest.skip("this system does not tell what a file takes")
    assert blocks * 512 >= 2**20 == os.path.getsize(tmp_path / "map")


@pytest.mark.parametrize("call", [2, 4])
def test_a_disk_that_fills_or_fails_as_it_is_written(call, model, tmp_path, monkeypatch):
    """At the end of the second step, and of all: what is told of before is gone on with."""
    calls, sync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return sync(file)

    monkeypatch.setattr(os, "fsync", full)
    one_line(LinsightError, "Input/output error", model=model, scratch=tmp_path, output="map")
    step = call - 2
    assert sorted(os.listdir(tmp_path)) == [f"linsight-{step}.map", "stream.json"]
    assert json.loads((tmp_path / "stream.json").read_text())["step"] == step
    found = linsight.stream(model, PICTURE, scratch=tmp_path, output="map", resume=True, **ARGUMENTS)
    close(found.flatten(0, 1), whole(model, PICTURE)[0])


@pytest.mark.parametrize("damage", [lambda map: os.truncate(map, MAP - 1), os.remove])
def test_a_damaged_map_is_not_taken_for_whole(damage, model, tmp_path, monkeypatch):
    with disk_of(MAP):
        one_line(LinsightError, "no place", model=model, scratch=tmp_path, output="map")
    damage(tmp_path / "linsight-2.map")
    one_line(LinsightError, "linsight-2.map", "start again", model=model, scratch=tmp_path, resume=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ],
)
def test_a_tile_that_does_not_fit(error, model, monkeypatch):
    def run(self, x, tile):
        raise error

    monkeypatch.setattr(tiled.TiledBlock, "run", run)
    one_line(LinsightError, "no memory for a tile of 16 pixels", "--tile", model=model)


def test_what_does_not_fit_is_refused_before_the_start(model, tmp_path):
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**7, 10**7, 3), (0, 0, 0))
    for place, words in ((None, "memory"), (tmp_path, "disk")):
        one_line(LinsightError, words, "free", "bfloat16", model=model, image=huge, tile=10**6, scratch=place)
