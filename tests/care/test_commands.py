"""Commands: bad values of every option, start-up, output that nobody reads or that has no letters."""

import importlib
import io
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import timm
from PIL import Image

from linsight import __version__ as version
from linsight.errors import LinsightError
from linsight.runtime.launch import is_command
from linsight.tasks import ClassifyRecipe
from linsight.train import RECIPES, evaluate, load_run, load_trained, predict, resolve, train
from linsight.train.model import load_source, require_classifier

TINY = {
    "model": "vit_tiny",
    "attention": "inline",
    "img_size": 8,
    "model_args": "patch_size=2,embed_dim=16,depth=1,num_heads=2,global_pool=avg,class_token=False",
    "in_chans": 3,
    "mean": "",
    "std": "",
    "device": "cpu",
    "amp": "off",
    "figures": False,
    "workers": 0,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for level, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir()
        for i in range(6):
            pixels = np.full((12, 10, 3), 60 * level + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(resolve("digits", {**TINY, "data": data}), out=folder)
    return folder


@pytest.mark.parametrize("command", [[], ["train"], ["list"], ["eval"], ["bench"]], ids=" ".join)
def test_help_imports_no_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "linsight.cli", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "Usage" in done.stdout and "typer" in modules
    assert not modules & {"torch", "timm", "numpy", "PIL", "sklearn", "matplotlib"}


def test_all_names_are_there_in_a_process_of_the_command_too():
    module = importlib.import_module("linsight")
    assert all(module.__getattr__(name) is getattr(module, name) for name in module.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.__getattr__("nothing")
    assert not is_command() and timm.is_model("inline_deit_tiny")  # a program gets all of it at once


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (["/usr/bin/linsight", "train"], True),
        (["C:\\bin\\linsight.exe"], sys.platform == "win32"),
        (["train.py", "linsight"], False),
        (["-c"], False),
        ([], False),
    ],
)
def test_a_command_is_known_by_its_name(monkeypatch, line, command):
    monkeypatch.setattr(sys, "argv", line)
    assert is_command() == command


# Values that a field cannot have, beside those that no number can.
NEVER = ("nan", "inf", "-inf", "x", "1e400", "-1")
BAD = {
    "img_size": (*NEVER, "0", "-5", "224x0", "0,0", "1,2,3", "224x", "2.5", "99999999"),
    "num_classes": (*NEVER, "0", "1e9"),
    "from_size": (*NEVER, "0", "1,2,3", "99999999"),
    "fill": ("nan", "inf", "x", "1e400"),
    "in_chans": (*NEVER, "0", "2"),
    "workers": (*NEVER, "1.5", "99999999"),
    "crop_padding": (*NEVER, "99999999999999999999"),
    "scale": (*NEVER, "0,0", "1,0.5", "0.5", "0.5,2"),
    "ratio": (*NEVER, "0,1", "2,1"),
    "mean": ("x", "nan,nan,nan", "1", "inf,0,0"),
    "std": ("x", "0,0,0", "-1,1,1"),
    "crop_pct": (*NEVER, "0", "2"),
    "lr": (*NEVER, "0", "1e300"),
    "epochs": (*NEVER, "0", "1.5", "1e300"),
    "batch_size": (*NEVER, "0", "1.5"),
    "threads": (*NEVER, "0", "99999"),
    "seed": ("nan", "x", "1.5", "99999999999999999999"),
    "min_lr": (*NEVER, "1e300"),
    "attention_options": ("x", "1"),
    "model_args": ("x", "1", "features_only=true", "img_size=8", "patch_size=0", "nonsense=1"),
    "opt_args": ("x", "nonsense=1"),
    "sched_args": ("x", "nonsense=1"),
    "init": ("nowhere.pth",),
    "data": ("nowhere",),
    "model": ("", "nowhere", "mlla_tiny_dense"),
    "attention": ("nowhere", "inline,inline"),
    "auto_augment": ("nowhere",),
    "device": ("nowhere", "cuda:99", "-1"),
    "opt": ("nowhere", ""),
    "cache": ("x",),
    "track": ("nowhere",),
    "epoch_images": (*NEVER, "0", "1.5"),
    "redraw_every": (*NEVER, "1.5"),
}
FIELDS = {name: field for name, field in ClassifyRecipe.model_fields.items() if name != "task"}
for name, field in FIELDS.items():
    if name not in BAD and type(field.default) in (int, float) and type(field.default) is not bool:
        BAD[name] = NEVER
    if ClassifyRecipe.choices(name):
        BAD.setdefault(name, ("nowhere", ""))


def test_every_field_that_can_be_wrong_is_tried():
    free = {"data_dir", "cache_dir", "train_split", "val_split", "image_key", "label_key"}  # any text
    flags = {name for name, field in FIELDS.items() if type(field.default) is bool}
    assert set(FIELDS) - set(BAD) - free - flags == set()


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_of_a_field_is_one_line(field, data, tmp_path):
    for value in BAD[field]:
        with pytest.raises(LinsightError) as caught:
            train(resolve("digits", {**TINY, "data": data, field: value}), out=tmp_path / "run")
        assert "\n" not in str(caught.value), value
        assert not (tmp_path / "run").exists(), (field, value)


def test_options_of_train_are_refused_by_the_command_line_too(linsight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for field, value in (("img-size", "0"), ("img-size", "-5"), ("img-size", "224x0"), ("batch-size", "0")):
        code, out, err = linsight("train", f"--{field}", value)
        assert code == 2 and out == "" and err.count("\n") == 1 and field.replace("-", "_") in err
    code, _, err = linsight("train", "--img-size", "1", "--model", "inline_deit_tiny")
    assert code == 2 and "img_size" in err and err.count("\n") == 1
    code, _, err = linsight("train", "--model", "mlla_tiny_dense")
    assert code == 2 and "take 'mlla_tiny'" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_recipe_made_in_python_is_checked_as_well(tmp_path):
    for wrong in ({"lr": "much"}, {"img_size": 0}, {"batch_size": -1}, {"epochs": None}, {"mean": 3}):
        with pytest.raises(LinsightError, match=next(iter(wrong))):
            train(ClassifyRecipe(**wrong), out=tmp_path / "run")
    assert resolve("photos", {"data": tmp_path}).data == str(tmp_path)  # a path is a name, too


def test_bad_options_of_the_other_commands_are_one_line(linsight, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    image = data / "a" / "0.png"
    cases = [
        ("eval", run, "--batch-size", "0"),
        ("eval", run, "--workers", "-1"),
        ("eval", run, "--amp", "x"),
        ("eval", run, "--device", "x"),
        ("eval", run, "--img-size", "0"),
        ("eval", run, "--img-size", "8x"),
        ("eval", run, "--on-bad-image", "x"),
        ("eval", run, "--split", "x"),
        ("eval", run, "--data", "nowhere"),
        ("eval", run, "--budget", "x"),
        ("eval", run, "--budget", "1"),
        ("eval", run, "--out", "x"),
        ("eval", "nowhere"),
        ("eval", tmp_path),
        ("eval", "inline_deit_tiny"),
        ("eval", "inline_deit_tiny", "--checkpoint", "nowhere.pth"),
        ("eval", "mlla_tiny_dense", "--checkpoint", "nowhere.pth"),
        ("predict", run, "nowhere.png"),
        ("predict", run, image, "--top", "0"),
        ("predict", run, image, "--img-size", "x"),
        ("predict", run, image, "--device", "x"),
        ("predict", run, image, "--amp", "x"),
        ("predict", run, image, "--tile", "8"),
        ("predict", run, image, "--stream", "--tile", "0"),
        ("predict", run, image, "--stream", "--img-size", "8"),
        ("predict", run, image, "--stream", "--dtype", "x"),
        ("predict", run, image, "--stream", "--output", "x"),
        ("predict", run, image, "--stream", "--output", "map"),
        ("predict", run, image, "--stream", "--output", "map", "--out", "map.txt"),
        ("predict", run, image, "--stream", "--output", "map", "--out", "no/where.npy"),
        ("predict", run, image, "--stream", "--scratch", "file"),
        ("predict", run, image, "--stream", "--resume"),
        ("train", "--resume", "nowhere"),
        ("train", "--resume", "file"),
        ("train", "--out", "file"),
        ("train", "--out", "file/run"),
        ("bench", "nowhere"),
        ("bench", "inline", "--sizes", "0"),
        ("bench", "inline", "--sizes", "-5"),
        ("bench", "inline", "--sizes", "7x0"),
        ("bench", "inline", "--batch", "0"),
        ("bench", "inline", "--dim", "0"),
        ("bench", "inline", "--dim", "7"),
        ("bench", "inline", "--heads", "0"),
        ("bench", "inline", "--steps", "x"),
        ("bench", "inline", "--amp", "x"),
        ("bench", "inline", "--device", "x"),
        ("bench", "inline", "--threads", "0"),
        ("bench", "inline", "--seconds", "-1"),
        ("bench", "inline", "--seconds", "nan"),
        ("bench", "inline", "--limit", "0"),
        ("bench", "inline", "--limit", "nan"),
        ("bench", "inline", "--beside", "nowhere"),
        ("bench", "vit_tiny", "--attention", "nowhere"),
        ("bench", "inline", "--out", "file"),
        ("bench", "inline", "--csv", "file/a.csv"),
        ("bench", "inline", "--html", "no/a.html"),
        ("bench", "inline", "--plot", "a.txt"),
        ("advise",),
        ("advise", "--size", "0"),
        ("advise", "--size", "224x0"),
        ("advise", "--size", "224", "--patch", "0"),
        ("advise", "--size", "224", "--device", "x"),
        ("advise", "--size", "224", "--amp", "x"),
        ("advise", "--size", "224", "--dim", "0"),
        ("advise", "--size", "224", "--from", "nowhere.csv"),
        ("advise", "--size", "224", "--from", "file"),
        ("advise", "--size", "224,448"),
        ("advise", "--size", "224", "--task", "recall-8"),
        ("info", "nowhere"),
        ("info", "inline", "--attention", "linear"),
        ("info", "trecvit_base"),
        ("recipe", "digits", "--task", "classify"),
        ("merge", "/"),
        ("merge", "parts.txt"),
        ("info", "vit_tiny", "--attention", "nowhere"),
        ("list", "--nothing"),
        ("doctor", "x"),
        ("nothing",),
    ]
    for case in cases:
        code, _, err = linsight(*case)
        assert code == 2 and err.startswith("linsight: ") and err.count("\n") == 1, (case, code, err)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_doors_of_python(run, data):
    trained = load_trained(run)
    image = data / "a" / "0.png"
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"amp": "x"}, {"device": "x"}, {"on_bad_image": "x"}):
        with pytest.raises(LinsightError):
            evaluate(trained, **wrong)
    for wrong in ({"top": 0}, {"batch_size": "x"}, {"amp": "x"}, {"img_size": (1, 2, 3)}, {"on_bad_image": "x"}):
        with pytest.raises(LinsightError):
            predict(trained, [image], **wrong)
    for wrong in (0, -1, "x"):
        with pytest.raises(LinsightError, match="batch_size"):
            load_run(run).predict(Image.new("RGB", (8, 8)), batch_size=wrong)
    with pytest.raises(LinsightError, match="no image is given"):
        predict(trained, [])


def test_eval_takes_another_size_and_tells_no_top_5_of_three_classes(linsight, run, data):
    code, out, _ = linsight("eval", run, "--img-size", "12x16", "--device", "cpu", "--workers", "0")
    assert code == 0 and "top-1" in out and "top-5" not in out
    plain, _ = predict(load_trained(run), [data / "c" / "0.png"], device="cpu")
    larger, _ = predict(load_trained(run), [data / "c" / "0.png"], device="cpu", img_size=16)
    assert plain[0].probabilities != larger[0].probabilities


def test_a_name_without_weights_says_what_to_give(monkeypatch):
    from linsight.train import model

    with pytest.raises(LinsightError, match=r"'inline_deit_tiny' is the name of a model.*--checkpoint"):
        load_source("inline_deit_tiny")
    with pytest.raises(LinsightError, match="no such run folder"):
        load_source("inline_deit_tinny")
    monkeypatch.setattr(model, "load_named", lambda name, weights, from_size: (name, weights))
    name, weights = load_source("wfm_tiny")  # whose authors put them where they can be fetched
    assert name == "wfm_tiny" and weights.startswith("https://")
    require_classifier("wfm_tiny")
    with pytest.raises(LinsightError, match="take 'agent_pvt_small'"):
        require_classifier("agent_pvt_small_dense")


def test_whoever_reads_may_stop_reading():
    process = subprocess.Popen(
        [sys.executable, "-m", "linsight.cli", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(50) == 1 and process.stderr.read() == b""
    process.stderr.close()


def test_the_package_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linsight", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("linsight", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == version


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_an_output_that_is_full_is_one_line(linsight, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code, _, err = linsight("list", "--json")
        patch.setattr(sys, "stdout", io.StringIO())
        assert (code, err) == (2, "linsight: the output cannot be written: No space left on device\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is left in it


def test_a_terminal_without_letters_or_room_gets_what_it_can(linsight, run, data, tmp_path, monkeypatch):
    strange = tmp_path / "caf\u00e9 \u65e5\u672c [red]x$y$.png"
    strange.write_bytes((data / "a" / "0.png").read_bytes())
    for name, value in {"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    for command in (("predict", run, strange, "--device", "cpu"), ("list",), ("eval", run, "--device", "cpu")):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
            code, _, err = linsight(*command)
            sys.stdout.flush()
            assert code == 0 and err == "", command
            assert command[0] != "predict" or (b"caf\\xe9" in written.getvalue() and b"[red]" in written.getvalue())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # there may be no output at all
        assert linsight("list")[0] == 0


def test_json_is_json_whatever_the_names(linsight, run, data, tmp_path):
    strange = tmp_path / "\u00e9\udcff.png"  # not every file's name is text
    strange.write_bytes((data / "a" / "0.png").read_bytes())
    code, out, err = linsight("predict", run, strange, "--json", "--device", "cpu")
    assert code == 0 and json.loads(out)["predictions"][0]["file"] == str(strange), err


def test_the_way_to_install_an_extra_is_one_that_works(monkeypatch):
    from linsight import doctor
    from linsight.errors import MissingExtraError

    assert str(MissingExtraError("tifffile", "slides", "slides")).endswith(
        "pip install -e '.[slides]' in the source folder of linsight"
    )
    monkeypatch.setattr(doctor, "version_of", lambda package: "")
    assert {row["get"] for row in doctor.diagnose()["packages"] if row["extra"] == "train"} == {
        "pip install -e '.[train]'"
    }


def test_recipes_are_all_there():
    assert {"digits", "cifar10", "photos", "inline_deit_tiny"} <= set(RECIPES)
