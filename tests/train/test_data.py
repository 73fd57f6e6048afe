import io
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small import TINY, colours, truncate

from linsight.data.datasets import open_evaluation
from linsight.data.images import Samples, cached, collate, decode, eval_transform, train_transform
from linsight.data.random import key
from linsight.errors import LinsightError
from linsight.runtime.files import write_json
from linsight.train import Trained, open_data, resolve, train
from linsight.train.evaluation import prepare
from linsight.train.model import build


def recipe(data, **overrides):
    return resolve(
        "digits", {**TINY, "data": str(data), "in_chans": 3, "mean": (), "std": (), "cache": False, **overrides}
    )


def pack(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
    return path


def parquet(path, images, labels, names=("blue", "green", "red"), image_key="image"):
    features = datasets.Features({image_key: datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    table = datasets.Dataset.from_dict({image_key: images, "label": labels}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)


def png(level):
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(data, "png")
    return {"bytes": data.getvalue(), "path": None}


def test_digits_are_split_once_and_for_all():
    data = open_data(resolve("digits"))
    assert (len(data.train), len(data.val), data.classes) == (1438, 359, tuple("0123456789"))
    image = data.train.image(0, "L")
    assert (image.mode, image.size) == ("L", (8, 8))
    assert not {data.train.indices[i] for i in range(1438)} & {data.val.indices[i] for i in range(359)}


def test_a_folder_of_classes_holds_out_a_share_of_each_and_says_so(folder):
    data = open_data(recipe(folder))
    assert (len(data.train), len(data.val), data.classes) == (48, 12, ("blue", "green", "red"))
    assert sorted(data.val.targets) == [0] * 4 + [1] * 4 + [2] * 4
    assert "12 of its 60 images are held out" in data.notes[0]


@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_split_folders_are_used(tmp_path, val):
    for split, count in (("train", 4), (val, 2)):
        colours(tmp_path / "d" / split, {"a": count, "b": count})
    data = open_data(recipe(tmp_path / "d"))
    assert (len(data.train), len(data.val)) == (8, 4)
    assert bool(data.notes) == (val == "test")


def test_a_train_folder_alone_is_held_out_from(tmp_path):
    colours(tmp_path / "d" / "train", {"a": 10, "b": 10})
    data = open_data(recipe(tmp_path / "d"))
    assert (len(data.train), len(data.val)) == (16, 4)


def test_tars_are_read_alone_and_by_split(tmp_path, folder):
    alone = open_data(recipe(pack(folder, tmp_path / "all.tar")))
    assert (len(alone.train), len(alone.val), alone.classes) == (48, 12, ("blue", "green", "red"))
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        pack(folder, tmp_path / "tars" / f"{split}.tar")
    split = open_data(recipe(tmp_path / "tars"))
    assert (len(split.train), len(split.val)) == (60, 60)
    assert split.train.image(0, "RGB").size == (12, 10)


def test_parquet_files_are_read_by_the_types_of_their_columns(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        parquet(
            tmp_path / "d" / f"{split}-00000-of-00001.parquet",
            [png(i) for i in range(count)],
            [i % 3 for i in range(count)],
            image_key="picture",
        )
    data = open_data(recipe(tmp_path / "d", data_dir=str(tmp_path / "cache")))
    assert (len(data.train), len(data.val), data.classes) == (6, 3, ("blue", "green", "red"))
    assert data.train.targets == [0, 1, 2, 0, 1, 2]
    assert "evaluated on test" in data.notes[0]


def test_parts_of_splits_are_those_of_hugging_face(tmp_path):
    for split, count in (("train", 12), ("test", 6)):
        images, labels = [png(i) for i in range(count)], [i % 3 for i in range(count)]
        parquet(tmp_path / "d" / f"{split}-00000-of-00001.parquet", images, labels)
    splits = {"train_split": "train[:9]", "val_split": "test[3:]"}
    data = open_data(recipe(tmp_path / "d", data_dir=str(tmp_path / "cache"), **splits))
    assert (len(data.train), len(data.val), data.notes) == (9, 3, ())


def test_a_row_without_a_label_or_an_image_is_named(tmp_path):
    parquet(tmp_path / "a" / "train.parquet", [png(1), png(2)], [0, None])
    with pytest.raises(LinsightError, match="has no label"):
        open_data(recipe(tmp_path / "a", data_dir=str(tmp_path / "cache")))
    parquet(tmp_path / "b" / "train.parquet", [png(1), None] * 10, [0, 1] * 10)
    data = open_data(recipe(tmp_path / "b", data_dir=str(tmp_path / "cache")))
    assert "no image there" in decode(data.train, data.train.targets.index(1), "RGB")


def test_a_negative_number_is_no_class_and_images_alone_are_told(tmp_path):
    for name, columns, line in (
        ("a", {"image": [png(1), png(2)] * 4, "label": [0, -1] * 4}, "'row 1' of .* has no label"),
        ("b", {"image": [png(1), png(2)]}, "has one column only, and no other for label_key="),
    ):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(LinsightError, match=line):
            open_data(recipe(tmp_path / name, data_dir=str(tmp_path / "cache")))


def test_names_of_torchvision_go_through_timm(folder):
    data = open_data(recipe("torch/image_folder", data_dir=str(folder)))
    assert data.classes == ("blue", "green", "red") and len(data.train) == 60


def messages(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("no image")
    hollow = colours(tmp_path / "hollow", {"a": 3, "b": 3})
    (hollow / "c").mkdir()
    one = colours(tmp_path / "one", {"a": 3})
    lone = colours(tmp_path / "lone", {"a": 3, "b": 1})
    stray = colours(tmp_path / "stray", {"a": 3, "b": 3})
    shutil.copy(stray / "a" / "0.png", stray / "0.png")
    odd = tmp_path / "odd"
    colours(odd / "train", {"a": 3, "b": 3})
    colours(odd / "val", {"a": 3, "z": 3})
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    (tmp_path / "file.txt").write_text("no data")
    return {
        "missing": (tmp_path / "nowhere", "no such data folder"),
        "empty": (empty, "is empty"),
        "no image": (tmp_path / "text", "no image in"),
        "class without image": (hollow, r"class folder '.*c' has no image"),
        "one class": (one, "has one class only"),
        "one image": (lone, "too few images to hold one out"),
        "stray": (stray, "is in no class folder"),
        "classes differ": (odd, "'b' is in one of them only"),
        "no tar": (tmp_path / "broken.tar", "is no readable tar file"),
        "no data": (tmp_path / "file.txt", "is no data"),
        "stream": ("wds/imagenet", "give the shards themselves"),
        "torch without folder": ("torch/cifar10", "--data-dir"),
    }


def test_data_that_cannot_be_used_is_named_in_one_line(tmp_path):
    for case, (data, message) in messages(tmp_path).items():
        with pytest.raises(LinsightError, match=message) as raised:
            open_data(recipe(data))
        assert "\n" not in str(raised.value), case
    with pytest.raises(LinsightError, match="no data set that timm knows"):
        open_data(recipe("torch/cifar1", data_dir=str(tmp_path)))
    with pytest.raises(LinsightError, match=r"CIFAR|not found|corrupt"):
        open_data(recipe("torch/cifar10", data_dir=str(tmp_path)))


def test_a_split_that_is_not_there_offers_the_nearest(tmp_path):
    for split in ("train", "val"):
        colours(tmp_path / "d" / split, {"a": 3, "b": 3})
    with pytest.raises(LinsightError, match="did you mean 'val'"):
        open_data(recipe(tmp_path / "d", val_split="vall"))


def test_evaluation_takes_a_folder_with_some_of_the_classes_only(folder):
    shutil.rmtree(folder / "blue")
    source = open_evaluation(recipe(folder), None, ("blue", "green", "red"))
    assert len(source) == 40 and set(source.targets) == {1, 2}
    with pytest.raises(LinsightError, match="has the class 'green', which the model was not trained on"):
        open_evaluation(recipe(folder), None, ("blue", "red"))
    # weights that do not name their classes take as many in their order
    assert set(open_evaluation(recipe(folder), None, ("0", "1"), in_order=True).targets) == {0, 1}


def test_a_run_is_evaluated_by_the_names_of_its_classes(folder, tmp_path):
    chosen = recipe(folder)
    write_json(tmp_path / "config.json", {"recipe": chosen.values()})
    trained = Trained(build(chosen, 3), chosen, ("red", "blue", "green"), tmp_path / "best.safetensors")
    for given in (None, str(folder)):
        prepared = prepare(trained, given, None, 60, "cpu", "off", 0, "skip", None)
        source = prepared.feed.dataset.source
        assert {trained.classes[source.targets[i]] for i in range(len(source))} == {"blue", "green", "red"}
        assert all(source.name(i).startswith(trained.classes[source.targets[i]]) for i in range(len(source)))
        assert torch.cat([batch.targets for batch in prepared.feed]).tolist() == source.targets
    (folder / "red").rename(folder / "rot")
    with pytest.raises(LinsightError, match="the class 'rot', which the model was not trained on: it knows 'red'"):
        prepare(trained, None, None, 60, "cpu", "off", 0, "skip", None)


def test_bad_images_are_left_out_of_a_batch_by_name(folder):
    truncate(folder / "red" / "3.png")
    (folder / "red" / "4.png").write_text("no image")
    data = open_data(recipe(folder, val_fraction=0.01)).train.whole
    samples = Samples(data, eval_transform(recipe(folder), (8, 8)), 3, 0)
    batch = collate([samples[0, i] for i in range(60)])
    assert batch.images.shape == (58, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert len(batch.bad) == 2 and "3.png: " in batch.bad[0] and "4.png: not an image" in batch.bad[1]
    kept, bad, _ = cached(data, 3)
    assert len(kept) == 60 and bad == batch.bad
    again = Samples(kept, eval_transform(recipe(folder), (8, 8)), 3, 0)
    found = collate([again[0, i] for i in range(60)])
    assert torch.equal(found.images, batch.images) and torch.equal(found.targets, batch.targets)
    assert found.bad == batch.bad
    assert collate([batch.bad[0]]).images.numel() == 0


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("crop_mode", ["rrc", "rkrc", "pad", "none"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(folder, in_chans, crop_mode):
    chosen = recipe(folder, crop_mode=crop_mode, color_jitter=0.4, auto_augment=None, hflip=0.5, in_chans=in_chans)
    samples = Samples(open_data(chosen).train, train_transform(chosen, (8, 6)), in_chans, seed=1)
    first = samples[0, 5][0]
    assert first.shape == (in_chans, 8, 6) and first.dtype == torch.uint8
    torch.manual_seed(key(9))
    assert torch.equal(first, samples[0, 5][0])
    assert any(not torch.equal(first, samples[epoch, 5][0]) for epoch in (1, 2, 3))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m10-mstd0-inc1", "rand-m0-mstd0", "rand-m9-mstd0.5-inc1", "augmix-m10"])
def test_timm_s_policies_run_at_their_ends_on_colour_and_on_grey(folder, policy, in_chans):
    chosen = recipe(folder, auto_augment=policy, in_chans=in_chans)
    samples = Samples(open_data(chosen).train, train_transform(chosen, (16, 16)), in_chans, seed=0)
    drawn = (samples[epoch, index][0] for epoch in range(5) for index in range(len(samples)))
    assert all(image.shape == (in_chans, 16, 16) for image in drawn)


def test_an_unknown_policy_of_augmentation_is_one_line(folder):
    with pytest.raises(LinsightError, match="auto_augment='rond-m9' is no policy"):
        train_transform(recipe(folder, auto_augment="rond-m9"), (8, 8))


def test_drafts_are_large_jpegs_at_a_fraction_of_their_size(tmp_path):
    data = colours(tmp_path / "d", {"a": 2, "b": 2}, size=(400, 300), suffix=".jpg")
    shutil.move(colours(tmp_path / "p", {"a": 1}, size=(400, 300)) / "a" / "0.png", data / "a" / "1.png")
    source = open_data(recipe(data, val_fraction=0.1)).train.whole
    for draft, sizes in ((0, {(400, 300)}), (100, {(200, 150), (400, 300)}), (151, {(400, 300)}), (75, {(100, 75)})):
        seen = []
        samples = Samples(source, lambda image, seen=seen: seen.append(image.size), 3, 0, draft=draft)
        assert all(not isinstance(samples[0, index], str) for index in range(len(source)))
        assert set(seen) == sizes | {(400, 300)}, draft
    with pytest.raises(LinsightError, match="draft=9 decodes anew in every epoch, and cache=memory keeps the whole"):
        train(recipe(data, draft=9, cache="memory"), out=tmp_path / "run")
