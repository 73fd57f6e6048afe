"""Files: the formats, and what must not be read. Nothing in a file is ever run."""

import argparse
import os
import pickle
import sys
import types
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import linsight
from linsight.checkpoints.read import STAND_INS, read
from linsight.errors import CheckpointError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)}


def same(found):
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def save(path, how):
    if how == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=how == "zip")
    return path


def refused(path):
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.pth.tar", "a"])
def test_a_file_is_read_for_what_it_is(tmp_path, how, name):
    assert same(read(save(tmp_path / name, how)))


def test_source_may_be_text(tmp_path):
    assert same(read(str(save(tmp_path / "a.safetensors", "safetensors"))))


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
def test_code_is_not_run(tmp_path, how):
    made, path = tmp_path / "made", tmp_path / "a.pth"
    content = {"model": STATE, "hook": Harmful(made)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Harmful(made), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refused(path)
    assert not made.exists()
    assert ".mkdir" in message and "could run code" in message
    if how == "zip":  # the test itself can fail: an unsafe reader does run it
        torch.load(path, weights_only=False)
        assert made.exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    assert "'torch.nn.modules.linear.Linear'" in refused(tmp_path / "a.pth")


def test_stand_ins_are_allowed_for_one_file_only(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read(save(tmp_path / "a.pth", "zip"))
    assert set(torch.serialization.get_safe_globals()) == before


def config_node(module_name, class_name, monkeypatch):
    """A mapping class as configuration packages have them, which is gone when the file is read."""
    module = types.ModuleType(module_name)
    node = type(class_name, (dict,), {"__module__": module_name})
    setattr(module, class_name, node)
    for depth in range(module_name.count(".") + 1):
        monkeypatch.setitem(sys.modules, module_name.rsplit(".", depth)[0], module)
    return node


MAPPINGS = [name for name in STAND_INS if name.endswith(("Node", "Dict")) or name == "addict.addict.Dict"]


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("name", MAPPINGS)
def test_training_configurations_are_passed_over(tmp_path, name, how, monkeypatch):
    with monkeypatch.context() as patch:
        node = config_node(*name.rsplit(".", 1), patch)
        config = node(DATA=node(IMG_SIZE=224, NAMES=["a"]), LR=5e-4)
        config.__dict__["__immutable__"] = True
        torch.save({"model": STATE, "config": config}, tmp_path / "a.pth", _use_new_zipfile_serialization=how == "zip")
    found = read(tmp_path / "a.pth")
    assert same(found["model"]) and found["config"]["DATA"]["IMG_SIZE"] == 224


def test_other_training_records_are_passed_over(tmp_path):
    records = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(names=["a"])),
        "space": types.SimpleNamespace(a=1),
        "max_accuracy": np.float64(82.4),
        "count": np.int64(3),
        "output": tmp_path,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    }
    torch.save({"model": STATE, **records}, tmp_path / "a.pth")
    assert same(read(tmp_path / "a.pth")["model"])


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_cut_short(tmp_path, how, kept):
    path = save(tmp_path / "a.pth", how)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(kept * len(whole)))])
    refused(path)


def test_flipped_bytes_never_crash(tmp_path):
    for how in ("safetensors", "zip", "legacy"):
        path = save(tmp_path / "a.pth", how)
        whole = bytearray(path.read_bytes())
        for place in range(0, len(whole), 37):
            damaged = whole.copy()
            damaged[place] ^= 0xFF
            path = tmp_path / f"{how}-{place}.pth"
            path.write_bytes(damaged)
            try:
                read(path)
            except CheckpointError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "no checkpoint"),
        (b"cos\nsystem\n(S'true'\ntR.", "no checkpoint"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "damaged safetensors"),
    ],
)
def test_no_checkpoint(tmp_path, content, words):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert words in refused(path)


def test_an_archive_of_other_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    refused(tmp_path / "a.zip")


def test_a_lone_tensor(tmp_path):
    torch.save(torch.ones(2), tmp_path / "a.pt")
    assert "holds a Tensor" in refused(tmp_path / "a.pt")


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.pth")
    assert "cannot be read" in refused(tmp_path)


class Web:
    """A download that serves `content`, and counts."""

    def __init__(self, monkeypatch, folder, content):
        self.calls, self.content = 0, content
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(torch.hub, "download_url_to_file", self.download)

    def download(self, url, path, *args, **kwargs):
        self.calls += 1
        if self.content is None:
            raise URLError("no route")
        with open(path, "wb") as file:
            file.write(self.content)


def test_addresses_are_downloaded_once_each(tmp_path, monkeypatch):
    web = Web(monkeypatch, tmp_path / "hub", save(tmp_path / "a.pth", "zip").read_bytes())
    for url in (
        "https://one.example/checkpoint.pth",
        "https://two.example/checkpoint.pth",
        "https://one.example/?dl=1",
    ):
        for _ in range(2):
            assert same(read(url))
    assert web.calls == 3


def test_an_error_page_does_not_stay(tmp_path, monkeypatch):
    web = Web(monkeypatch, tmp_path, b"<html>moved</html>")
    for calls in (1, 2):
        assert "no checkpoint" in refused("https://one.example/a.pth")
        assert web.calls == calls
    web.content = None
    assert "could not be downloaded" in refused("https://one.example/a.pth")


def test_a_refused_file_leaves_the_model_alone(tmp_path):
    layer = linsight.create_attention("inline", 8, 2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        linsight.load_published(layer, tmp_path / "a.pth")
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
