"""Folders, archives and Parquet files are read as their layout says, or refused in one line."""

import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import mutated_layouts

from linsight.data.datasets import open_evaluation, under
from linsight.errors import LinsightError
from linsight.train import open_data, resolve

PNG = mutated_layouts.picture()


def put(root, *names):
    """Write files: images, if their names are, or end in a number of them."""
    for name in names:
        name, _, many = name.partition("*")
        for number in range(int(many or 1)):
            path = root / (f"{name}/{number}.png" if many else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PNG)
    return root


def packed(root, path, start="./"):
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=start)
    return path


def data(place, **fields):
    return open_data(resolve("photos", {"data": str(place), **fields}))


def counts(place, **fields):
    return mutated_layouts.answer(data(place, **fields))


def refused(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_first_folder_is_the_class_in_folders_and_in_archives(tmp_path):
    root = put(tmp_path / "d", "benign/left*3", "benign/right*3", "malignant/left*3", "malignant/right/deep*3")
    assert counts(root) == {"benign": (5, 1), "malignant": (5, 1)}
    found = [counts(packed(root, tmp_path / "d.tar", start)) for start in ("./", "d", "")]
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for path in root.rglob("*.png"):
            file.write(path, path.relative_to(root))
    assert found == [counts(root)] * 3 and counts(tmp_path / "d.zip") == counts(root)
    zipped = data(tmp_path / "d.zip").train
    for source in (zipped, pickle.loads(pickle.dumps(zipped))):  # before and after it was read, for other processes
        assert source.image(0, "RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("train", ["Train", "TRAINING", "training_set", "train2017"])
@pytest.mark.parametrize("val", ["Test", "VALIDATION", "dev", "valid", "testing", "test_images"])
def test_splits_are_known_in_any_spelling_and_never_pooled(tmp_path, train, val):
    root = put(tmp_path / "d", *(f"{split}/{name}*{n}" for split, n in ((train, 3), (val, 2)) for name in "ab"))
    assert counts(root) == {"a": (3, 2), "b": (3, 2)}
    assert counts(packed(root, tmp_path / "d.tar", "data")) == counts(root)
    assert (
        len(open_evaluation(resolve("photos", {"data": str(root)}), "test" if "est" in val else "val", ("a", "b"))) == 4
    )


AMBIGUOUS = {
    "images beside classes": (("a*2", "b*2", "0.png"), "0.png' is in no class folder"),
    "images in a split": (("train/0.png", "test/0.png"), "no class folder, but 1 image directly in it"),
    "images beside the classes of a split": (("train/a*2", "train/b*2", "train/0.png"), "train/0.png' is in no class"),
    "a split beside classes": (("train/a*2", "train/b*2", "c*2"), "the split folder 'train' beside 'c'"),
    "a class called train": (("bus*2", "car*2", "train*2"), "if all are classes, put them into a folder 'train'"),
    "splits, none to train on": (("val/a*2", "test/b*2"), "none to train on"),
    "one split in two cases": (("Train/a*2", "train/b*2"), "has the splits 'Train', 'train'"),
    "two validation splits": (("train/a*2", "train/b*2", "val/a*1", "dev/a*1"), "name one with val_split="),
    "other classes": (("train/a*2", "train/b*2", "val/a*2", "val/c*2"), "in one of them only (train: 'b'; val: 'c')"),
    "splits inside of classes": (("a/train*2", "b/train*2", "b/test*2"), "put splits first"),
    "splits in a split": (("train/train/a*2", "train/test/a*2"), "has splits in it"),
    "splits by another name": (("pets_train/a*2", "pets_test/a*2"), "look like splits"),
    "one class": (("a/left*2", "a/right*2"), "one class only ('a')"),
    "no images": (("a/0.txt", "b/0.txt"), "2 files of other kinds left out: .txt 2"),
    "a class of others": (("a*2", "b*2", "c/0.txt"), "c' has no image (1 file of another kind left out: .txt 1)"),
    "a class of one": (("a*2", "b*1"), "1 class of"),
    "Parquet beside": (("a*2", "b*2", "x.parquet"), "4 images and 1 Parquet file"),
    "two spellings": (
        ("\N{LATIN SMALL LETTER E WITH ACUTE}*2", "e\N{COMBINING ACUTE ACCENT}*2"),
        "spells in two ways",
    ),
    "no text": ((os.fsdecode(b"caf\xe9") + "*2", "b*2"), "no UTF-8"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_layouts_are_one_line(tmp_path, case):
    names, word = AMBIGUOUS[case]
    root = put(tmp_path / "d", *names)
    refused(lambda: data(root), word)


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    root = put(tmp_path / "d", "cat*4", "dog*4")
    put(root, "cat/.ipynb_checkpoints*2", "__MACOSX/cat/._0.png", "cat/._0.png", "$RECYCLE.BIN*2", "@eaDir/a*1")
    put(root, "Thumbs.db", "cat/.DS_Store", "dog/desktop.ini")
    found = data(root)
    assert mutated_layouts.answer(found) == {"cat": (3, 1), "dog": (3, 1)}
    assert len(found.notes) == 1 and "left out" not in found.notes[0]
    assert counts(packed(root, tmp_path / "d.tar")) == counts(root)


def test_what_is_left_out_is_counted_once(tmp_path):
    root = put(tmp_path / "d", *(f"{s}/{c}*2" for s in ("train", "val") for c in "ab"))
    put(root, *(f"train/a/{n}.txt" for n in range(12)), "train/b/x", "val/a/y.csv")
    (root / "val" / "b" / "gone.png").symlink_to("nowhere")
    lines = (
        "13 files of other kinds left out: .txt 12, without extension 1",
        "1 file of another kind left out: .csv 1",
    )
    gone = "1 broken link left out: 'val/b/gone.png'"
    assert data(root).notes == (gone, lines[0], f"val: {lines[1]}")
    assert open_evaluation(resolve("photos", {"data": str(root)}), None, ("b", "a")).notes == (gone, lines[1])


def test_links_are_followed_once_and_broken_ones_are_said(tmp_path):
    root = put(tmp_path / "d", "cat*4", "dog*4", "other/0.txt")
    (root / "other" / "0.txt").unlink()
    (root / "other").rmdir()
    elsewhere = put(tmp_path / "more", "*3".join(["x", ""]))
    (root / "cat" / "more").symlink_to(elsewhere)
    (root / "cat" / "round").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "dog" / "self.png").symlink_to("self.png")
    os.mkfifo(root / "dog" / "pipe.png")
    found = data(root)
    assert {name: sum(pair) for name, pair in mutated_layouts.answer(found).items()} == {"cat": 7, "dog": 4}
    told = " ".join(found.notes)
    assert "2 broken links left out: 'dog/gone.png', 'dog/self.png'" in told
    assert "1 link to a folder that was entered already left out: 'cat/round'" in told and "1 pipe or device" in told


def test_classes_are_in_torchvision_s_order_in_folders_tars_and_parquet(tmp_path):
    names = ["10", "9", "B", "a", "$x", "two words", "new\nline"]
    root = put(tmp_path / "d", *(f"{name}*2" for name in names))
    rows = [(PNG, name) for name in names for _ in range(2)]
    table = datasets.Dataset.from_dict({"picture": [row[0] for row in rows], "kind": [row[1] for row in rows]})
    (tmp_path / "p").mkdir()
    table.to_parquet(tmp_path / "p" / "all.parquet")
    in_parquet = data(tmp_path / "p", data_dir=str(tmp_path / "cache"))
    assert in_parquet.val.image(0, "RGB").size == (2, 2)
    found = [data(root).classes, data(packed(root, tmp_path / "d.tar")).classes, in_parquet.classes]
    assert found == [tuple(sorted(names))] * 3


def test_classes_that_differ_in_case_and_classes_without_images_are_said(tmp_path):
    root = put(tmp_path / "d", *(f"train/{name}*2" for name in ("Cat", "cat", "dog")), "val/cat*2", "val/dog*2")
    told = " ".join(data(root).notes)
    assert "has the classes 'Cat' and 'cat'" in told
    assert "no image to evaluate on of 1 of 3 classes: 'Cat'" in told
    assert data(root).val.targets == [1, 1, 2, 2]


def test_named_splits_leave_others_alone(tmp_path):
    root = put(tmp_path / "d", *(f"fold{k}/{name}*{k}" for k in (1, 2, 3) for name in "ab"))
    assert counts(root, train_split="fold3", val_split="fold1") == {"a": (3, 1), "b": (3, 1)}
    assert "beside" in data(root, train_split="fold3", val_split="fold1").notes[0]
    assert open_evaluation(resolve("photos", {"data": str(root)}), "fold2", ("b", "a")).targets == [1, 1, 0, 0]
    refused(lambda: data(root, val_split="test"), "unknown split", "test")


def tar_of(path, *members):
    """A tar of members: a name, of an image, or a name and the name that it links to."""
    with tarfile.open(path, "w") as tar:
        for name, *link in members:
            about = tarfile.TarInfo(name)
            about.size = 0 if link else len(PNG)
            if link:
                about.type, about.linkname = link
            tar.addfile(about, None if link else io.BytesIO(PNG))
    return path


def test_odd_tars_are_read(tmp_path):
    members = [(f"/x/{name}/{number}.PNG",) for name in "ab" for number in (10, 9)]
    links = [
        ("/x/a/2.png", tarfile.LNKTYPE, "/x/a/9.PNG"),
        ("/x/b/2.png", tarfile.SYMTYPE, "../a/10.PNG"),
        ("/x/b/3.png", tarfile.SYMTYPE, "gone.png"),
        ("/x/b/4.png", tarfile.SYMTYPE, "4.png"),
    ]
    found = data(tar_of(tmp_path / "d.tar", *members, *links, ("/x/a/9.PNG",)))
    assert {name: sum(pair) for name, pair in mutated_layouts.answer(found).items()} == {"a": 3, "b": 3}
    whole = found.train.whole
    assert [whole.name(index) for index in range(6)] == [
        f"x/{c}/{n}" for c in "ab" for n in ("2.png", "9.PNG", "10.PNG")
    ]
    assert all(whole.image(index, "RGB").getpixel((0, 0)) == (255, 0, 0) for index in range(6))
    assert "2 links to no file of the archive" in " ".join(found.notes)


def test_damaged_archives_are_one_line(tmp_path):
    root = put(tmp_path / "d", "a*3", "b*3")
    whole = packed(root, tmp_path / "d.tar").read_bytes()
    with tarfile.open(tmp_path / "d.tar") as tar:
        end = tar.getmembers()[-1].offset  # cut there, it is a tar without an end
    broken = {
        "short.tar": (whole[:end], "cut short"),
        "cut.tar": (whole[: end - 100], "no readable tar"),
        "header.tar": (whole[:1024] + b"x" * 512 + whole[1536:], "no readable tar"),
        "empty.tar": (b"", "no readable tar"),
        "gz.tar": (b"\x1f\x8b" + whole, "is compressed (gzip)"),
        "d.tar.zst": (b"(\xb5/\xfd" + whole, "is compressed (zstd)"),
        "d.zip": (b"PK\3\4" + whole, "no readable zip"),
    }
    for name, (content, word) in broken.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: data(tmp_path / name), word, name)
    refused(lambda: data(tar_of(tmp_path / "up.tar", ("../a/0.png",))), "leads out of it")
    labels = tar_of(tmp_path / "wds.tar", ("000.jpg",), ("000.cls",))  # which is no number, but bytes of an image
    refused(lambda: data(labels), "is no class, but a text")


def test_tars_of_splits_are_read_in_any_case(tmp_path):
    for split, count in (("Train", 3), ("TEST", 2)):
        root = put(tmp_path / split, f"{split}/a*{count}", f"{split}/b*{count}")
        (tmp_path / "t").mkdir(exist_ok=True)
        packed(root, tmp_path / "t" / f"{split}.tar")
    assert counts(tmp_path / "t") == {"a": (3, 2), "b": (3, 2)}
    (tmp_path / "t" / "extra.tar").write_bytes(b"")
    refused(lambda: data(tmp_path / "t"), "call them by their splits")


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def test_parquet_files_tell_their_split_by_name_and_their_columns_by_kind(tmp_path):
    cache = {"data_dir": str(tmp_path / "cache")}
    for name, labels in (("Train-00000-of-00002", [True, False, None]), ("Test", [True, False])):
        images = [{"bytes": PNG, "path": None}] * len(labels)
        table(tmp_path / "d[1]" / f"{name}.parquet", photo=images, good=labels)
    refused(lambda: data(tmp_path / "d[1]", **cache), "has no label")
    table(tmp_path / "d[1]" / "Train-00000-of-00002.parquet", photo=images, good=[True, False])
    found = data(tmp_path / "d[1]", **cache)
    assert mutated_layouts.answer(found) == {"False": (1, 1), "True": (1, 1)}
    assert found.train.image(0, "RGB").size == (2, 2)
    assert any("1 of the 2 files of 'Train'" in note for note in found.notes)


PARQUET = {
    "two spellings": ({"Train": [PNG], "train": [PNG]}, "splits 'Train', 'train'"),
    "no split beside one": ({"train": [PNG], "extra": [PNG]}, "'extra.parquet'"),
    "two splits in a name": ({"train_and_test": [PNG]}, "of several splits"),
    "no rows": ({"train": []}, "has no row"),
    "no images": ({"train": [3]}, "say which to use with image_key="),
    "lists": ({"train": [[PNG]]}, "say which to use with image_key="),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_that_cannot_be_used_is_one_line(tmp_path, case):
    files, word = PARQUET[case]
    for name, images in files.items():
        table(tmp_path / "d" / f"{name}.parquet", x=images, y=["a"] * len(images))
    refused(lambda: data(tmp_path / "d", data_dir=str(tmp_path / "cache")), word)


def test_parquet_files_of_a_split_are_alike(tmp_path):
    def write(name, labels, names=None, column="label"):
        path = tmp_path / "d" / name
        path.parent.mkdir(exist_ok=True)
        kind = datasets.ClassLabel(names=names) if names else None
        features = datasets.Features({"image": datasets.Value("binary"), column: kind}) if names else None
        datasets.Dataset.from_dict({"image": [PNG] * len(labels), column: labels}, features=features).to_parquet(path)

    def read():
        return data(tmp_path / "d", data_dir=str(tmp_path / "cache"))

    write("train-1.parquet", ["a", "b"])
    for other in (
        {"labels": [1, 2]},
        {"labels": ["a", "b"], "column": "kind"},
        {"labels": [0, 1], "names": ["a", "b"]},
    ):
        write("train-2.parquet", **other)
        refused(read, "differ in their columns", "train-2.parquet")
    write("train-1.parquet", [0, 1, 0, 1], ["x", "y"])
    write("train-2.parquet", [0, 1, 0, 1], ["y", "x"])
    refused(read, "differ in their columns 'label'")
    (tmp_path / "d" / "train-2.parquet").rename(tmp_path / "d" / "val.parquet")
    assert mutated_layouts.answer(read()) == {"x": (2, 2), "y": (2, 2)}
    assert (read().train.targets, read().val.targets) == ([0, 1, 0, 1], [1, 0, 1, 0])


def test_damaged_parquet_is_one_line(tmp_path, capfd):
    path = tmp_path / "d" / "train.parquet"
    table(path, image=[PNG] * 9, label=list("abc") * 3)
    whole = path.read_bytes()
    capfd.readouterr()
    for hurt in (b"", b"PAR1", whole[:-20], whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        path.write_bytes(hurt)
        refused(lambda: data(tmp_path / "d", data_dir=str(tmp_path / "cache")), "d")
    assert not capfd.readouterr().err


def test_a_model_s_classes_are_found_by_name_never_by_place(tmp_path):
    root = put(tmp_path / "d", "red*1", "blue*1", "e\N{COMBINING ACUTE ACCENT}*1")
    recipe = resolve("photos", {"data": str(root)})
    source = open_evaluation(recipe, None, ("red", "\N{LATIN SMALL LETTER E WITH ACUTE}", "grey", "blue"))
    assert sorted(source.targets) == [0, 1, 3]
    named = {source.name(index)[:1]: source.targets[index] for index in range(3)}
    assert named == {"r": 0, "b": 3, "e": 1}
    refused(lambda: open_evaluation(recipe, None, ("red", "Blue", "green")), "the class 'blue'", "it knows 'red'")
    numbers = resolve("photos", {"data": str(put(tmp_path / "n", "0*1", "2*1", "10*1"))})
    names = tuple(f"n{number:08}" for number in range(11))
    assert sorted(open_evaluation(numbers, None, names, in_order=True).targets) == [0, 2, 10]
    spelled = ("blue", "red", "e\N{COMBINING ACUTE ACCENT}")
    assert sorted(under(source, spelled, "d").targets) == [0, 1, 2]


def test_mutated_layouts_are_read_as_by_itself_or_refused_in_one_line(tmp_path):
    wrong = []
    for seed in range(1000, 1025):
        root = tmp_path / str(seed)
        mutated_layouts.make(root, seed)
        mutated_layouts.pack(root, tmp_path / f"{seed}.tar", seed)
        mutated_layouts.judge(root, root, True, wrong)
        mutated_layouts.judge(tmp_path / f"{seed}.tar", root, False, wrong)
    assert not wrong
