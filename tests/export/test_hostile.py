"""Folders that somebody made to do harm, or that are damaged: one line, nothing run, no memory taken."""

import json
import os
import pathlib
import shutil
import struct
import threading

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_runs import SMALL, write_run

import linsight
from linsight.errors import LinsightError
from linsight.export import save_for_hub
from linsight.models.registry import ON_HOST
from linsight.train import load_trained, resume
from linsight.train.hub import OWN


class Evil:
    """What a pickle may run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def folder(run_folder, tmp_path):
    """A good folder, to be spoilt."""
    return save_for_hub(run_folder, tmp_path / "hub")


def refused(call, said=""):
    with pytest.raises(LinsightError, match=said or None) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700, str(caught.value)


def every_door(folder, said="", timm_too=True):
    refused(lambda: linsight.from_pretrained(folder), said)
    refused(lambda: linsight.create_model(f"local-dir:{folder}", pretrained=True), said)
    if timm_too:
        refused(lambda: timm.create_model(f"local-dir:{folder}", pretrained=True), said)


def spoil(folder, **changes):
    """Change the config.json; a None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *inner, key = path.split("__")
        place = config
        for name in inner:
            place = place[name]
        place.pop(key, None) if value is None else place.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))


def test_the_good_folder_is_taken(folder):
    assert linsight.from_pretrained(folder).classes == ("blue", "green", "red")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pt", "model.safetensors"])
def test_pickles_with_code_are_not_run(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    torch.save({"head.weight": Evil(tmp_path / "ran")}, folder / name)
    every_door(folder)
    if name != "model.safetensors":
        refused(lambda: linsight.from_pretrained(folder), "safetensors")
    assert not (tmp_path / "ran").exists()


def test_pickles_of_tensors_are_not_taken_by_the_safe_door(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert linsight.from_pretrained(folder).path.name == "model.safetensors"
    (folder / "model.safetensors").unlink()
    refused(lambda: linsight.from_pretrained(folder), "as a pickle .pytorch_model.bin., which is not read here")
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 3  # timm's, of tensors alone


def test_run_folders_with_pickles(run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    torch.save({"epoch": Evil(tmp_path / "ran")}, run / "state.pt")
    torch.save(Evil(tmp_path / "ran"), run / "best.safetensors")
    (run / "summary.json").unlink()
    refused(lambda: load_trained(run), "no safetensors file, or is damaged")
    refused(lambda: linsight.from_pretrained(run), "no safetensors file, or is damaged")
    (run / "best.safetensors").unlink()
    os.mkfifo(run / "best.safetensors")
    refused(lambda: load_trained(run), "no such run folder or weights")
    (tmp_path / "data" / "a").mkdir(parents=True)
    refused(lambda: resume(run, overrides={}))
    assert not (tmp_path / "ran").exists()


BAD = {
    "no JSON": (b"{", "damaged, or no JSON"),
    "no text": (b"\xff\xfe\x00", "damaged, or no JSON"),
    "a list": (b"[1, 2]", "holds no object"),
    "deep": (b"[" * 10**5, "damaged, or no JSON"),
    "huge": (b" " * (2**24 + 1), "too large"),
    "a number of many digits": (b'{"architecture": 1' + b"0" * 5000 + b"}", "damaged, or no JSON"),
    "empty": (b"{}", "names no 'architecture'"),
    "another library": (b'{"model_type": "vit", "architectures": ["ViT"]}', "of another library"),
}


@pytest.mark.parametrize("kind", BAD)
def test_descriptions_that_are_none(folder, kind):
    content, said = BAD[kind]
    (folder / "config.json").write_bytes(content)
    every_door(folder, said, timm_too=False)  # timm reads them by itself


WRONG = {
    "an unknown architecture": ({"architecture": "os.system"}, "unknown architecture", False),
    "an architecture of none": ({"architecture": ["vit_tiny"]}, "names no 'architecture'", False),
    "another model": ({"architecture": "resnet10t", "model_args": {}}, "", False),
    "arguments that are a list": ({"model_args": [1]}, "model_args", False),
    "labels": ({"label_names": 7}, "label_names", False),
    "labels of no text": ({"label_names": [1, 2, 3]}, "no text", False),
    "a cfg": ({"pretrained_cfg": "x"}, "pretrained_cfg", False),
    "classes": ({"num_classes": 10**12}, "num_classes", False),
    "classes by name": ({"num_classes": "many"}, "num_classes", False),
    "classes of the arguments": ({"model_args__num_classes": 10**12}, "num_classes", True),
    "depth": ({"model_args__depth": 10**6}, "1000 at most", True),
    "no number": ({"model_args__depth": "three"}, "depth", True),
    "infinite": ({"model_args__mlp_ratio": float("inf")}, "numbers that no model has", True),
    "width": ({"model_args__embed_dim": 10**6}, "values or more", True),
    "images": ({"model_args__img_size": [65536, 65536]}, "values or more", True),
    "other arguments": ({"model_args__checkpoint_path": "/etc/passwd"}, "checkpoint_path", False),
    "arguments of nobody": ({"model_args__colour": 1}, "colour", True),
    "mechanism": ({"model_args__attention": "../x"}, "unknown attention", True),
    "input": ({"pretrained_cfg__input_size": [3, "x", 16]}, "input_size", False),
    "mean": ({"pretrained_cfg__mean": "x"}, "mean", False),
    "crop": ({"pretrained_cfg__crop_pct": -1}, "crop_pct", False),
    "fields": ({"pretrained_cfg__colour": 1}, "unknown field", False),
    "files elsewhere": ({"pretrained_cfg__hf_hub_filename": 7}, "hf_hub_filename", False),
}


@pytest.mark.parametrize("kind", WRONG)
def test_descriptions_of_what_no_model_is(folder, kind):
    changes, said, timm_too = WRONG[kind]
    spoil(folder, **changes)
    every_door(folder, said, timm_too)


@pytest.mark.parametrize(
    "args",
    [
        {"base": "local-dir:."},
        {"base": "hf-hub:me/x"},
        {"base": ON_HOST},
        {"base": "vit_tiny_patch16_224", "depth": 10**6},
        {"base": "vit_tiny_patch16_224", "checkpoint_path": "/etc/passwd"},
        {"base": 7},
    ],
)
def test_models_on_hosts(folder, args):
    spoil(folder, architecture=ON_HOST, model_args=args)
    every_door(folder)


def test_own_fields_are_looked_at_too(folder):
    for own in (7, {"recipe": 7}, {"recipe": {"colour": 1}, "results": 7}, {"results": {"top1": "<b>"}}):
        spoil(folder, **{OWN: own})
        run = linsight.from_pretrained(folder)
        assert run.classes == ("blue", "green", "red") and run.recipe.model == "vit_tiny"
    spoil(folder, **{OWN: {"recipe": {"epochs": "many"}}})
    refused(lambda: linsight.from_pretrained(folder), "epochs")


def test_links_that_lead_away(folder, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.move(folder / name, away / name)
        (folder / name).symlink_to(away / name)
        every_door(folder, "link to what lies outside", timm_too=name == "model.safetensors")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        every_door(folder, "is no file", timm_too=False)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        every_door(folder, "is no file", timm_too=False)
        (folder / name).unlink()
        shutil.move(away / name, folder / name)
    (folder / "inner").mkdir()
    shutil.move(folder / "model.safetensors", folder / "inner" / "a")
    (folder / "model.safetensors").symlink_to("inner/a")
    assert linsight.from_pretrained(folder).classes


def test_several_files_are_not_followed(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"head.weight": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    every_door(folder, "no weights in one file")


def test_weights_that_are_not_its_own(folder, tmp_path):
    path = folder / "model.safetensors"
    good = load_file(path)
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 2**62) + b"{}", path.read_bytes()[:-40]):
        path.write_bytes(content)
        every_door(folder)
    for wrong in ({**good, "norm.weight": torch.zeros(5)}, {key: t for key, t in good.items() if key != "norm.weight"}):
        save_file(wrong, path)
        with pytest.raises(LinsightError, match=r"norm\.weight"):
            linsight.from_pretrained(folder)


def test_runs_that_describe_what_cannot_be(tmp_path):
    from safetensors.torch import save_file as write

    run = write_run(tmp_path / "run")
    tensors = load_file(run / "best.safetensors")
    for model_args, said in (({"depth": 10**6}, "1000 at most"), ({"embed_dim": 10**6}, "values or more")):
        about = {"recipe": {"model": SMALL.model, "model_args": model_args}, "classes": ["a", "b"]}
        write(tensors, run / "best.safetensors", {"linsight": json.dumps(about)})
        refused(lambda: load_trained(run), said)
    for text in ("[" * 10**5, "{", "[]", '{"recipe": 7, "classes": 7}'):
        write(tensors, run / "best.safetensors", {"linsight": text})
        refused(lambda: load_trained(run), "cannot be read")
    write_run(tmp_path / "other")
    for content in (b"[" * 10**5, b"\xff\xff", b"[]", b'{"recipe": 7}'):
        (tmp_path / "other" / "config.json").write_bytes(content)
        refused(lambda: resume(tmp_path / "other", overrides={}))
        assert load_trained(tmp_path / "other").classes  # its weights tell all that it takes


def test_counting_leaves_other_threads_alone():
    from linsight.models.bounds import MODULES, require_bounded

    made = []

    def elsewhere():
        made.append(torch.nn.ModuleList(torch.nn.Identity() for _ in range(MODULES + 10)))

    def make():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        torch.nn.Sequential(torch.nn.Linear(2, 2))

    require_bounded("x", make)
    assert len(made) == 1
    with pytest.raises(LinsightError, match="modules"):
        require_bounded("x", elsewhere)
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(MODULES + 10))  # nothing is counted any more


def test_names_of_files_in_a_repository_stay_in_it(hub):
    from linsight.models.timm.saved import fetch

    hub.add("me/x", {"a": b"1"})
    for name in ("../x", "a/../../x", "/etc/passwd", "", "a//b", "..\\x"):
        refused(lambda name=name: fetch("me/x", name), "no name of a file")
    assert pathlib.Path(fetch("me/x", "a")).read_bytes() == b"1" and fetch("me/x", "b") is None
