"""Places that users name: homes of nobody, names that no file can have, pipes, devices, circles of links: one line."""

import os
import pathlib

import pytest
from test_commands import TINY, data  # noqa: F401

from linsight.errors import LinsightError
from linsight.runtime.places import located
from linsight.train import load_trained, resolve, train

LONG, DEEP = "x" * 300, "/".join(["y" * 200] * 30)
WRONG = {
    "a home that there is not": ("~gone/x", "the home '.*/gone' is no folder; write './~gone/x'"),
    "a user who is none": ("~no_such_user_1/x", "there is no home of '~no_such_user_1'; write './~no"),
    "a long name": (LONG, "cannot be used: File name too long"),
    "a long path": (DEEP, "cannot be used: File name too long"),
    "a zero": ("a\0b", r"'a\\x00b' is no name that a file can have"),
    "a circle of links": ("circle", "cannot be used: Too many levels of symbolic links"),
    "no name": ("", "is the name of no file and no folder"),
}
ODD = {"a pipe": "pipe", "a device": "/dev/zero", "nothing": "/dev/null", "below a file": "file/x"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the test, with a pipe, a file and a circle of links in it, and a home of nobody."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("circle", "circle")
    pathlib.Path("file").write_text("x")
    plain = os.path.expanduser
    monkeypatch.setattr(
        os.path, "expanduser", lambda text: os.fspath(text).replace("~gone", f"{tmp_path}/gone") or plain(text)
    )
    return tmp_path


@pytest.mark.parametrize(("name", "line"), WRONG.values(), ids=WRONG)
def test_what_is_no_place_is_said(here, name, line):
    with pytest.raises(LinsightError, match=line) as error:
        located(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_a_place_is_a_path(here, monkeypatch):
    for name in ("new", "file", "file/x", "pipe", "/dev/zero", "a/b/c", ".", pathlib.Path("new")):
        assert located(name) == pathlib.Path(name)
    monkeypatch.undo()
    assert located("~") == pathlib.Path.home() and located("~/x") == pathlib.Path.home() / "x"
    monkeypatch.chdir(here)
    pathlib.Path("~no_such_user_1").mkdir()
    assert located("~no_such_user_1") == pathlib.Path("~no_such_user_1")  # of a folder of this name


def options(tiny, **more):
    found = ["train"]
    for name, value in {**tiny, **more}.items():
        dashed = name.replace("_", "-")
        found += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return found


COMMANDS = {
    "--out": lambda place, data: options(TINY, data=data, out=place),  # noqa: F811
    "--resume": lambda place, data: ["train", "--resume", place],  # noqa: F811
    "--data": lambda place, data: options(TINY, data=place),  # noqa: F811
    "--init": lambda place, data: options(TINY, data=data, init=place),  # noqa: F811
    "finetune": lambda place, data: ["train", "--recipe", "finetune", "--data", data, "--init", place],  # noqa: F811
    "--recipe": lambda place, data: ["train", "--recipe", f"{place}.yaml"],  # noqa: F811
    "--cache-dir": lambda place, data: options(TINY, data=data, cache="disk", cache_dir=place),  # noqa: F811
    "--data-dir": lambda place, data: ["train", "--data", "torch/cifar10", "--data-dir", place],  # noqa: F811
    "eval": lambda place, data: ["eval", place],  # noqa: F811
    "predict": lambda place, data: ["predict", place, data],  # noqa: F811
    "report": lambda place, data: ["report", place],  # noqa: F811
    "export": lambda place, data: ["export", place, "--safetensors", "out.safetensors"],  # noqa: F811
}
EMPTY_IS_NONE = {"--init", "--cache-dir", "finetune", "--data-dir"}  # of a recipe


@pytest.mark.parametrize("name", [*[name for name, _ in WRONG.values()], *ODD.values()], ids=[*WRONG, *ODD])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_it_in_a_line(here, data, linsight, command, name):  # noqa: F811
    if not name and command in EMPTY_IS_NONE:
        pytest.skip("none is meant")
    code, _, err = linsight(*COMMANDS[command](name, data))
    assert code == 2 and err.count("\n") == 1 and err.startswith("linsight: "), err
    assert sorted(os.listdir(here)) == ["circle", "file", "pipe"]


def test_python_says_it_too(here, data):  # noqa: F811
    recipe = resolve("digits", {**TINY, "data": data})
    for name, line in WRONG.values():
        with pytest.raises(LinsightError, match=line):
            train(recipe, out=name)
        with pytest.raises(LinsightError, match=line):
            load_trained(name)


VALUES = [
    ("threads", "30000000000", "threads=30000000000 is out of range: it must be between 1 and 4096"),
    ("workers", "100000", "workers=100000 is out of range: it must be between 0 and 4096"),
    ("crop_pct", "1e-8", "crop_pct=1e-8 is out of range: it must be between 0.01 and 1"),
    ("lr", "1e400", "lr=1e400 is out of range"),
    ("img_size", "1000000000", "img_size=1000000000 is out of range: it must be between 1 and 65536"),
    ("img_size", "60000", "'vit_tiny' as the recipe describes it has .* values or more"),
    (
        "model_args",
        "embed_dim=10000000,patch_size=2,depth=1,num_heads=2",
        "'vit_tiny' as the recipe describes it has .* values or more",
    ),
    (
        "accumulate",
        "1000000000",
        "accumulate=1000000000 parts of a batch need as many images",
    ),
    ("in_chans", 10**30, "in_chans=1000000000000000000000000000000 is out of range"),
    ("device", "meta", "device 'meta' cannot be used: it keeps no values"),
    ("device", "mkldnn", "device 'mkldnn' cannot be used"),
    ("init", "http://", "http:// could not be downloaded"),
    ("init", "https://no address", "https://no address could not be downloaded"),
    ("init", "http://[::1", "is no address: Invalid IPv6 URL"),
    ("init", "ftp://x/y", "'ftp://x/y' is no file: pass a path, or an http"),
    ("auto_augment", "a\nb", r"auto_augment='a\\nb' is no policy of timm"),
]


@pytest.mark.parametrize(
    ("name", "value", "line"), VALUES, ids=[f"{name}={str(value)[:12]}" for name, value, _ in VALUES]
)
def test_values_that_cannot_be_meant(tmp_path, data, name, value, line):  # noqa: F811
    with pytest.raises(LinsightError, match=line) as error:
        train(resolve("digits", {**TINY, "data": data, name: value}), out=tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_crop_of_a_giant_image_is_refused(tmp_path, data):  # noqa: F811
    from linsight.data.images import eval_transform

    recipe = resolve("digits", {**TINY, "data": data, "crop_pct": 0.01})
    with pytest.raises(LinsightError, match=r"crop_pct=0.01 at img_size=224 makes images of 22400 pixels.*16384"):
        eval_transform(recipe, (224, 224))
    eval_transform(recipe, (32, 32))
    eval_transform(recipe.changed(crop_pct=0.875), (16384, 10))


def test_names_with_a_line_feed_are_one_line(linsight):
    code, _, err = linsight("train", "--resume", "a\nb")
    assert (code, err) == (2, "linsight: 'a\\nb' is no run folder: it has no config.json\n")
