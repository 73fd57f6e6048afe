"""`linsight predict --out`: each image once, in order, whatever the places, the processes, and what ends them."""

import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from linsight.errors import LinsightError
from linsight.runtime.launch import Copy, this_copy
from linsight.tasks import ClassifyRecipe
from linsight.train import load_trained, merge_predictions, predict, predict_to
from linsight.train.model import build, save
from linsight.train.progress import ImageBar, ImageLines, Images

MODEL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
PLAIN = {"device": "cpu", "amp": "off", "workers": 0}
OPTIONS = ("--device", "cpu", "--amp", "off", "--workers", "0")


def weights_of(path, seed=0, classes=("blue", "green", "red")):
    recipe = ClassifyRecipe(model="vit_tiny", attention="inline", model_args=MODEL, img_size=(8, 8))
    torch.manual_seed(seed)
    model = build(recipe, 3)
    model.head.weight.data.normal_()
    save(path, model.state_dict(), recipe, {"classes": classes})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return weights_of(tmp_path_factory.mktemp("run") / "best.safetensors")


@pytest.fixture(scope="module")
def trained(weights):
    return load_trained(weights)


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 7, 3), dtype=np.uint8))


def png(number):
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


def folder_of(path, count, first=0):
    path.mkdir(parents=True)
    for number in range(first, first + count):
        (path / f"{number}.png").write_bytes(png(number))
    return path


def tar_of(path, numbers, tail=b""):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            member = tarfile.TarInfo(f"x/{number}.png")
            member.size = len(png(number))
            tar.addfile(member, io.BytesIO(png(number)))
            label = tarfile.TarInfo(f"x/{number}.cls")
            tar.addfile(label, io.BytesIO())
    path.write_bytes(path.read_bytes() + tail)
    return path


def table_of(path, numbers, groups=2):
    cells = [{"bytes": png(number), "path": None} for number in numbers]
    parquet.write_table(pa.table({"image": cells, "n": list(numbers)}), path, row_group_size=groups)
    return path


@pytest.fixture
def truth(trained, tmp_path):
    """The probabilities of each picture, by its number, as `predict` has them."""
    folder = folder_of(tmp_path / "truth", 40)
    found, bad = predict(trained, [folder], device="cpu", amp="off")
    assert not bad
    return {int(pathlib.Path(row.file).stem): row for row in found}


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same(row, expected):
    names = [row["class"], *(row[f"class_{rank}"] for rank in (2, 3))]
    values = [float(row["probability"]), *(float(row[f"probability_{rank}"]) for rank in (2, 3))]
    return row["error"] == "" and names == list(expected.classes) and np.allclose(values, expected.probabilities, 1e-5)


def test_all_kinds_of_places_in_any_mixture(trained, truth, linsight, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "pics", 3)
    (tmp_path / "pics" / "notes.txt").write_text("no picture")
    for number in range(9, 12):
        tar_of(tmp_path / f"s-{number:02}.tar", range(number, number + 2))
    with zipfile.ZipFile("z.zip", "w") as file:
        file.writestr("a/15.png", png(15))
        file.writestr("__MACOSX/a/15.png", b"")
    (tmp_path / "tables").mkdir()
    table_of(tmp_path / "tables" / "train.parquet", range(20, 25))
    parquet.write_table(pa.table({"img": [png(26), png(27)]}), "plain.parquet")
    (tmp_path / "one.png").write_bytes(png(30))
    places = ["pics", "s-{09..11}.tar", "one.png", "z.zip", "tables", "*.parquet", "pics/1.png", "./s-09.tar"]
    code, out, err = linsight("predict", weights, *places, "--out", "new/o.csv", "--batch-size", "2", *OPTIONS)
    rows = rows_of("new/o.csv")
    expected = [(f"pics/{n}.png", n) for n in range(3)]
    expected += [(f"s-{s:02}.tar!x/{n}.png", n) for s in (9, 10, 11) for n in (s, s + 1)]
    expected += [("one.png", 30), ("z.zip!a/15.png", 15)]
    expected += [(f"tables/train.parquet!{row}", 20 + row) for row in range(5)]
    expected += [("plain.parquet!0", 26), ("plain.parquet!1", 27)]
    assert code == 0 and [row["file"] for row in rows] == [name for name, _ in expected]
    assert all(same(row, truth[number]) for row, (_, number) in zip(rows, expected, strict=True))
    assert "2 images and files given more than once: taken once" in err and ".txt 1" in err and ".cls 2" in err
    assert "18" in out and os.listdir("new/o.csv.parts") == ["plan.json"]
    (tmp_path / "packed").mkdir()
    for name in ("s-10.tar", "s-09.tar", "plain.parquet"):
        os.rename(name, tmp_path / "packed" / name)
    for predicted in (6, 0):  # the result, and its parts, are none of the data
        assert predict_to(trained, ["packed"], "packed/o.parquet", **PLAIN).predicted == predicted
    for shard in ((1, 2), (2, 2), (1, 2)):
        places = [*(tmp_path / "pics").glob("*.png"), *(tmp_path / "pics").glob("p.csv*")]
        done = predict_to(trained, sorted(places), tmp_path / "pics" / "p.csv", batch_size=1, shard=shard, **PLAIN)
        assert (done.images, done.left) == (3, 1 if shard == (1, 2) and done.predicted else 0)


def test_the_kinds_of_files_say_the_same(trained, tmp_path):
    folder = folder_of(tmp_path / "pics", 5)
    (folder / "3.png").write_bytes(b"nothing")
    for kind in ("csv", "jsonl", "parquet"):
        done = predict_to(trained, [folder], tmp_path / f"o.{kind}", top=2, **PLAIN)
        assert (done.images, done.predicted, done.errors, done.left) == (5, 5, 1, 0)
        assert done.unread == (f"{folder}/3.png: not an image",)
    table = parquet.read_table(tmp_path / "o.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    rows = rows_of(tmp_path / "o.csv")
    for row, line, cells in zip(rows, lines, table, strict=True):
        assert line["file"] == cells["file"] == row["file"]
        assert line["classes"] == cells["classes"] and line["error"] == cells["error"] == (row["error"] or None)
        if line["error"]:
            assert line["class"] is None and row["class"] == "" and row["probability_2"] == ""
            continue
        assert line["classes"] == [row["class"], row["class_2"]] and line["class"] == cells["class"] == row["class"]
        assert np.float32(line["probabilities"]).tolist() == cells["probabilities"]
        assert [float(row["probability"]), float(row["probability_2"])] == line["probabilities"]
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2", "error"]


def test_logits_and_features(trained, tmp_path):
    folder = folder_of(tmp_path / "pics", 3)
    (folder / "1.png").write_bytes(b"")
    for kind in ("jsonl", "parquet"):
        predict_to(trained, [folder], tmp_path / f"o.{kind}", logits=True, features=True, **PLAIN)
    predict_to(trained, [folder], tmp_path / "plain.jsonl", **PLAIN)
    table = parquet.read_table(tmp_path / "o.parquet").to_pylist()
    for row, line, plain in zip(
        table,
        *(map(json.loads, (tmp_path / f"{n}.jsonl").read_text().splitlines()) for n in ("o", "plain")),
        strict=True,
    ):
        assert [np.float32(line[name] or 0).tolist() for name in ("logits", "features")] == [
            np.float32(row[name] or 0).tolist() for name in ("logits", "features")
        ]
        if row["error"]:
            assert row["logits"] is None
            continue
        logits, features = (torch.tensor(row[name]) for name in ("logits", "features"))
        assert torch.allclose(logits.softmax(0).sort(descending=True)[0], torch.tensor(row["probabilities"]), atol=1e-6)
        assert features.shape == (16,) and torch.allclose(trained.model.head(features), logits, atol=1e-5)
        assert np.allclose(line["probabilities"], plain["probabilities"], atol=1e-6)
    with pytest.raises(LinsightError, match=r"a .csv has no place for logits"):
        predict_to(trained, [folder], tmp_path / "o.csv", logits=True, **PLAIN)


def test_names_that_a_table_could_take_for_something_else(tmp_path, monkeypatch):
    classes = ("=1+1", "-1", 'a,b\n"c"')
    trained = load_trained(weights_of(tmp_path / "w.safetensors", classes=classes))
    monkeypatch.chdir(tmp_path)
    names = ["=cmd|' C calc'!A0.png", "a,b.png", 'a"b.png', "a\nb.png", "猫.png", "-1.png", b"\xff.png"]
    for name in names:
        pathlib.Path(os.fsdecode(name)).write_bytes(png(0))
    files = [os.fsdecode(name) for name in names]
    for kind in ("csv", "jsonl", "parquet"):
        predict_to(trained, files, f"o.{kind}", **PLAIN)
    written = [*files[:-1], "\\udcff.png"]
    assert [json.loads(line)["file"] for line in pathlib.Path("o.jsonl").read_text("utf-8").splitlines()] == written
    assert parquet.read_table("o.parquet")["file"].to_pylist() == written
    rows = rows_of("o.csv")
    assert [row["file"] for row in rows] == [f"./{name}" if name[0] in "=-" else name for name in written]
    assert {rows[0]["class"], rows[0]["class_2"], rows[0]["class_3"]} == {"'=1+1", "-1", 'a,b\n"c"'}
    assert set(json.loads(pathlib.Path("o.jsonl").read_text("utf-8").splitlines()[0])["classes"]) == set(classes)


def test_damaged_archives_and_tables_are_used_as_far_as_they_go(trained, truth, weights, linsight, tmp_path):
    whole = tar_of(tmp_path / "a.tar", range(4)).read_bytes()
    places = [1 + whole.index(f"x/{number}.png".encode()) // 512 for number in range(4)]
    (tmp_path / "a.tar").write_bytes(whole[: 512 * places[2] + 40])  # ends in the third image
    table_of(tmp_path / "t.parquet", range(10, 16))
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    group = parquet.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    (tmp_path / "t.parquet").write_bytes(content)
    code, out, err = linsight(
        "predict", weights, tmp_path / "a.tar", tmp_path / "t.parquet", "--out", tmp_path / "o.csv", *OPTIONS
    )
    rows = rows_of(tmp_path / "o.csv")
    good = [0, 1, None, 10, 11, None, None, 14, 15]
    assert code == 0 and len(rows) == len(good) and "3 of them with an error" in out
    for row, number in zip(rows, good, strict=True):
        assert row["error"] != "" if number is None else same(row, truth[number])
    assert "a.tar': unexpected end of data; what lies before is predicted" in err and "not read: " in err
    for place in ("a.tar", "t.parquet"):
        options = ("--out", tmp_path / "p.csv", "--on-bad-image", "refuse")
        code, _, err = linsight("predict", weights, tmp_path / place, *options, *OPTIONS)
        assert code == 2 and place in err.splitlines()[-1] and not (tmp_path / "p.csv").exists()
    for name in ("b.tar", "b.zip", "b.parquet"):
        (tmp_path / name).write_bytes(b"<html>" * 200)
        code, _, err = linsight("predict", weights, tmp_path / name, "--out", tmp_path / "p.csv", *OPTIONS)
        assert code == 2 and err.count("\n") == 1 and f"{name}' is no readable" in err


def test_values_that_are_no_numbers(trained, tmp_path):
    folder = folder_of(tmp_path / "pics", 8)

    class Odd(torch.nn.Module):
        pretrained_cfg = trained.model.pretrained_cfg

        def __init__(self, share):
            super().__init__()
            self.model, self.share = trained.model, share

        def forward(self, x):
            y = self.model(x)
            return torch.where(torch.arange(len(x))[:, None] < len(x) * self.share, y / 0, y)

    predict_to(dataclasses.replace(trained, model=Odd(0.5)), [folder], tmp_path / "a.csv", batch_size=4, **PLAIN)
    errors = [row["error"] for row in rows_of(tmp_path / "a.csv")]
    assert errors == 2 * (2 * ["the model gives values that are no numbers"] + ["", ""])
    with pytest.raises(LinsightError, match=r"no numbers for '.*/0.png' and 3 more"):  # no image at all: the weights
        predict_to(dataclasses.replace(trained, model=Odd(1)), [folder], tmp_path / "b.csv", batch_size=4, **PLAIN)
    assert not (tmp_path / "b.csv").exists()


def test_a_model_without_weights_is_known_by_its_file(trained, tmp_path):
    """As an exported one, which is a file and a module that shows nothing of it."""

    class Exported(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    folder, file = folder_of(tmp_path / "pics", 3), tmp_path / "model.onnx"
    model = dataclasses.replace(trained, model=Exported(), path=file)
    for content, refused in ((b"one", False), (b"two", True)):
        file.write_bytes(content)
        if refused:
            with pytest.raises(LinsightError, match=r"of another prediction \(weights: "):
                predict_to(model, [folder], tmp_path / "o.csv", **PLAIN)
        else:
            predict_to(model, [folder], tmp_path / "o.csv", **PLAIN)
    assert [row["error"] for row in rows_of(tmp_path / "o.csv")] == ["", "", ""]
    with pytest.raises(LinsightError, match="gives classes, and no features"):
        predict_to(model, [folder], tmp_path / "o.jsonl", features=True, **PLAIN)


def test_what_cannot_be_is_one_line(weights, linsight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "pics", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    parquet.write_table(pa.table({"n": [1]}), "n.parquet")
    os.mkfifo("pipe")
    with zipfile.ZipFile("no.zip", "w") as file:
        file.writestr("a.txt", "no picture")
    cases = [
        (("pics", "--out", "o.npy"), "add --stream and --output"),
        (("pics", "--out", "o.txt"), "'o.txt' has to end in .csv, .jsonl, .parquet"),
        (("pics", "--out", "there.csv"), "'there.csv' exists: give another --out"),
        (("pics", "--out", "pics/0.png/o.csv"), "is a file: give a folder"),
        (("pics", "--out", "o.csv", "--shard", "0/2"), "counted from 1/2 to 2/2"),
        (("pics", "--out", "o.csv", "--shard", "3/2"), "counted from 1/2 to 2/2"),
        (("pics", "--out", "o.csv", "--shard", "half"), "not of the form 1/4"),
        (("pics", "--out", "o.csv", "--tile", "8"), "--tile goes with --stream"),
        (("pics", "--out", "o.csv", "--features"), "a .csv has no place for features"),
        (("pics", "--shard", "1/2"), "--shard goes with --out FILE.csv"),
        (("pics/0.png", "--stream", "--features", "--out", "o.npy"), "--features goes with --out FILE.csv"),
        (("pics/0.png", "--batch-size", "4"), "--batch-size goes with --out FILE.csv"),
        (("s-{0..3}.tar", "--out", "o.csv"), "no such image, folder or archive: 's-0.tar'"),
        (("*.jpg", "--out", "o.csv"), "no such image, folder or archive: '*.jpg'"),
        (("empty", "--out", "o.csv"), "no image in the folder 'empty'"),
        (("pipe", "--out", "o.csv"), "is no file and no folder"),
        (("n.parquet", "--out", "o.csv"), "say which to use with image_key="),
        (("n.parquet", "--out", "o.csv", "--image-key", "m"), "unknown column of 'n.parquet' 'm'"),
        (("no.zip", "--out", "o.csv"), "no image in 'no.zip' (in 'no.zip': 1 file of another kind left out: .txt 1)"),
        (("n.parquet",), "name a file for what is found, --out FILE.csv"),
    ]
    for arguments, message in cases:
        code, out, err = linsight("predict", weights, *arguments, "--device", "cpu")
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", (arguments, err)
    assert (tmp_path / "there.csv").read_text() == "mine" and not list(tmp_path.glob("*.parts"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = linsight("predict", weights, "pics")
    assert code == 2 and "2 copies would say the same" in err


def test_only_the_same_prediction_goes_on(weights, trained, linsight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "pics", 6)
    other = weights_of(tmp_path / "other.safetensors", seed=1)
    command = ("pics", "--out", "o.csv", "--batch-size", "2", *OPTIONS)
    write = os.replace

    def full(source, target):
        if "part-000002" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, out, err = linsight("predict", weights, *command)
    assert code == 2 and "part-000002" in err and "No space left" in err and err.count("\n") == 1
    assert len(list((tmp_path / "o.csv.parts").glob("*"))) == 3 and not (tmp_path / "o.csv").exists()  # with the plan
    for more, word in (
        ((other, *command), "weights: "),
        ((weights, *command, "--top", "1"), "top: 1 now, 3 before"),
        ((weights, *command, "--img-size", "12"), "size of images: 12x12 now, 8x8 before"),
        ((weights, "pics/1.png", *command), "2. 'pics': 5 images"),
    ):
        code, _, err = linsight("predict", *more)
        assert code == 2 and "'o.csv.parts' has parts of another prediction (" in err and "remove that folder" in err
        assert word in err or "1. 'pics/1.png': 1 image" in err
    about = os.stat("pics/5.png")
    os.utime("pics/5.png", (about.st_atime, about.st_mtime + 5))
    code, _, err = linsight("predict", weights, *command)
    assert code == 2 and "1. 'pics': its files were written anew since" in err
    os.utime("pics/5.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    code, out, err = linsight("predict", weights, *command)
    assert code == 0 and "going on: 4 of 6 images are done" in err and len(rows_of("o.csv")) == 6
    content = (tmp_path / "o.csv").read_bytes()
    code, out, err = linsight("predict", weights, *command, "--json")
    assert code == 0 and "'o.csv' is finished" in err and json.loads(out)["predicted"] == 0
    code, _, err = linsight("predict", other, *command)
    assert code == 2 and "'o.csv' exists, of another prediction (weights: " in err
    assert (tmp_path / "o.csv").read_bytes() == content
    (tmp_path / "o.csv").write_text("edited")
    code, _, err = linsight("predict", weights, *command)
    assert code == 2 and "is not what this command wrote" in err
    (tmp_path / "o.csv").unlink()
    assert predict_to(load_trained(other), ["pics"], "o.csv", **PLAIN).errors == 0  # nothing is lost by it
    pathlib.Path("o.csv.parts/plan.json").write_text("{")
    code, _, err = linsight("predict", weights, *command)
    assert code == 2 and "cannot be read: remove 'o.csv.parts'" in err


def test_a_damaged_part_is_made_anew(trained, tmp_path):
    folder = folder_of(tmp_path / "pics", 4)
    given = {**PLAIN, "batch_size": 1}
    predict_to(trained, [folder], tmp_path / "o.csv", shard=(1, 2), **given)
    first = next((tmp_path / "o.csv.parts").glob("part-000000*"))
    first.write_bytes(first.read_bytes()[:10])  # as after a power cut
    first.with_name(first.name.replace("000000", "a")).write_text("of somebody else")
    with pytest.raises(
        LinsightError, match=r"part-000000.* was damaged and is removed: the same command predicts it again"
    ):
        predict_to(trained, [folder], tmp_path / "o.csv", shard=(2, 2), **given)
    assert not (tmp_path / "o.csv").exists()
    predict_to(trained, [folder], tmp_path / "o.csv", **given)
    assert len(rows_of(tmp_path / "o.csv")) == 4


def test_shards_of_one_disk_and_of_several(weights, trained, linsight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "pics", 10)
    predict_to(trained, ["pics"], "whole.csv", batch_size=2, **PLAIN)
    options = ("--batch-size", "2", *OPTIONS)
    for shard in ("1/3", "3/3", "2/3"):
        code, _, err = linsight("predict", weights, "pics", "--out", "one.csv", "--shard", shard, *options)
        assert code == 0 and ("other shards have the rest" in err) == (shard != "2/3")
    for shard in ("1/3", "2/3", "3/3"):
        linsight("predict", weights, "pics", "--out", f"m{shard[0]}/o.jsonl", "--shard", shard, *options)
        for file in (tmp_path / "pics").iterdir():
            os.utime(file)  # other machines, other times
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "whole.csv").read_text()
    code, _, err = linsight("merge", "all.csv", "m1/o.jsonl.parts", "m2/o.jsonl.parts")
    assert code == 2 and "1 of 5 parts missing, first images 5 to 6" in err and not (tmp_path / "all.csv").exists()
    folders = [f"m{number}/o.jsonl.parts" for number in (3, 1, 2)]
    code, _, err = linsight("merge", "all.csv", *folders)
    assert code == 0 and err == "" and (tmp_path / "all.csv").read_text() == (tmp_path / "whole.csv").read_text()
    code, _, err = linsight("merge", "all.csv", *folders)
    assert code == 2 and "'all.csv' exists" in err
    predict_to(trained, ["pics"], "m4/o.csv", batch_size=2, top=1, shard=(1, 3), **PLAIN)
    predict_to(trained, ["pics"], "m5/o.csv", batch_size=5, shard=(1, 2), **PLAIN)
    for more, word in (
        (("m1/o.jsonl.parts", "m4/o.csv.parts"), "is of another prediction than 'm1/o.jsonl.parts' (top: 1 now"),
        (("m1/o.jsonl.parts", "m5/o.csv.parts"), "parts of different --batch-size"),
        (("pics",), "'pics' is no folder of parts"),
        ((), "'new.csv.parts' is no folder of parts"),
    ):
        code, _, err = linsight("merge", "new.csv", *more)
        assert code == 2 and word in err and err.count("\n") == 1
    assert merge_predictions("m5/p.csv", ["m1/o.jsonl.parts", "m2/o.jsonl.parts", "m3/o.jsonl.parts"]) == (10, 0)


def test_killed_and_shared_predictions_have_each_image_once(weights, tmp_path):
    folder_of(tmp_path / "images", 160)
    (tmp_path / "images" / "7.png").write_bytes(b"bad")
    (tmp_path / "best.safetensors").write_bytes(weights.read_bytes())
    script = pathlib.Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = list(csv.DictReader(io.StringIO(found["whole"])))
    assert [row["file"] for row in rows] == [f"{tmp_path}/images/{number}.png" for number in range(160)]
    assert [row["error"] for row in rows if row["error"]] == ["not an image"]
    assert found["killed"] == found["whole"] and [code for code, *_ in found["kills"]] == 6 * [-signal.SIGKILL]
    parts = [count for _, count, _ in found["kills"]]
    assert parts == sorted(parts) and parts[-1] > 0  # what was done is kept
    assert (
        len(found["died"]) > 10 and found["died"][-1][0] == 0 and all(text == found["few"] for _, text in found["died"])
    )
    assert found["first"] == [0, -signal.SIGKILL, False] and found["ranks"] == [0, 0]
    assert found["shared"] == found["whole"]


def test_a_signal_keeps_what_is_done(weights, linsight, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "pics", 6)
    command = ("predict", weights, folder, "--out", tmp_path / "o.csv", "--batch-size", "2", *OPTIONS)
    step = Images.step

    def stop(report, images):
        step(report, images)
        if report.done == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ImageLines, "step", stop)
        code, out, err = linsight(*command)
    assert code == 143 and out == "" and err.count("\n") == 1
    assert "stopped: 2 of 6 images are done; go on with the same command" in err
    code, _, err = linsight(*command)
    assert code == 0 and "going on: 2 of 6" in err and len(rows_of(tmp_path / "o.csv")) == 6


def test_a_second_run_of_a_share_is_refused(trained, tmp_path):
    folder = folder_of(tmp_path / "pics", 4)

    class Twice(Images):
        def step(self, images):
            with pytest.raises(LinsightError, match="another run works in"):
                predict_to(trained, [folder], tmp_path / "o.csv", **PLAIN)

    assert predict_to(trained, [folder], tmp_path / "o.csv", report=Twice(), **PLAIN).errors == 0


def test_copies_are_known_by_what_launchers_set():
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for given, expected in (
        ({"RANK": "3", "WORLD_SIZE": "4", **local}, Copy(3, 4, 1, 2)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, Copy(1, 2, 0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Copy()),  # a job, before srun
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Copy(1, 2, 1, 1)),
        ({"RANK": "5", "WORLD_SIZE": "2"}, Copy()),
        ({"WORLD_SIZE": "2"}, Copy()),
        ({}, Copy()),
    ):
        assert this_copy(given) == expected


def test_reporters_tell_speed_and_rest(monkeypatch):
    monkeypatch.setattr(ImageLines, "every", 0.0)
    for kind in (ImageLines, ImageBar):
        file = io.StringIO()
        report = kind(Console(file=file, force_terminal=kind is ImageBar, width=120))
        report.begin(40, 100)
        report.step(20)
        report.end()
        assert "60 of 100 images, " in file.getvalue() or "60/100" in file.getvalue()
        assert "images/s, about 0:00 left" in file.getvalue()


@pytest.mark.full
def test_torchrun(weights, tmp_path):
    folder_of(tmp_path / "pics", 20)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "linsight.cli", "predict"]
    command += [weights, tmp_path / "pics", "--out", tmp_path / "o.csv", "--batch-size", "2", *OPTIONS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    assert [row["file"] for row in rows_of(tmp_path / "o.csv")] == [f"{tmp_path}/pics/{n}.png" for n in range(20)]
    assert done.stdout.count("images") == 2  # one copy tells: the count and the speed
