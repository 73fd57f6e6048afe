"""Masks beside images: how they are found, read and refused, and cropped with their images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from linsight.data.dense import MaskSamples, collate, open_evaluated_masks, open_masks
from linsight.data.masks import NONE, class_list, decode_mask
from linsight.errors import ImageError, LinsightError
from linsight.tasks import record_of

SIZE = (6, 8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def pair(folder, image, mask, values=((0, 1), (1, 255))):
    """An image of level 100 and a mask of a pattern of `values`."""
    write(folder / image, np.full((*SIZE, 3), 100, np.uint8))
    write(folder / mask, np.kron(np.array(values, np.uint8), np.ones((3, 4), np.uint8)))


def recipe(folder, **changes):
    return record_of("segment")(data=str(folder), **changes)


LAYOUTS = {
    "splits inside": ("images/train/{}.jpg", "masks/train/{}.png", "images/val/{}.jpg", "masks/val/{}.png"),
    "splits above": ("train/images/{}.jpg", "train/masks/{}.png", "val/images/{}.jpg", "val/masks/{}.png"),
    "SegNet": ("train/{}.png", "trainannot/{}.png", "val/{}.png", "valannot/{}.png"),
    "ADE20K": (
        *("images/training/{}.jpg", "annotations/training/{}.png"),
        *("images/validation/{}.jpg", "annotations/validation/{}.png"),
    ),
    "Cityscapes": (
        *("leftImg8bit/train/bonn/{}_leftImg8bit.png", "gtFine/train/bonn/{}_gtFine_labelTrainIds.png"),
        *("leftImg8bit/val/ulm/{}_leftImg8bit.png", "gtFine/val/ulm/{}_gtFine_labelTrainIds.png"),
    ),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_usual_layouts_are_found(names, tmp_path):
    for name in ("a", "b"):
        pair(tmp_path, names[0].format(name), names[1].format(name))
    pair(tmp_path, names[2].format("c"), names[3].format("c"))
    data = open_masks(recipe(tmp_path))
    assert (len(data.train), len(data.val), data.classes) == (2, 1, ("0", "1"))
    assert data.train.beside(0).tolist()[0] == [0] * 4 + [1] * 4
    assert data.train.beside(0).tolist()[-1] == [1] * 4 + [NONE] * 4


def test_of_several_masks_of_an_image_the_one_of_classes_is_taken(tmp_path):
    for split, city in (("train", "bonn"), ("val", "ulm")):
        pair(tmp_path, f"leftImg8bit/{split}/{city}/a_leftImg8bit.png", f"gtFine/{split}/{city}/a_gtFine_labelIds.png")
        name = f"gtFine/{split}/{city}/a_gtFine_labelTrainIds.png"
        write(tmp_path / name, np.tile(np.array([3, 4], np.uint8), (6, 4)))
        write(tmp_path / f"gtFine/{split}/{city}/a_gtFine_color.png", np.zeros((*SIZE, 3), np.uint8))
    assert open_masks(recipe(tmp_path)).classes == ("3", "4")


def test_without_splits_a_share_is_held_out(tmp_path):
    for number in range(10):
        pair(tmp_path, f"images/{number}.jpg", f"masks/{number}.png")
    data = open_masks(recipe(tmp_path, val_fraction=0.2))
    assert (len(data.train), len(data.val)) == (8, 2) and any("held out" in note for note in data.notes)


@pytest.mark.parametrize(
    "lines, ignore, values, names",
    [
        ("sky\nroad\n", 255, [0, 1, NONE], ("sky", "road")),
        ("sky\nroad\n", 0, [NONE, 0, None], ("sky", "road")),
        ("0 0 0 sky\n128 64 128 wide road\n", 255, [0, 1, NONE], ("sky", "wide road")),
        ("sky 0 0 0\nroad 128 64 128\n", 255, [0, 1, NONE], ("sky", "road")),
        (None, 255, [0, 1, NONE], ("0", "1")),
        (None, None, [0, 1, 2], ("0", "1", "255")),
        (None, 1, [0, NONE, 1], ("0", "255")),
    ],
)
def test_values_and_classes(lines, ignore, values, names, tmp_path):
    for split in ("train", "val"):
        pair(tmp_path, f"images/{split}/a.jpg", f"masks/{split}/a.png")
    if lines is not None:
        (tmp_path / "classes.txt").write_text(lines)
    data = open_masks(recipe(tmp_path, ignore=ignore))
    assert data.classes == names
    if None in values:  # 255 is no class, and not ignored
        with pytest.raises(ImageError, match=r"has the value 255, and its classes are 1 to 2: .* pass ignore=255"):
            data.train.beside(0)
        return
    mask = data.train.beside(0)
    assert [mask[0, 0], mask[0, -1], mask[-1, -1]] == values and mask.dtype == np.int16


def test_colours_are_told_by_the_list(tmp_path):
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[:, 4:] = (128, 64, 128)
    colours[0, 0] = (1, 2, 3)  # of no class
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.jpg", colours)
        write(tmp_path / f"masks/{split}/a.png", colours)
    with pytest.raises(ImageError, match="is a mask of colours: tell them in classes"):
        open_masks(recipe(tmp_path))
    (tmp_path / "class_dict.csv").write_text("name, r, g, b\nroad, 128, 64, 128\nvoid, 0, 0, 0\n")
    data = open_masks(recipe(tmp_path))
    mask = data.train.beside(0)
    assert data.classes == ("road", "void") and [mask[0, 0], mask[1, 0], mask[0, 4]] == [NONE, 1, 0]
    assert any("colours of no class, as 1 2 3 in 'masks/train/a.png', have 2.08 %" in note for note in data.notes)
    write(tmp_path / "masks/train/a.png", np.zeros((*SIZE, 3), np.uint8))  # black all over
    assert set(data.train.beside(0).flat) == {1}
    write(tmp_path / "masks/train/a.png", np.full((*SIZE, 3), 7, np.uint8))
    with pytest.raises(ImageError, match="none of its colours is in the list of classes, as 7 7 7"):
        data.train.beside(0)


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "values"])
def test_black_and_white_are_colours_where_a_list_says_so(kind, tmp_path):
    (tmp_path / "classes.txt").write_text("255 255 255 house\n0 0 0 rest\n" if kind != "values" else "rest\nhouse\n")
    level = np.kron(np.array([[0, 255], [0, 255]], np.uint8), np.ones((3, 4), np.uint8))
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.jpg", np.zeros((*SIZE, 3), np.uint8))
        for name, seen in (("a", level), ("b", level * 0)):
            write(tmp_path / f"images/{split}/{name}.jpg", np.zeros((*SIZE, 3), np.uint8))
            path = tmp_path / f"masks/{split}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(seen // 255 if kind == "values" else seen).convert(kind.replace("values", "L")).save(path)
    source = open_masks(recipe(tmp_path)).train
    rest = source.classes.index("rest")
    assert source.beside(0)[0].tolist() == [rest] * 4 + [1 - rest] * 4 and set(source.beside(1).flat) == {rest}


def test_a_mask_keeps_its_values_whatever_the_file(tmp_path):
    values = np.array([[0, 3], [200, 7]], np.uint8)
    image = Image.fromarray(values)
    image.save(tmp_path / "grey.png")
    palette = image.convert("P")
    palette.putpalette([255 - level for level in range(256) for _ in range(3)])
    palette.save(tmp_path / "palette.png")
    Image.merge("RGB", [image] * 3).save(tmp_path / "same.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("grey", "palette", "same", "deep"):
        assert decode_mask(tmp_path / f"{name}.png", name).tolist() == values.tolist()
    Image.fromarray(values > 100).save(tmp_path / "bits.png")
    assert decode_mask(tmp_path / "bits.png", "bits").tolist() == [[0, 0], [1, 0]]
    (tmp_path / "bad.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    with pytest.raises(ImageError, match="bad: "):
        decode_mask(tmp_path / "bad.png", "bad")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(ImageError, match="mode F tells no classes"):
        decode_mask(tmp_path / "real.tif", "real")


def refused(tmp_path, match, **changes):
    with pytest.raises(LinsightError, match=match) as caught:
        open_masks(recipe(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_what_is_no_such_data_is_refused(tmp_path):
    refused(tmp_path / "none", "no such data folder: .*: give one with images/ and masks/ in it")
    write(tmp_path / "images/train/a.jpg", np.zeros((*SIZE, 3), np.uint8))
    refused(tmp_path, r"has no masks: put images into images/ and their masks, of the same names, into masks/")
    write(tmp_path / "masks/train/b.png", np.zeros(SIZE, np.uint8))
    refused(
        tmp_path, "no image of .* has a mask: 'images/train/a.jpg' needs one of its name, as in 'masks/train/b.png'"
    )
    pair(tmp_path, "images/train/c.jpg", "masks/train/c.png", ((0, 0), (0, 0)))
    pair(tmp_path, "images/val/c.jpg", "masks/val/c.png")
    refused(tmp_path, r"has one class only \('0'\)")
    pair(tmp_path, "images/d.jpg", "masks/d.png")
    refused(
        tmp_path, "has the splits 'train', 'val' and images beside them, as 'images/d.jpg': move those into a split"
    )
    (tmp_path / "images/d.jpg").unlink()
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    refused(tmp_path, "lists the class 'sky' twice")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "is no list of classes")


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("classes.txt", "0\n100000\n", "names that are numbers are values of pixels, 0 to 65535"),
        ("classes.txt", "0\n1\n255\n", "the value 255 in masks is that of the class '255', and is ignored"),
        ("classes.txt", "\n".join(f"c{place}" for place in range(300)), "is that of the class 'c255', and is ignored"),
        ("classes.txt", "0 0 0 sky\n0 0 0 road\n", "has one value or colour for two classes"),
        ("classes.txt", "0 0 0 sky\nroad\n", "has colours, 0 to 255, of some classes and not of 'road'"),
        ("class_dict.csv", "name,r,g,b\nsky,0,0,0\nroad,300,0,0\n", "of some classes and not of 'road'"),
        ("class_dict.csv", "sky,0,0,0\nroad,3,0,0\n", "has no column 'name': its first line is to be 'name,r,g,b'"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tmp_path, name, text, line):
    pair(tmp_path, "images/a.jpg", "masks/a.png")
    (tmp_path / name).write_text(text)
    refused(tmp_path, line)


def test_tables_of_spreadsheets_are_read(tmp_path):
    (tmp_path / "class_dict.csv").write_text("\ufeffName;R;G;B\r\nsky;0;0;0\r\nroad;1;2;3\r\n", newline="")
    assert class_list(tmp_path) == [("sky", (0, 0, 0)), ("road", (1, 2, 3))]


def test_why_masks_tell_no_classes(tmp_path):
    write(tmp_path / "images/a.jpg", np.zeros((*SIZE, 3), np.uint8))
    write(tmp_path / "masks/a.tif", np.zeros(SIZE, np.float32))
    refused(tmp_path, "no mask of .* can be read: masks/a.tif: a mask of mode F tells no classes")
    (tmp_path / "masks/a.tif").rename(tmp_path / "masks/a.jpg")
    refused(tmp_path, "the mask 'masks/a.jpg' is a JPEG file, which changes values")


def test_other_classes_than_the_models_are_refused(tmp_path):
    for split in ("train", "val"):
        pair(tmp_path, f"images/{split}/a.jpg", f"masks/{split}/a.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert len(open_evaluated_masks(recipe(tmp_path), "train", ("sky", "road"))) == 1
    with pytest.raises(LinsightError, match="has other classes than the model was trained on: it knows 'cat', 'dog'"):
        open_evaluated_masks(recipe(tmp_path), None, ("cat", "dog"))


@pytest.fixture
def told(tmp_path):
    """Images whose level is 20 times the class of each pixel."""
    mask = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((20, 15), np.uint8))  # 60 x 60
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.png", np.repeat(20 * mask[..., None], 3, axis=2))
        write(tmp_path / f"masks/{split}/a.png", mask)
    return tmp_path


@pytest.mark.parametrize("crop", [(32, 32), (17, 48), (80, 40)])
def test_a_crop_is_the_same_of_image_and_mask(told, crop):
    own = recipe(told, interpolation="nearest", resize="0.5,2", crop_share=1.0)
    samples = MaskSamples(open_masks(own).train, own, crop)
    seen = set()
    for epoch in range(12):
        image, target, _ = samples[epoch, 0]
        assert image.shape == (3, *crop) and target.mask.shape == target.size == crop
        known = target.mask != NONE
        off = (image[0].int() != 20 * target.mask.int()) & known
        assert off.float().mean() < 0.08, "at most the borders of classes, where nearest pixels may be either"
        assert torch.equal(samples[epoch, 0][0], image), "an image of an epoch is one function of its key"
        seen.add(target.mask.numpy().tobytes())
        rows, columns = known.any(1).sum(), known.any(0).sum()
        assert known.sum() == rows * columns, "what is beyond the image is at the bottom and the right, or mirrored"
    assert len(seen) > 6


def test_crops_of_one_class_alone_are_avoided(told):
    shares = []
    for most in (1.0, 0.5):
        own = recipe(told, resize="2,2", crop_share=most)
        samples = MaskSamples(open_masks(own).train, own, (30, 30))
        found = [samples[epoch, 0][1].mask.flatten().bincount(minlength=12) for epoch in range(40)]
        shares.append(sum(float(count.max() / count.sum()) > 0.5 for count in found))
    assert shares[0] > 12 and shares[1] < shares[0] / 3


def test_images_to_evaluate_are_whole_or_of_a_shorter_side(told):
    own = recipe(told, eval_side=30)
    samples = MaskSamples(open_masks(own).val, own, None)
    image, target, _ = samples[0, 0]
    assert image.shape == (3, 30, 30) and target.own == (60, 60) and target.mask.shape == (60, 60)
    write(told / "images/val/b.png", np.zeros((60, 90, 3), np.uint8))
    write(told / "masks/val/b.png", np.zeros((60, 90), np.uint8))
    samples = MaskSamples(open_masks(own).val, own, None)
    batch = collate([samples[0, 0], samples[0, 1], "c: is damaged"])
    assert batch.images.shape == (2, 3, 30, 45) and [one.size for one in batch.targets] == [(30, 30), (30, 45)]
    assert batch.bad == ["c: is damaged"] and not batch.images[0, :, :, 30:].any()
    write(told / "masks/val/b.png", np.zeros((60, 91), np.uint8))
    assert samples[0, 1] == "images/val/b.png: is 90x60 pixels, and its mask 91x60"


def test_rows_of_parquet_have_a_column_of_masks(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    kinds = datasets.Features(
        {"pixels": datasets.Image(), "annotation": datasets.Image(), "name": datasets.Value("string")}
    )
    for split, count in (("train", 3), ("validation", 2)):
        images = [Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)) for _ in range(count)]
        masks = [Image.fromarray(rng.integers(0, 3, SIZE, dtype=np.uint8)) for _ in range(count)]
        rows = {"pixels": images, "annotation": masks, "name": ["a"] * count}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        if split == "train":
            first = np.asarray(masks[0])
    data = open_masks(recipe(tmp_path))
    assert (len(data.train), len(data.val), data.classes) == (3, 2, ("0", "1", "2"))
    assert data.train.beside(0).tolist() == first.tolist()
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    assert open_masks(recipe(tmp_path, label_key="annotation")).classes == ("sky", "road", "car")
    refused(tmp_path, "unknown column of masks", label_key="anotation")


def panoptic(folder):
    """Two splits of an image with the segments 5, 300 and 70000, of the classes sky, road, sky, and pixels of none."""
    codes = np.kron(np.array([[5, 300], [70000, 0]]), np.ones((3, 4), int))
    picture = np.stack([codes % 256, codes // 256 % 256, codes // 65536], -1).astype(np.uint8)
    for split in ("train2017", "val2017"):
        write(folder / split / "a.jpg", np.zeros((*SIZE, 3), np.uint8))
        write(folder / f"annotations/panoptic_{split}/a.png", picture)
        told = {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "categories": [{"id": 90, "name": "sky"}, {"id": 3, "name": "road"}],
            "annotations": [
                {
                    "image_id": 7,
                    "file_name": "a.png",
                    "segments_info": [
                        {"id": 5, "category_id": 90},
                        {"id": 300, "category_id": 3},
                        {"id": 70000, "category_id": 90},
                    ],
                }
            ],
        }
        (folder / f"annotations/panoptic_{split}.json").write_text(json.dumps(told))
    return told


def test_segments_in_cocos_panoptic_form(tmp_path):
    told = panoptic(tmp_path)
    data = open_masks(recipe(tmp_path))
    assert data.classes == ("road", "sky") and len(data.train) == len(data.val) == 1
    mask = data.train.beside(0)
    assert [mask[0, 0], mask[0, -1], mask[-1, 0], mask[-1, -1]] == [1, 0, 1, NONE]
    path = tmp_path / "annotations/panoptic_train2017.json"
    with pytest.raises(LinsightError, match="has other classes than the model was trained on: it knows 'cat', 'dog'"):
        open_evaluated_masks(recipe(tmp_path), None, ("cat", "dog"))
    told["categories"][0]["name"] = "water"
    path.write_text(json.dumps(told))
    refused(tmp_path, "has other classes in val2017 than in train2017: list the same in both")
    told["annotations"][0]["segments_info"][0]["category_id"] = 4
    path.write_text(json.dumps(told))
    refused(tmp_path, "has a segment of the category 4, which it does not list")
    path.write_text(json.dumps(told)[:-20])
    refused(tmp_path, "is no file of segments in COCO's panoptic form")
    told["annotations"][0] |= {"segments_info": [], "file_name": "../a.png"}
    path.write_text(json.dumps(told))
    refused(tmp_path, "names a file outside of its folders")
    told["annotations"][0]["file_name"] = "b.png"
    path.write_text(json.dumps(told))
    refused(tmp_path, "no file that .* names is there, as 'b.png'")


def test_segments_with_numbers_as_texts(tmp_path):
    told = panoptic(tmp_path)
    told["annotations"][0]["image_id"] = "7"
    for segment, crowd in zip(told["annotations"][0]["segments_info"], ("0", "1", float("nan")), strict=True):
        segment |= {"category_id": str(segment["category_id"]), "iscrowd": crowd}
    (tmp_path / "annotations/panoptic_train2017.json").write_text(json.dumps(told))
    mask = open_masks(recipe(tmp_path)).train.beside(0)
    assert [mask[0, 0], mask[0, -1], mask[-1, 0]] == [1, NONE, 1]


def test_the_pixel_maps_of_cocos_stuff(tmp_path):
    for split in ("train2017", "val2017"):
        pair(tmp_path, f"{split}/a.jpg", f"stuff_{split}_pixelmaps/a.png")
    data = open_masks(recipe(tmp_path))
    assert len(data.train) == 1 and data.val.beside(0)[0, -1] == 1


def test_a_folder_with_a_split_to_train_on_alone(tmp_path):
    for name in "abcd":
        pair(tmp_path, f"images/train/{name}.jpg", f"masks/train/{name}.png")
    data = open_masks(recipe(tmp_path, val_fraction=0.25))
    assert (len(data.train), len(data.val)) == (3, 1)
    assert len(open_evaluated_masks(recipe(tmp_path), "train", data.classes)) == 4
    with pytest.raises(LinsightError, match=r"has the splits 'train', and none of these is asked for: name one"):
        open_evaluated_masks(recipe(tmp_path), None, data.classes)


@pytest.mark.parametrize("orientation, turns", [(6, 1), (8, 3)])
def test_a_mask_turns_with_an_image_that_is_stored_turned(tmp_path, orientation, turns):
    pixels = np.zeros((6, 9), np.uint8)
    pixels[1:3, 4:8] = 1
    stored, exif = np.ascontiguousarray(np.rot90(pixels, turns)), Image.Exif()
    exif[274] = orientation
    for split in ("train", "val"):
        pair(tmp_path, f"images/{split}/a.png", f"masks/{split}/a.png")
        Image.fromarray(stored * 255).save(tmp_path / f"images/{split}/a.png", exif=exif)
        write(tmp_path / f"masks/{split}/a.png", stored)
    samples = MaskSamples(open_masks(recipe(tmp_path)).val, recipe(tmp_path), None)
    image, mark, _ = samples[0, 0]
    assert mark.own == (6, 9) and (image[0].numpy() // 255).tolist() == mark.mask.tolist() == pixels.tolist()
    Image.fromarray(stored * 255).save(tmp_path / "images/val/a.png")  # nothing says that it is turned
    write(tmp_path / "masks/val/a.png", pixels)
    assert samples[0, 0].endswith("a.png: is 6x9 pixels, and its mask 9x6")
