"""Mutated layouts of image folders and of tars: each is to be read as its folders say, or refused in one line.

    python benchmarks/mutated_layouts.py --count 500 --seed 0

Every layout starts as folders of classes, with splits or without, and is changed in one to three ways that users meet:
splits in other spellings, folders that systems leave behind, links in circles, names that are no plain text, images in
wrong places; tars with odd names, or damaged. What the product answers, its classes and their counts, is compared with
a short reading of the same folder by itself, `plain_reading`. A traceback, or an answer that it does not share, ends
the script with 1.
"""

import argparse
import collections
import contextlib
import gzip
import io
import os
import random
import re
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from _script import exit_status
from PIL import Image

from linsight.errors import LinsightError
from linsight.train import Data, open_data, resolve

CLASSES = ("cat", "dog", "Élan", "$cash", "two words", "10", "9", "-v", "\N{CAT FACE}", "a" * 200, "new\nline", "Cat")
SPLITS = {
    "train": ("train", "Train", "TRAIN", "training", "Training_Set", "train2017", "trainset"),
    "val": ("val", "Val", "valid", "VALIDATION", "dev", "val_images"),
    "test": ("test", "Test", "testing", "TEST_SET", "eval"),
}
SUFFIXES = (".png", ".PNG", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".jp2")
LEFT_BEHIND = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".git", "__pycache__")
NO_DATA = re.compile(r"(\..*|__macosx|@eadir|\$recycle\.bin|__pycache__|thumbs\.db|desktop\.ini)$", re.I)
WORD = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)[_ ]?(set|images)?[0-9]*$", re.I)
PURPOSE = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
Counts = dict[str, tuple[int, int]]  # how many images of a class are trained on, and evaluated on
Change = Callable[["Layout"], None]


class Layout:
    """A folder that is made at `root`, and the random numbers of its changes."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.draw = root, draw
        names = draw.sample(CLASSES, draw.randint(2, 4))
        self.splits = draw.choice([(), ("train",), ("train", "val"), ("train", "test"), ("train", "val", "test")])
        for split in self.splits or ("",):
            for name in names:
                for number in range(draw.randint(2, 5)):
                    self.add(split, name, f"{number}{draw.choice(SUFFIXES)}")

    def add(self, *parts: str, data: bytes | None = None) -> Path:
        """Write a file, an image unless `data` is given."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture() if data is None else data)
        return path

    def folders(self, depth: int | None = None) -> list[Path]:
        """The folders below the root, those at one depth only if it is given."""
        found = sorted(path for path in self.root.rglob("*") if path.is_dir() and not path.is_symlink())
        return [path for path in found if depth is None or len(path.relative_to(self.root).parts) == depth]

    def folder(self) -> Path:
        """Any folder."""
        return self.draw.choice([self.root, *self.folders()])

    def class_folder(self) -> Path:
        """The folder of a class."""
        return self.draw.choice(self.folders(2 if self.splits else 1) or [self.root])

    def rename(self, path: Path, name: str) -> None:
        """Call a folder otherwise, where that name is free."""
        if path != self.root and not path.with_name(name).exists():
            path.rename(path.with_name(name))


def picture() -> bytes:
    """A small image."""
    data = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(data, "png")
    return data.getvalue()


def respell(layout: Layout) -> None:
    """Call the splits otherwise."""
    for split in layout.splits:
        if (layout.root / split).exists():
            layout.rename(layout.root / split, layout.draw.choice(SPLITS[split]))


def deepen(layout: Layout) -> None:
    """Move images of a class into folders of their own."""
    folder = layout.class_folder()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        inner = folder / layout.draw.choice(["left", "right", "2020"])
        inner.mkdir(exist_ok=True)
        path.rename(inner / path.name)


def leave_behind(layout: Layout) -> None:
    """Add what systems leave behind."""
    folder = layout.folder()
    name = layout.draw.choice(LEFT_BEHIND)
    layout.add(str(folder / name / layout.draw.choice(["", "cat"])), "0.png")
    layout.add(str(folder), "._0.png")
    layout.add(str(folder), layout.draw.choice([".DS_Store", "Thumbs.db", "desktop.ini"]), data=b"x")


def unlinkable(layout: Layout) -> None:
    """Add a pipe whose name is that of an image."""
    os.mkfifo(layout.class_folder() / "pipe.png")


def link(layout: Layout) -> None:
    """Add a link: in a circle, to another folder, to an image, or to nothing."""
    target = layout.draw.choice([layout.root, layout.class_folder(), Path("nowhere"), Path("here.png")])
    if layout.draw.random() < 0.3:
        target = next((path for path in sorted(layout.root.rglob("*")) if path.is_file()), target)
    name = layout.draw.choice(["more", "here.png", "other"])
    with contextlib.suppress(FileExistsError):
        (layout.class_folder() / name).symlink_to(
            target if not target.is_absolute() else os.path.relpath(target, layout.class_folder())
        )


def stray(layout: Layout) -> None:
    """Put an image beside folders."""
    layout.add(str(layout.folder()), "stray.png")


def other_files(layout: Layout) -> None:
    """Add files that are no images, or have no extension."""
    folder = layout.folder()
    for name in layout.draw.sample(["a.txt", "b.csv", "README", "c.png.txt", "d.svg", "e.json"], 3):
        layout.add(str(folder), name, data=b"x")


def hollow(layout: Layout) -> None:
    """Add a class without images."""
    (layout.class_folder().parent / layout.draw.choice(["empty", "docs"])).mkdir(exist_ok=True)
    if layout.draw.random() < 0.5:
        layout.add(str(layout.class_folder().parent), "docs", "a.txt", data=b"x")


def wrap(layout: Layout) -> None:
    """Move all into one folder more."""
    inner = list(layout.root.iterdir())
    wrapped = layout.root / "wrapped"
    wrapped.mkdir(exist_ok=True)
    for path in inner:
        if path != wrapped:
            path.rename(wrapped / path.name)


def extra_class(layout: Layout) -> None:
    """Add a class to one split, or beside the splits."""
    layout.add(str(layout.draw.choice([layout.root, *layout.folders(1)])), "zebra", "0.png")


def second_split(layout: Layout) -> None:
    """Add a split of the same purpose, or splits inside of a class, or a split beside classes."""
    where = layout.draw.choice([layout.root, layout.class_folder()])
    for word in layout.draw.sample([word for words in SPLITS.values() for word in words], 2):
        layout.add(str(where), word, *layout.draw.choice([(), ("cat",)]), "0.png")


def disguise(layout: Layout) -> None:
    """Call splits as users do who have several data sets."""
    for split in layout.splits:
        if (layout.root / split).exists():
            layout.rename(layout.root / split, f"pets_{split}")


def twin(layout: Layout) -> None:
    """Add a class whose name differs in case, or in how Unicode spells it."""
    folder = layout.class_folder()
    name = layout.draw.choice([folder.name.upper(), unicodedata.normalize("NFD", folder.name)])
    layout.add(str(folder.parent), name, "0.png")


def misname(layout: Layout) -> None:
    """Give a class a name that is no text, or one of a split, or of an image."""
    name = layout.draw.choice([os.fsdecode(b"caf\xe9"), "train", "folder.png", "null", " ", "\t", "a\\b", "[1]*?"])
    layout.rename(layout.class_folder(), name)


def thin_out(layout: Layout) -> None:
    """Leave one image in a class, or none."""
    files = sorted(path for path in layout.class_folder().rglob("*") if path.is_file())
    for path in files[layout.draw.randint(0, 1) :]:
        path.unlink()


def table(layout: Layout) -> None:
    """Add a Parquet file, or an archive."""
    layout.add(str(layout.folder()), layout.draw.choice(["a.parquet", "train.tar", "b.zip"]), data=b"PAR1")


CHANGES: tuple[Change, ...] = (
    respell,
    respell,
    deepen,
    deepen,
    leave_behind,
    unlinkable,
    link,
    link,
    stray,
    other_files,
    hollow,
    wrap,
    extra_class,
    second_split,
    disguise,
    twin,
    misname,
    thin_out,
    table,
)


def make(root: Path, seed: int) -> list[str]:
    """Make the folder of a seed; the names of its changes."""
    draw = random.Random(seed)
    root.mkdir(parents=True)
    layout = Layout(root, draw)
    changes = draw.choices(CHANGES, k=draw.randint(1, 3))
    for change in changes:
        change(layout)
    return [change.__name__ for change in changes]


def pack(root: Path, path: Path, seed: int) -> str:
    """Pack a folder into a tar as `path`, in one of the ways in which tars are odd; its name."""
    draw = random.Random(seed)
    way = draw.choice(
        ["plain", "plain", "dot", "absolute", "folder", "up", "twice", "hard link", "cut", "hurt", "gzip"]
    )
    start = {"dot": "./", "absolute": "/data/", "folder": "data/", "up": "../"}.get(way, "")
    with tarfile.open(path, "w") as tar:
        files = sorted(root.rglob("*"))
        for file in draw.sample(files, len(files)) if draw.random() < 0.5 else files:
            about = tar.gettarinfo(file, arcname="x")
            about.name = start + str(file.relative_to(root))
            before = [member.name for member in tar.getmembers() if member.isreg()]
            if about.isreg() and before and way == "hard link":
                about.type, about.linkname, about.size = tarfile.LNKTYPE, before[0], 0
            for _ in range(2 if way == "twice" else 1):
                tar.addfile(about, io.BytesIO(file.read_bytes()) if about.isreg() else None)
    data = bytearray(path.read_bytes())
    if way == "cut":
        data = data[: draw.randrange(len(data))]
    if way == "hurt":
        for _ in range(20):
            data[draw.randrange(len(data))] ^= 0xFF
    path.write_bytes(gzip.compress(data) if way == "gzip" else data)
    return way


def answer(data: Data) -> Counts:
    """How many images there are of each class, to train and to evaluate on."""
    train, val = (
        collections.Counter(data.classes[target] for target in part.targets) for part in (data.train, data.val)
    )
    return {name: (train[name], val[name]) for name in data.classes}


def images_below(root: Path, links: bool) -> Iterator[tuple[str, ...]]:
    """The images of a folder, by the folders that they lie in, which are entered once."""
    for here, folders, files in os.walk(root, followlinks=links):
        above = {os.path.realpath(path) for path in (here, *Path(here).parents)}
        keep = [name for name in folders if not NO_DATA.match(name) and os.path.realpath(f"{here}/{name}") not in above]
        folders[:] = [name for name in keep if links or not os.path.islink(f"{here}/{name}")]
        for name in files:
            if Path(name.lower()).suffix in SUFFIXES and not NO_DATA.match(name) and os.path.isfile(f"{here}/{name}"):
                yield Path(here, name).relative_to(root).parts[:-1]


def plain_reading(root: Path, links: bool = True) -> Counts | None:
    """`answer` of a folder, read by itself: the first folder is the split, if any is, and the next the class."""
    found = collections.Counter(
        parts[:2] if WORD.match((*parts, "")[0]) else ("", *parts[:1]) for parts in images_below(root, links)
    )
    roles: dict[str, list[str]] = {}
    for split in {key[0] for key in found}:
        roles.setdefault(split and PURPOSE.get(WORD.match(split)[1].lower(), "val"), []).append(split)  # type: ignore[index]
    train = roles.get("", roles.get("train", []))
    val = roles.get("val", roles.get("test", []))
    strays = any(len(key) < 2 for key in found if key[0] in train + val)
    if len(train) != 1 or len(val) > 1 or strays or ("" in roles and len(roles) > 1):
        return None
    counts = {(key[0], unicodedata.normalize("NFC", key[1])): n for key, n in found.items() if len(key) == 2}
    names = sorted({name for split, name in counts if split in train + val})
    return {name: (counts.get((train[0], name), 0), counts.get((*val, name), 0)) for name in names}


def agree(given: Counts, read: Counts | None) -> bool:
    """True where an answer is that of the plain reading; held-out images are those of the split trained on."""
    if read is None or list(given) != list(read):
        return False
    held_out = not any(val for _, val in read.values())
    return all(
        given[name] == counts or (held_out and sum(given[name]) == counts[0] and min(given[name]) > 0)
        for name, counts in read.items()
    )


def judge(place: Path, root: Path, links: bool, seen: list[str]) -> str:
    """The kind of thing that the product makes of data; one that is wrong is told in `seen`, too."""
    try:
        data = open_data(resolve("photos", {"data": str(place)}))
    except LinsightError as error:
        if "\n" not in str(error):
            return "line"
        seen.append(f"{place}: several lines: {error!r}")
        return "several lines"
    except Exception as error:
        seen.append(f"{place}: {error!r}")
        return "traceback"
    given = answer(data)
    inside = sorted(path for path in root.iterdir() if not NO_DATA.match(path.name))
    inner = [root, *inside] if len(inside) == 1 else [root]  # a tar may have all in one folder
    if any(agree(given, plain_reading(path, links)) for path in inner):
        return "answer"
    seen.append(f"{place}: {given} is not {plain_reading(root, links)}")
    return "other answer"


def main(arguments: argparse.Namespace) -> int:
    """Make and read `count` layouts, each as a folder and as a tar."""
    found: dict[str, collections.Counter[str]] = {"folder": collections.Counter(), "tar": collections.Counter()}
    wrong: list[str] = []
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        with tempfile.TemporaryDirectory() as where:
            root, tar = Path(where, "data"), Path(where, "data.tar")
            changes = make(root, seed)
            way = pack(root, tar, seed)
            for kind, place in (("folder", root), ("tar", tar)):
                before = len(wrong)
                found[kind][judge(place, root, kind == "folder", wrong)] += 1
                wrong[before:] = [f"seed {seed} ({', '.join(changes)}; {way}): {line}" for line in wrong[before:]]
    for kind, counts in found.items():
        print(f"{kind}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="layouts, each as a folder and as a tar")
    parser.add_argument("--seed", type=int, default=0, help="of the first layout")
    sys.exit(exit_status(__file__, lambda: main(parser.parse_args())))
