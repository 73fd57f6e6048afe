"""Models in timm's layout: saved, made again by every door, and pushed to and fetched from a stand-in of the Hub."""

import json
import socket

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from small_runs import CLASSES, SMALL, write_run

import linsight
from linsight.errors import LinsightError
from linsight.export import push_to_hub, save_for_hub
from linsight.tasks import ClassifyRecipe
from linsight.train import load_trained, predict, resolve

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub itself
FILES = {"config.json", "model.safetensors", "README.md"}
TINY_SWIN = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2)}


def images(model):
    channels, *size = timm.models.get_model_input_config(model)["input_size"]
    return torch.randn(2, channels, *size)


def same(model, other):
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.fixture
def saved(run_folder, tmp_path):
    return save_for_hub(run_folder, tmp_path / "hub", name="me/colours", licence="mit")


def test_a_run_comes_back_with_all_that_it_takes(run_folder, saved):
    run, again = linsight.load_run(run_folder), linsight.from_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    same(run.model, again.model)
    same(run.model, timm.create_model(f"local-dir:{saved}", pretrained=True))
    assert again.classes == CLASSES and again.img_size == (24, 16) and not again.model.training
    assert (again.mean, again.std) == (run.mean, run.std) == (SMALL.mean, SMALL.std)
    for field in ("model", "attention", "attention_options", "model_args", "fill", "crop_pct", "eval_crop", "epochs"):
        assert getattr(again.recipe, field) == getattr(run.recipe, field), field
    assert again.summary == {"top1": 91.25, "top5": 100.0, "epochs": 3, "train_images": 300}
    picture = np.random.default_rng(0).integers(0, 255, (31, 40, 3), dtype=np.uint8)
    assert again.predict(picture) == run.predict(picture)
    x = again.transform(picture)[None]
    assert torch.equal(again(x), again.model(x)) and torch.equal(x, run.transform(picture)[None])
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{saved}"))
    assert data["input_size"] == (3, 24, 16) and data["crop_mode"] == "center" and data["interpolation"] == "bilinear"


def test_every_door_of_the_run_takes_the_folder(run_folder, saved, tmp_path, linsight):
    from PIL import Image

    Image.fromarray(np.full((20, 20, 3), 90, dtype=np.uint8)).save(tmp_path / "a.png")
    (wanted,), _ = predict(load_trained(run_folder), [tmp_path / "a.png"])
    for source in (saved, saved / "model.safetensors"):
        (found,), _ = predict(load_trained(source), [tmp_path / "a.png"])
        assert found == wanted
    code, out, err = linsight("predict", saved, tmp_path / "a.png", "--json", "--device", "cpu", "--amp", "off")
    assert code == 0 and json.loads(out)["predictions"][0]["classes"] == list(wanted.classes), err
    code, _, err = linsight("eval", saved)
    assert code == 2 and "say what to evaluate on with --data" in err
    kept = resolve("finetune", {"init": str(saved), "data": "digits"})
    assert (kept.model, kept.attention, kept.model_args) == (SMALL.model, SMALL.attention, SMALL.model_args)


RUNS = {
    "swin": ClassifyRecipe(model="swin_tiny", attention="inline", model_args=TINY_SWIN, img_size=(64,)),
    "name of timm": ClassifyRecipe(
        model="deit_tiny_patch16_224", attention="focused", model_args={"embed_dim": 32, "depth": 2, "num_heads": 2},
        img_size=(48, 32),
    ),
    "variant": ClassifyRecipe(model="inline_compact_pico", img_size=(8,), in_chans=1),
    "steps": ClassifyRecipe(
        model="vit_tiny", attention="inline:1/softmax", model_args={"steps": [[64, 1], [192, 1]]},
        img_size=(32,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_other_hosts(kind, tmp_path):
    run = linsight.load_run(write_run(tmp_path / "run", RUNS[kind]))
    folder = save_for_hub(run, tmp_path / "hub")
    again = linsight.from_pretrained(folder)
    same(run.model, again.model)
    same(run.model, timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert again.classes == CLASSES and again.recipe.attention == RUNS[kind].attention


def test_models_that_no_run_made(tmp_path):
    ours = linsight.create_model("pvt_v2_b0", attention="focused", embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1),
                                 num_heads=(1, 2, 2, 2), num_classes=3)  # fmt: skip
    again = linsight.from_pretrained(save_for_hub(ours, tmp_path / "a", classes=CLASSES))
    same(ours, again.model)
    assert again.classes == CLASSES and again.summary == {} and again.recipe.attention == "focused"
    softmax = timm.create_model("deit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2)
    folder = save_for_hub(softmax, tmp_path / "b")
    again = linsight.from_pretrained(str(folder))
    same(softmax, again.model)
    assert again.classes[1] == "n01443537" and again.titles[1].endswith("goldfish, Carassius auratus")
    assert again.predict(np.zeros((9, 9, 3), dtype=np.uint8), top=1)[0].classes[0] in again.titles
    other = linsight.from_pretrained(f"local-dir:{folder}", num_classes=5, in_chans=1, img_size=64)
    assert other.classes == tuple("01234") and other.img_size == (64, 64) and other.transform.mode == "L"
    bare = linsight.from_pretrained(save_for_hub(linsight.create_model("compact_pico", num_classes=0), tmp_path / "c"))
    with pytest.raises(LinsightError, match="no classifier"):
        bare.predict(np.zeros((9, 9, 3), dtype=np.uint8))


def test_nothing_tells_of_this_machine(saved):
    for file in ("config.json", "README.md", "model.safetensors"):
        content = (saved / file).read_bytes()
        assert b"secret" not in content and b"/data" not in content and b"/runs" not in content, file
    recipe = json.loads((saved / "config.json").read_text())["linsight"]["recipe"]
    assert recipe["data"] == "colours" and recipe["init"] == "best.safetensors" and "data_dir" not in recipe


def test_what_cannot_be_saved_is_one_line_and_leaves_nothing(run_folder, tmp_path):
    model = linsight.create_model("compact_pico", num_classes=2)
    pruned = linsight.create_model("compact_pico", num_classes=2)
    torch.nn.utils.parametrizations.weight_norm(next(m for m in pruned.modules() if isinstance(m, torch.nn.Linear)))
    for call, said in (
        (lambda: save_for_hub(linsight.fuse(model), tmp_path / "x"), "fused"),
        (lambda: save_for_hub(torch.nn.Linear(2, 2), tmp_path / "x"), "create_model made"),
        (lambda: save_for_hub(pruned, tmp_path / "x"), "has been changed since"),
        (lambda: save_for_hub(model, tmp_path / "x", classes=CLASSES), "3 classes are named, and the model has 2"),
        (lambda: save_for_hub(run_folder, tmp_path / "x", name="../me"), "OWNER/NAME"),
        (lambda: save_for_hub(run_folder, tmp_path / "x", licence="my own\n---"), "no identifier of the Hub"),
        (lambda: save_for_hub(run_folder, run_folder), "give another folder"),
        (lambda: save_for_hub(run_folder, run_folder / "config.json"), "cannot be written"),
        (lambda: save_for_hub(tmp_path / "none", tmp_path / "x"), "no such run folder"),
    ):
        with pytest.raises(LinsightError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists(), said
    assert {path.name for path in run_folder.iterdir()} == {"best.safetensors", "config.json", "summary.json"}


def test_a_folder_is_replaced_whole_or_not_at_all(run_folder, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linsight.export.hub.write_text", full)
    with pytest.raises(LinsightError, match="cannot be written: No space left"):
        save_for_hub(run_folder, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    monkeypatch.undo()
    assert {path.name for path in save_for_hub(run_folder, saved).iterdir()} == FILES


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_pushed_and_fetched(run_folder, saved, hub, linsight):
    code, out, err = linsight("push", run_folder, "me/colours", "--licence", "mit", "--message", "The best one")
    assert code == 0 and out.startswith(f"{hub.address}/me/colours/commit/"), err
    assert hub.repos["me/colours"]["main"] == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert hub.messages == ["The best one"] and sum("/commit/" in path for _, path in hub.log) == 1
    assert hub.private == {"me/colours": None}
    run = load_trained(run_folder)
    same(run.model, timm.create_model("hf-hub:me/colours", pretrained=True))
    for name in ("me/colours", "hf-hub:me/colours", "me/colours@main"):
        import linsight as package

        found = package.from_pretrained(name)
        same(run.model, found.model)
        assert found.classes == CLASSES
    assert load_trained("hf-hub:me/colours").classes == CLASSES


def test_a_card_that_is_there_stays(run_folder, hub):
    hub.add("me/x", {"README.md": b"my own words"})
    push_to_hub(run_folder, "me/x")
    assert hub.repos["me/x"]["main"]["README.md"] == b"my own words" and set(hub.repos["me/x"]["main"]) == FILES
    push_to_hub(run_folder, "me/x", card=True)
    assert hub.repos["me/x"]["main"]["README.md"].startswith(b"---\n")


def test_branches_and_privacy(run_folder, hub, linsight):
    assert linsight("push", run_folder, "me/x", "--private", "--revision", "v2")[0] == 0
    assert (
        hub.private == {"me/x": "private"} and hub.repos["me/x"]["main"] == {} and set(hub.repos["me/x"]["v2"]) == FILES
    )
    import linsight as package

    assert package.from_pretrained("me/x", revision="v2").classes == CLASSES
    with pytest.raises(LinsightError, match="no such revision"):
        package.from_pretrained("me/x", revision="v3")


def test_a_dry_run_asks_nobody(run_folder, saved, hub, tmp_path, linsight, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "dry"
    code, said, err = linsight("push", run_folder, "me/colours", "--licence", "mit", "--dry-run", "--out", out)
    assert code == 0 and said.strip() == str(out) and not hub.log, err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}
    for options in (["--dry-run"], ["--out", out]):
        code, _, err = linsight("push", run_folder, "me/colours", *options)
        assert code == 2 and "go together" in err


def test_what_keeps_from_pushing_is_one_line(run_folder, hub, linsight, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    cases = [
        ("me/colours", ("POST", "/commit/"), 403, "no right"),
        ("me/colours", ("POST", "repos/create"), 401, "does not know who asks"),
        ("me/colours", ("POST", "repos/create"), 403, "no right"),
        ("me/colours", ("POST", "/commit/"), 500, "cannot be spoken to"),
    ]
    for name, where, status, said in cases:
        hub.deny = {where: status}
        code, out, err = linsight("push", run_folder, name)
        assert (code, out) == (2, "") and err.count("\n") == 1 and said in err, err
        assert "hf_secret" not in err and not hub.repos.get(name, {}).get("main")
    hub.deny = {}
    for name in ("colours", "me/colours/x", "../x", "me/..", "/me/x", "me/x y", "", "me/colours@main"):
        code, _, err = linsight("push", run_folder, name)
        assert code == 2 and err.count("\n") == 1 and "OWNER/NAME" in err, err
    code, _, err = linsight("push", tmp_path / "none", "me/x")
    assert code == 2 and "no such run folder" in err and err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = linsight("push", run_folder, "me/colours")
    assert code == 2 and "hf auth login" in err and "hf_wrong" not in err
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.log)
    code, _, err = linsight("push", run_folder, "me/colours")
    assert code == 2 and "no token" in err and len(hub.log) == asked


def test_what_keeps_from_fetching_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.add("me/empty", {"config.json": b"{}"})
    hub.add("me/none", {"README.md": b""})
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for name, said in (
        ("me/missing", "no such repository"),
        ("me/empty", "no model.safetensors"),
        ("me/none", "no config.json"),
        ("me/x y", "OWNER/NAME"),
        ("me/../x", "OWNER/NAME"),
        ("hf-hub:../../etc", "OWNER/NAME"),
        ("../x", "no such folder"),
        (str(tmp_path / "none"), "no such folder"),
        ("inline_deit_tiny", "linsight.create_model"),
        ("me/x@../../y", "no name of a branch"),
    ):
        with pytest.raises(LinsightError, match=said) as caught:
            linsight.from_pretrained(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    for call in (lambda: linsight.from_pretrained("me/far"), lambda: linsight.create_model("hf-hub:me/far")):
        with pytest.raises(LinsightError, match=r"cannot be (reached|spoken to)") as caught:
            call()
        assert "\n" not in str(caught.value)
