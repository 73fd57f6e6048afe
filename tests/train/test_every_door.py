"""Pictures at every door of the command line: what is read, filled, left out, noted and refused."""

import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small import TINY, colours

from linsight.data.images import decode
from linsight.errors import LinsightError
from linsight.tasks import ClassifyRecipe
from linsight.train import (
    Tiling,
    Trained,
    load_trained,
    open_data,
    predict,
    predict_stream,
    resolve,
    train,
)
from linsight.train.model import build, save
from linsight.train.progress import Silent

tifffile = pytest.importorskip("tifffile")
MODEL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
PLAIN = ("--device", "cpu", "--amp", "off")


def trained(path, **more):
    recipe = ClassifyRecipe(model="vit_tiny", attention="inline", model_args=MODEL, img_size=(24, 24), **more)
    torch.manual_seed(0)
    state = build(recipe, 3).state_dict()
    state["head.weight"].normal_()
    save(path, state, recipe, {"classes": ("blue", "green", "red")})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "best.safetensors")


def picture(level=90, sides=(24, 24)):
    return Image.fromarray(np.random.default_rng(level).integers(0, 255, (*sides, 3), dtype=np.uint8))


def predicted(linsight, *arguments):
    code, out, err = linsight("predict", *arguments, "--json", *PLAIN)
    assert code == 0, err
    return json.loads(out)["predictions"], err


def test_sixteen_bits_are_the_same_in_a_folder_a_tar_and_parquet(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "folder"
    deep = {f"{name}/{i}": rng.integers(0, 65535, (8, 8), dtype=np.uint16) for name in "ab" for i in range(3)}
    for name, pixels in deep.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, arcname=".")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {
        "image": [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in deep],
        "label": [int(name[0] == "b") for name in deep],
    }
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / "train.parquet")
    expected = [np.floor(pixels / 257 + 0.5) for pixels in deep.values()]
    for place in ("folder", "all.tar", "table"):
        given = {**TINY, "data": str(tmp_path / place), "in_chans": 1, "data_dir": str(tmp_path / "cache")}
        data = open_data(resolve("digits", {**given, "mean": "", "std": "", "cache": False}))
        found = [np.asarray(decode(data.train.whole, index, "L")) for index in range(6)]
        assert all(any(np.array_equal(image, other) for other in expected) for image in found), place
        reader = getattr(data.train.whole, "reader", None)
        if hasattr(reader, "tar_state"):
            reader.tar_state.tf.close()  # timm keeps it open


def test_a_folder_of_every_kind(weights, linsight, tmp_path):
    kinds = ("png", "jpg", "webp", "bmp", "tif", "gif", "ppm", "jp2", "avif", "PNG")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, kind in enumerate(kinds):
        picture().save(folder / f"{number}.{kind}")
    for name in ("a.txt", "b.txt", "c.csv"):
        (folder / name).write_text("no picture")
    found, err = predicted(linsight, weights, folder)
    assert (
        len(found) == len(kinds) and err.count("\n") == 1 and "3 files of other kinds left out: .txt 2, .csv 1" in err
    )
    for file in folder.iterdir():
        if file.suffix not in (".txt", ".csv"):
            file.unlink()
    code, _, err = linsight("predict", weights, folder, *PLAIN)
    assert code == 2 and err.count("\n") == 1 and "no image in the folder" in err and ".txt 2" in err


def test_pixels_that_are_no_numbers(weights, linsight, tmp_path):
    pixels, file = np.asarray(picture()).astype(np.float32) / 255, tmp_path / "a.tif"
    pixels[3, 4, 2] = np.nan
    tifffile.imwrite(file, pixels, photometric="rgb")
    for more in ((), ("--stream",)):
        code, out, err = linsight("predict", weights, file, "--json", *PLAIN, *more)
        assert code == 2 and out == "" and err.count("\n") == 1, more
        assert "1 value is no number" in err and "row 3, column 4, channel 2" in err and "--fill" in err
        (filled,), err = predicted(linsight, weights, file, "--fill", "0", *more)
        assert err == "" and abs(sum(filled["probabilities"]) - 1) < 1e-5
        pixels[3, 4, 2] = 0
        tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb")
        (same,), _ = predicted(linsight, weights, tmp_path / "b.tif", *more)
        assert same["probabilities"] == filled["probabilities"]
    code, _, err = linsight("predict", weights, file, "--fill", "nan", *PLAIN)
    assert code == 2 and "fill=nan" in err and err.count("\n") == 1
    (tmp_path / "d" / "red").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        picture().save(tmp_path / "d" / "red" / name)
    (tmp_path / "d" / "red" / "1.png").write_bytes(file.read_bytes())
    for more, skipped in (((), 1), (("--fill", "0"), 0)):
        code, out, _ = linsight("eval", weights, "--data", tmp_path / "d", "--json", "--workers", "0", *PLAIN, *more)
        assert code == 0 and json.loads(out)["skipped"] == skipped
    own = trained(tmp_path / "own.safetensors", fill=0.0)  # what a run was trained with
    assert predicted(linsight, own, file)[0][0]["probabilities"]


def test_a_model_that_gives_no_numbers(weights, linsight, tmp_path):
    model = load_trained(weights)
    state = model.model.state_dict()
    state["head.bias"][0] = torch.nan
    save(tmp_path / "bad.safetensors", state, model.recipe, {"classes": model.classes})
    (tmp_path / "d" / "red").mkdir(parents=True)
    picture().save(tmp_path / "d" / "red" / "a.png")
    bad, file = tmp_path / "bad.safetensors", tmp_path / "d" / "red" / "a.png"
    for command in (
        ("predict", bad, file),
        ("predict", bad, file, file),
        ("predict", bad, file, "--stream"),
        ("eval", bad, "--data", tmp_path / "d", "--workers", "0"),
    ):
        code, out, err = linsight(*command, "--json", *PLAIN)
        assert code == 2 and out == "" and err.count("\n") == 1 and "no numbers" in err, command


def test_the_first_of_several_frames_is_said_once(weights, linsight, tmp_path):
    folder = tmp_path / "d" / "red"
    folder.mkdir(parents=True)
    for number in range(2):
        picture().save(folder / f"{number}.png", save_all=True, append_images=[picture(1)])
    said = "2 images have several frames, of which the first is read"
    for command in (("predict", weights, folder), ("eval", weights, "--data", tmp_path / "d", "--workers", "0")):
        code, _, err = linsight(*command, *PLAIN)
        assert code == 0 and err == f"linsight: {said}\n", command
    code, _, err = linsight("predict", weights, folder / "0.png", "--stream", *PLAIN)
    assert code == 0 and err == f"linsight: '{folder / '0.png'}' has several frames, of which the first is read\n"


@pytest.mark.parametrize("cache", [False, True])
def test_training_says_it_once(tmp_path, cache):
    class Kept(Silent):
        lines = []  # noqa: RUF012

        def note(self, text):
            self.lines.append(text)

    data = colours(tmp_path / "d", {"a": 4, "b": 4})
    picture().save(data / "a" / "0.png", save_all=True, append_images=[picture(1)])
    given = {"in_chans": 3, "mean": "", "std": "", "cache": cache, "val_fraction": 0.25, "batch_size": 4}
    report = Kept()
    report.lines = []
    train(resolve("digits", {**TINY, "data": str(data), **given}), out=tmp_path / "run", report=report)
    assert [line for line in report.lines if "frames" in line] == [
        "1 image has several frames, of which the first is read"
    ]


def test_models_of_four_channels(linsight, tmp_path):
    four = {"mean": (0.5,) * 4, "std": (0.5,) * 4}
    bands = np.random.default_rng(0).integers(0, 255, (24, 24, 4), dtype=np.uint8)
    Image.fromarray(bands).save(tmp_path / "a.png")
    recipe = ClassifyRecipe(
        model="vit_tiny", attention="inline", model_args=MODEL, img_size=(24, 24), in_chans=4, **four
    )
    torch.manual_seed(0)
    model = Trained(build(recipe, 3).eval(), recipe.changed(crop_pct=1.0), tuple("abc"), tmp_path)
    where = {"device": "cpu", "amp": "off"}
    (whole,), _ = predict(model, [tmp_path / "a.png"], **where)
    (stream,), _ = predict_stream(model, [tmp_path / "a.png"], Tiling(**where))
    assert whole.probabilities == pytest.approx(stream.probabilities, abs=1e-6)
    picture().save(tmp_path / "b.png")
    with pytest.raises(LinsightError, match="has 3 channels a pixel, and the model takes 4"):
        predict(model, [tmp_path / "b.png"], **where)
    with pytest.raises(LinsightError, match=r"in_chans .6.: known: 1, 3, 4"):
        recipe.changed(in_chans=6, mean=(0.5,) * 6, std=(0.5,) * 6)


def test_levels(weights, linsight, tmp_path):
    file, full = tmp_path / "a.tif", np.asarray(picture(sides=(96, 96)))
    with tifffile.TiffWriter(file) as writer:
        writer.write(full, photometric="rgb", tile=(16, 16), subifds=1, resolution=(20000, 20000), resolutionunit=3)
        writer.write(full[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1)
    Image.fromarray(full[::2, ::2]).save(tmp_path / "half.png")
    (half,), _ = predicted(linsight, weights, tmp_path / "half.png", "--stream")
    for more in (("--level", "1"), ("--mpp", "1")):
        (found,), _ = predicted(linsight, weights, file, "--stream", *more)
        assert found["probabilities"] == pytest.approx(half["probabilities"], abs=1e-6)
        code, _, err = linsight("predict", weights, file, *more)
        assert code == 2 and f"{more[0]} goes with --stream" in err
    for more, word in (
        ((file, "--level", "2"), "0: 96 x 96 at 0.5 microns a pixel; 1: 48 x 48 at 1"),
        ((file, "--mpp", "4"), "no level near 4"),
        ((file, "--mpp", "1", "--level", "1"), "give one of them"),
        ((tmp_path / "half.png", "--level", "1"), "no level 1"),
        ((tmp_path / "half.png", "--mpp", "1"), "does not say its microns"),
    ):
        code, out, err = linsight("predict", weights, "--stream", *more, *PLAIN)
        assert code == 2 and out == "" and word in err and err.count("\n") == 1, err


def test_pictures_that_are_too_large_to_read_whole(weights, linsight, tmp_path, monkeypatch):
    picture(sides=(40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    code, _, err = linsight("predict", weights, tmp_path / "a.png", *PLAIN)
    assert code == 2 and "40 x 40" in err and "predict --stream" in err and err.count("\n") == 1
    predicted(linsight, weights, tmp_path / "a.png", "--stream")
    (tmp_path / "b.ppm").write_bytes(b"P5 30000 30000 255\n")
    monkeypatch.setattr("linsight.runtime.memory.SOURCES", {"RLIMIT_AS": lambda root: [10**6]})
    code, _, err = linsight("predict", weights, tmp_path / "b.ppm", "--stream", *PLAIN)
    assert code == 2 and "needs 0.9 GB" in err and "tiled TIFF" in err and err.count("\n") == 1
