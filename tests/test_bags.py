"""Bag models that learn from folders of bags: the recipe by hand, measures, layouts, mistakes, and the command."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import f1_score, roc_auc_score

from linsight.errors import CheckpointError, LinsightError
from linsight.models.bags import Acmil, bag_loss
from linsight.models.bags.acmil import MASKED
from linsight.slides import Bag, judge_bags, load_bag_model, open_bags, train_bags
from linsight.tasks import ClassifyRecipe
from linsight.train.model import build, save

WIDTH = 6
VIT = {"patch_size": 4, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "img_size": 16}


def write(path, key=None, tiles=7, width=WIDTH, seed=0):
    """A bag of noise, one tile of which has a large feature at `key`."""
    features = 0.1 * torch.randn(tiles, width, generator=torch.Generator().manual_seed(seed))
    if key is not None:
        features[seed % tiles, key] = 3.0
    path.parent.mkdir(parents=True, exist_ok=True)
    places = torch.stack([torch.arange(tiles), torch.zeros(tiles, dtype=torch.long)], dim=1)
    Bag(features, places, torch.zeros(3, tiles, 1, dtype=torch.uint8), (tiles, 1), 16).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes, of which the tile with the key tells, in train/ and val/."""
    for split, count in (("train", 6), ("val", 3)):
        for key, name in enumerate(("none", "one", "two")):
            for number in range(count):
                at = tmp_path / "bags" / split / name / f"slide{number}.safetensors"
                write(at, key or None, 5 + number, seed=100 * key + number + 50 * (split == "val"))
    return tmp_path / "bags"


def model(**options):
    torch.manual_seed(0)
    return Acmil(WIDTH, 3, inner_dim=16, hidden_dim=8, branches=2, n_masked=0, **options)


def test_the_steps_are_those_of_the_recipe(folder):
    train, val = open_bags(folder)
    ours, steps, seen = model(), [], []
    theirs = copy.deepcopy(ours)
    learned = train_bags(ours, train, val, epochs=2, lr=1e-2, report=lambda *told: seen.append(told))
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=1e-5)
    order = torch.Generator().manual_seed(0)
    for epoch in range(2):
        for index in torch.randperm(18, generator=order).tolist():
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 + np.cos(np.pi * len(steps) / 36)) / 2
            loss = bag_loss(theirs.train()(train.features(index)[None]), torch.tensor([train.targets[index]])).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        assert seen[epoch][0] == epoch + 1
        assert seen[epoch][1]["train_loss"] == pytest.approx(np.mean(steps[18 * epoch :]), rel=1e-4)
        found = judge_bags(theirs.eval(), val)
        assert {name: seen[epoch][1][name] for name in found} == pytest.approx(found, rel=1e-3)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert learned.model is not ours and not learned.model.training


@pytest.mark.parametrize("kind", ["gated", "multihead"])
def test_it_finds_the_tile_that_tells_and_keeps_the_best_epoch(folder, kind, tmp_path):
    train, val = open_bags(folder)
    seen = []
    learned = train_bags(
        model(kind=kind, num_heads=4), train, val, epochs=15, lr=1e-2, report=lambda *told: seen.append(told)
    )
    best = max(seen, key=lambda told: (told[1]["f1"] + told[1]["auc"], -told[1]["loss"]))
    assert learned.epoch == best[0] and learned.measures["accuracy"] > 85
    assert judge_bags(learned.model, val) == pytest.approx(dict(learned.measures))
    learned.save(tmp_path / "model.safetensors")
    again = load_bag_model(tmp_path / "model.safetensors")
    assert again.classes == ("none", "one", "two") and again.kind == kind
    assert judge_bags(again, val) == pytest.approx(dict(learned.measures))


def test_measures_are_those_of_sklearn(folder):
    _, val = open_bags(folder)
    judge = model().eval()
    with torch.no_grad():
        shares = torch.cat([judge(val.features(i)[None]).logits for i in range(9)]).softmax(-1)
    guesses, truths = shares.argmax(-1), np.array(val.targets)
    found = judge_bags(judge, val)
    assert found["f1"] == pytest.approx(
        100 * f1_score(truths, guesses, average="macro", labels=[0, 1, 2], zero_division=0)
    )
    assert found["auc"] == pytest.approx(100 * roc_auc_score(truths, shares.double(), multi_class="ovr"))
    assert found["accuracy"] == pytest.approx(100 * float((guesses.numpy() == truths).mean()))


def test_classes_that_val_has_not_do_not_count(folder):
    for file in (folder / "val" / "one").iterdir():
        file.unlink()
    train, val = open_bags(folder)
    assert train.classes == ("none", "one", "two") and set(val.targets) == {0, 2}
    found = judge_bags(model().eval(), val)
    assert all(np.isfinite(value) for value in found.values())


def test_a_fifth_is_held_out_where_there_are_no_splits(folder, tmp_path):
    (folder / "train").rename(tmp_path / "alone")
    train, val = open_bags(tmp_path / "alone")
    assert (len(train), len(val)) == (15, 3) and sorted(val.targets) == [0, 1, 2]
    assert not set(train.files) & set(val.files)
    again = open_bags(tmp_path / "alone")
    assert [part.files for part in again] == [train.files, val.files]


def test_files_of_systems_are_no_bags_and_suffixes_may_be_large(folder):
    (folder / "train" / "one" / "._slide0.safetensors").write_bytes(b"of another system")
    (folder / "train" / "one" / "slide0.safetensors").rename(folder / "train" / "one" / "A.SAFETENSORS")
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "test")
    train, test = open_bags(folder)
    assert (len(train), len(test)) == (18, 9) and (train.label, test.label) == ("Training", "test")


def test_the_best_model_is_kept_as_soon_as_it_is_there(folder, tmp_path, linsight, monkeypatch):
    out = tmp_path / "model.safetensors"

    def stopped(*_):
        raise KeyboardInterrupt

    train, val = open_bags(folder)
    with pytest.raises(KeyboardInterrupt):
        train_bags(model(), train, val, improved=lambda best: best.save(out), report=stopped)
    assert load_bag_model(out).classes == ("none", "one", "two")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_may_have_another_dtype(folder, dtype):
    train, val = open_bags(folder)
    learned = train_bags(model().to(dtype), train, val, epochs=1)
    assert np.isfinite(learned.measures["loss"]) and learned.model.classes == train.classes


@pytest.mark.parametrize("about", [{"classes": "a,b"}, {"num_heads": "many"}, {"classes": "7"}, {"classes": '["a"]'}])
def test_words_beside_weights_that_are_not_ours(tmp_path, about):
    save_file(model().state_dict(), tmp_path / "a.safetensors", about)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_bag_model(tmp_path / "a.safetensors")


def broken(folder, how):
    train = folder / "train"
    if how == "no folder":
        return folder / "nothing"
    if how == "one class":
        return folder / "train" / "one"
    if how == "no val":
        (folder / "val").rename(folder / ".val")
    if how == "no train":
        (folder / "train").rename(folder / ".train")
    if how == "class beside splits":
        write(folder / "other" / "a.safetensors")
    if how == "two of a split":
        write(folder / "training" / "one" / "a.safetensors")
    if how == "broken link":
        (train / "one" / "zz.safetensors").symlink_to(folder / "nothing")
    if how == "a class of val alone":
        write(folder / "val" / "three" / "a.safetensors")
    if how == "width":
        write(train / "one" / "slide2.safetensors", width=4)
    if how == "nan":
        save_file({"features": torch.full((3, WIDTH), torch.nan)}, train / "two" / "slide1.safetensors")
    if how == "no bag":
        (train / "none" / "slide0.safetensors").write_bytes(b"nothing of this kind")
    if how == "no tiles":
        save_file({"features": torch.zeros(0, WIDTH)}, train / "two" / "slide1.safetensors")
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no folder", "no such folder of bags"),
        ("one class", "has bags of no class: give 2 or more folders of classes"),
        ("no val", "has no folder val to be judged by, beside train"),
        ("no train", "has no folder train to learn from, beside val"),
        ("class beside splits", "has the class 'other' beside the split"),
        ("two of a split", "has two folders for one split, 'train' and 'training': keep one"),
        ("a class of val alone", "three' is a class that"),
        ("width", "slide2.safetensors' has features of 4 channels, and '.*slide0.safetensors' of 6"),
        ("broken link", "zz.safetensors' is not there, or is a broken link"),
        ("nan", "slide1.safetensors' has features that are no numbers"),
        ("no bag", "slide0.safetensors' is no bag of tiles"),
        ("no tiles", r"slide1.safetensors' has features of shape \(0, 6\), where a bag has \(tiles, channels\)"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_no_file(folder, tmp_path, linsight, how, words):
    out = tmp_path / "model.safetensors"
    code, _, err = linsight("bags", broken(folder, how), "--out", out, "--epochs", 1)
    assert code == 2 and not out.exists()
    last = err.splitlines()[-1]
    with pytest.raises(LinsightError, match=words):
        raise LinsightError(last)


@pytest.mark.parametrize(
    "options",
    [
        ("--out", "a.pth"),
        ("--out", "no/such/a.safetensors"),
        ("--kind", "soft"),
        ("--kind", "multihead", "--heads", 2),
        ("--seed", 2**64),
    ],
)
def test_options_that_cannot_be(folder, tmp_path, linsight, options):
    given = options if "--out" in options else (*options, "--out", tmp_path / "a.safetensors")
    code, _, err = linsight("bags", folder, *given)
    assert code == 2 and "Traceback" not in err


def test_what_does_not_go_together_is_refused(folder):
    train, val = open_bags(folder)
    with pytest.raises(LinsightError, match="of 4 channels and 3 classes, and the bags are of 6 and 3"):
        train_bags(Acmil(4, 3), train, val)
    with pytest.raises(LinsightError, match="epochs=0"):
        train_bags(model(), train, val, epochs=0)
    with pytest.raises(LinsightError, match="the loss became nan in epoch 1: try a smaller lr"):
        train_bags(model(), train, val, lr=1e30)


def test_bags_are_looked_at_before_they_are_used():
    judge, bags = model(), torch.randn(2, 5, WIDTH)
    some = torch.ones(2, 5, dtype=torch.bool)
    none = some & torch.tensor([[True], [False]])
    for wrong in (bags[0], bags[..., :3], bags[:, :0], bags.half(), bags.long(), bags.to("meta"), bags.tolist()):
        with pytest.raises(LinsightError, match="bags") as caught:
            judge(wrong)
        assert "\n" not in str(caught.value)
    for keep in (some.float(), some[:, :4], some.to("meta"), some.tolist(), none):
        with pytest.raises(LinsightError, match="keep"):
            judge(bags, keep)
    for labels in (torch.zeros(2), torch.zeros(1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(LinsightError, match="labels"):
            bag_loss(judge(bags), labels)
    for name, value in (("branches", 0), ("inner_dim", -4), ("hidden_dim", 2.0), ("n_masked", -1), ("mask_drop", 1)):
        with pytest.raises(LinsightError, match=name):
            Acmil(WIDTH, 3, **{name: value})


@pytest.mark.parametrize("kind", ["gated", "multihead"])
def test_as_many_patches_of_a_padded_bag_are_left_out_as_of_it_alone(kind):
    """Of three patches one, though there are ten to draw from with padding; and no padding."""
    judge = Acmil(WIDTH, 3, kind=kind, inner_dim=16, branches=2, num_heads=2, n_masked=10, mask_drop=0.6).train()
    keep = torch.arange(12) < torch.tensor([[12], [3], [1]])
    scores = judge(torch.randn(3, 12, WIDTH), keep).scores
    left_out = scores == MASKED
    assert (left_out.sum(-1) == torch.tensor([6, 1, 0])[:, None, None]).all()
    assert torch.equal(scores.isinf(), ~keep[:, None, None].expand_as(scores))
    seen = {
        place
        for _ in range(40)
        for place in (judge(torch.randn(3, 12, WIDTH), keep).scores == MASKED)[1].nonzero()[:, -1].tolist()
    }
    assert seen == {0, 1, 2}


def test_from_slides_to_a_label_on_the_command_line(tmp_path, linsight):
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    recipe = ClassifyRecipe(model="vit_tiny", attention="inline", model_args=args, img_size=(16, 16))
    save(tmp_path / "best.safetensors", build(recipe, 2).state_dict(), recipe, {"classes": ("a", "b")})
    rng = np.random.default_rng(0)
    for place, name in enumerate(("light", "dark")):
        for number in range(6):
            low, high = ((128, 256), (0, 128))[place]
            image = rng.integers(low, high, (32, 48, 3), dtype=np.uint8)
            picture = tmp_path / f"{name}{number}.png"
            Image.fromarray(image).save(picture)
            at = tmp_path / "bags" / name / f"{number}.safetensors"
            at.parent.mkdir(parents=True, exist_ok=True)
            code, _, err = linsight("slide", tmp_path / "best.safetensors", picture, "--tissue", 0, "--bag", at)
            assert code == 0, err
    out = tmp_path / "model.safetensors"
    code, said, err = linsight("bags", tmp_path / "bags", "--out", out, "--epochs", 20, "--lr", 1e-2, "--json")
    assert code == 0, err
    told = json.loads(said)
    assert told["accuracy"] == 100 and told["classes"] == ["dark", "light"] and err.count("epoch ") == 20
    ask = ("slide", tmp_path / "best.safetensors", tmp_path / "dark0.png", "--tissue", 0, "--bag-model", out, "--json")
    code, said, err = linsight(*ask)
    assert code == 0, err
    assert json.loads(said)["class"] == "dark"
