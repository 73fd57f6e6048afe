"""`linsight export`, and what it wrote in `predict` and `eval`."""

import contextlib
import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from linsight import load_run
from linsight.export import export_onnx, export_program, load_exported, open_exported, verify
from linsight.export import onnx as room
from linsight.train import load_trained, predict


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """All forms of one run, as the command writes them, and its report."""
    from typer.testing import CliRunner

    from linsight.cli.app import app

    folder = tmp_path_factory.mktemp("exported")
    names = {"onnx": "m.onnx", "program": "m.pt2", "safetensors": "m.safetensors"}
    options = [word for form, name in names.items() for word in (f"--{form}", str(folder / name))]
    done = CliRunner().invoke(app, ["export", str(run), *options, "--json"], catch_exceptions=False)
    assert sorted(os.listdir(folder)) == sorted(names.values())
    return {form: folder / name for form, name in names.items()}, json.loads(done.stdout)


@pytest.fixture(scope="module")
def pixels(run, tmp_path_factory):
    from typer.testing import CliRunner

    from linsight.cli.app import app

    path = tmp_path_factory.mktemp("pixels") / "p.onnx"
    CliRunner().invoke(app, ["export", str(run), "--onnx", str(path), "--preprocess"], catch_exceptions=False)
    return path


def one_line(done, told, code=2):
    found, out, err = done
    assert (found, out) == (code, "") and told in err and err.startswith("linsight: ") and err.count("\n") == 1, done


def test_the_report_tells_what_was_checked(files):
    for row in files[1]:
        assert row["error"] <= row["limit"] == 1e-4 and len(row["checks"]) == 3 and row["bytes"] > 1000
        assert [check["shape"][0] for check in row["checks"]] == [1, 3, 2] and row["img_size"] == [16, 16]
    assert [row["form"] for row in files[1]] == ["ONNX, opset 20", "torch.export", "safetensors"]
    facts = open_exported(files[0]["onnx"]).facts
    assert facts.classes == ("blue", "green", "red $1") and facts.mean == (0.4, 0.5, 0.6) and facts.run
    assert facts.recipe["attention"] == "linear" and facts.input_size == (3, 16, 16)


@pytest.mark.parametrize("form", ["onnx", "program", "safetensors"])
def test_predictions_are_those_of_the_run(files, run, data, linsight, form):
    images = [data / "blue" / "0.png", data / "red $1" / "3.png"]
    wanted = json.loads(linsight("predict", run, *images, "--json", "--amp", "off")[1])
    code, out, err = linsight("predict", files[0][form], *images, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    for mine, theirs in zip(found["predictions"], wanted["predictions"], strict=True):
        assert mine["file"] == theirs["file"] and mine["classes"] == theirs["classes"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


@pytest.mark.parametrize("form", ["onnx", "program"])
def test_an_evaluation_is_that_of_the_run(files, run, data, linsight, form):
    options = ["--data", data, "--workers", "0", "--json"]
    wanted = json.loads(linsight("eval", run, *options, "--amp", "off")[1])
    found = json.loads(linsight("eval", files[0][form], *options)[1])
    assert (found["top1"], found["images"]) == (wanted["top1"], wanted["images"])
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert (found["device"], found["precision"]) == ("cpu", "float32")


def test_a_file_with_its_preparation_takes_images_of_any_size(pixels, run, data, linsight, tmp_path):
    images = sorted(data.rglob("*.png"))[::5]
    wanted, _ = predict(load_trained(run), images, device="cpu", amp="off")
    found, _ = predict(load_exported(pixels), images)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.classes == theirs.classes
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=5e-3)
    scores = json.loads(linsight("eval", pixels, "--data", data, "--workers", "0", "--json")[1])
    theirs = json.loads(linsight("eval", run, "--data", data, "--workers", "0", "--json", "--amp", "off")[1])
    assert scores["top1"] == theirs["top1"] and scores["loss"] == pytest.approx(theirs["loss"], abs=5e-3)
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "dot.png")
    assert linsight("predict", pixels, tmp_path / "dot.png")[0] == 0
    one_line(linsight("predict", pixels, images[0], "--img-size", "32"), "takes no --img-size")
    opened = open_exported(pixels)
    assert (opened.facts.pixels, opened.facts.inputs, opened.facts.outputs) == (True, ("pixels",), ("probabilities",))
    batch = torch.randint(0, 256, (3, 40, 9, 3), dtype=torch.uint8)
    torch.testing.assert_close(opened.model(batch).sum(-1), torch.ones(3))


def test_many_images_go_through_a_file_with_its_preparation(pixels, data, linsight, tmp_path):
    """Each in its own size: they make no batch."""
    images = sorted(data.rglob("*.png"))[::9]
    table = tmp_path / "found.jsonl"
    code, _, error = linsight("predict", pixels, *images, "--out", table, "--top", "1", "--workers", "0")
    assert code == 0, error
    wanted, _ = predict(load_exported(pixels), images)
    for line, one in zip(table.read_text().splitlines(), wanted, strict=True):
        row = json.loads(line)
        assert (row["file"], row["class"], row["error"]) == (one.file, one.classes[0], None)
        assert row["probability"] == pytest.approx(one.probabilities[0], abs=1e-6)
    one_line(
        linsight("predict", pixels, images[0], "--img-size", "32", "--out", tmp_path / "x.csv"), "takes no --img-size"
    )


def test_sizes_stay_free(files, data, linsight):
    image = data / "blue" / "0.png"
    assert linsight("predict", files[0]["onnx"], image, "--img-size", "24,32")[0] == 0


def test_weights_are_a_run_again(files, run):
    mine, theirs = load_run(files[0]["safetensors"]), load_run(run)
    assert (mine.classes, mine.img_size, mine.mean, mine.summary) == (theirs.classes, (16, 16), theirs.mean, {})
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(mine.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "say what to export to: --onnx FILE"),
        (["--onnx", "{0}/m.bin"], "the name must end with .onnx"),
        (["--program", "{0}/m.pt2", "--compiled", "{0}/m.pt2"], "two files cannot both be"),
        (["--onnx", "{0}/none/m.onnx"], "there is no folder"),
        (["--onnx", "{0}/folder.onnx"], "is a folder: give the name of a file"),
        (["--onnx", "{0}/file/m.onnx"], "is a file: give a folder"),
        (["--onnx", "{0}/pipe.onnx"], "is no file of a disk"),
        (["--safetensors", "{0}/m.safetensors", "--opset", "18"], "--opset goes with --onnx"),
        (["--onnx", "{0}/m.onnx", "--random"], "--random goes with the name of a model"),
        (["--onnx", "{0}/m.onnx", "--random", "--checkpoint", "x"], "give one of them"),
        (["--onnx", "{0}/m.onnx", "--img-size", "1,2,3"], "img_size takes 1 or 2 numbers"),
        (["--onnx", "{0}/m.onnx", "--img-size", "0"], "img_size=0 is out of range"),
        (["--onnx", "{0}/m.onnx", "--checkpoint", "x"], "did you mean"),
    ],
)
def test_mistakes_cost_one_line(run, tmp_path, linsight, options, told):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.onnx")
    before = sorted(tmp_path.iterdir())
    done = linsight("export", run, *(option.format(tmp_path) for option in options))
    if told == "did you mean":
        assert done[0] == 2 and done[2].count("\n") == 1
    else:
        one_line(done, told)
    assert sorted(tmp_path.iterdir()) == before


def test_other_sources_cost_one_line(run, files, tmp_path, linsight):
    path = tmp_path / "m.onnx"
    one_line(linsight("export", "deit_tiny_patch16_224", "--onnx", path), "--random exports it untrained")
    one_line(linsight("export", files[0]["onnx"], "--onnx", path), "is an exported file: export the run")
    one_line(linsight("export", tmp_path / "none", "--onnx", path), "no such run folder or weights")
    weights = run / "best.safetensors"
    before = weights.read_bytes()
    one_line(linsight("export", run, "--safetensors", weights, "--half"), "is what is exported: give another name")
    assert weights.read_bytes() == before and not path.exists()


def test_options_that_exported_files_have_no_use_for(files, data, linsight):
    file, image = files[0]["onnx"], data / "blue" / "0.png"
    for options, told in (
        (["--stream"], "--stream does not go with an exported file"),
        (["--checkpoint", "x"], "--checkpoint does not go with"),
        (["--device", "meta"], "run on the CPU"),
        (["--amp", "bf16"], "in their own precision"),
    ):
        one_line(linsight("predict", file, image, *options), told)
    one_line(linsight("eval", file, "--budget", "all"), "--budget does not go with")
    one_line(linsight("eval", file), "say what to evaluate on with --data")


def test_a_file_that_answers_otherwise_is_not_kept(small, facts, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")

    class Off(room.OnnxModel):
        def forward(self, x):
            return super().forward(x) + (x.shape[-1] == 9) * 0.1

    monkeypatch.setattr(room, "OnnxModel", Off)
    with pytest.raises(ValueError, match=r"answers 2x3x19x9 otherwise than the model, off by .*: refused; --static"):
        export_onnx(small, path, facts=facts)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def full_disk():
    """While entered, no file can be larger than 1000 bytes: the system's own error, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["program", "safetensors"])
def test_a_full_disk_leaves_what_was_there(run, tmp_path, linsight, form):
    path = tmp_path / f"m.{'pt2' if form == 'program' else form}"
    path.write_bytes(b"before")
    with full_disk():
        done = linsight("export", run, f"--{form}", path)
    one_line(done, f"'{path}' cannot be written: ")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("large", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_full_disk_leaves_no_part_of_an_onnx_file(small, facts, tmp_path, monkeypatch, large):
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(room, "LARGE", 10 if large else 10**9)
    with full_disk(), pytest.raises(ValueError, match=f"'{path}' cannot be written: "):
        export_onnx(small, path, facts=facts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_what_was_there(run, tmp_path, linsight, monkeypatch, number):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr("linsight.export.trace.compare", lambda *given, **more: signal.raise_signal(number))
    code, _, err = linsight("export", run, "--safetensors", path)
    assert (code, err) == (128 + number, "linsight: stopped\n")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_unseen_sizes_are_other_sizes():
    shapes = verify.unseen(2, (16, 16))
    assert len({shape[0] for shape in shapes}) == 3 and all(16 not in shape[1:] or shape[1] != 16 for shape in shapes)


@pytest.mark.full
def test_static_half_and_compiled_files(run, tmp_path, linsight, data):
    for options in (["--onnx", "s.onnx", "--static"], ["--onnx", "h.onnx", "--half"], ["--compiled", "c.pt2"]):
        code, out, err = linsight("export", run, options[0], tmp_path / options[1], *options[2:], "--json")
        assert (code, err) == (0, ""), err
        (row,) = json.loads(out)
        assert row["error"] <= row["limit"] < 0.01
        assert bool(row["float32_nodes"]) == ("--half" in options)
    images = sorted(data.rglob("*.png"))[:3]
    for name in ("s.onnx", "h.onnx"):
        assert linsight("predict", tmp_path / name, *images)[0] == 0
    one_line(linsight("predict", tmp_path / "s.onnx", images[0], "--img-size", "32"), "exported for images of 16x16")
    one_line(linsight("predict", tmp_path / "c.pt2", images[0]), "machine code, of AOTInductor")


def test_missing_packages_cost_one_line(run, tmp_path, linsight, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(
        linsight("export", run, "--onnx", tmp_path / "m.onnx"), "needs the package 'onnx': pip install -e '.[export]'"
    )
    monkeypatch.setattr("shutil.which", lambda name: None)
    one_line(linsight("export", run, "--compiled", tmp_path / "m.pt2"), "needs a C++ compiler, and none is installed")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(tmp_path, small, facts):
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module: a str came"):
        export_onnx("small", tmp_path / "m.onnx")

    small.register_forward_hook(lambda module, given, output: output if output.sum().item() > 99 else output + 1)
    with pytest.raises(ValueError, match=r"'small' has no exported form: .*; --static exports for one size") as error:
        export_program(small, tmp_path / "m.pt2", facts=facts)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"the model itself does not take 2x5x64x64: .*channels"):
        export_program(small, tmp_path / "m.pt2", facts=facts._replace(input_size=(5, 16, 16)))
