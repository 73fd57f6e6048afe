"""How a tree of images is laid out: its splits, and the folder of each class, which is the first one."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from linsight.errors import LinsightError

from .trees import Tree, count, shown, some

# What data sets call their splits, in any case; as Hugging Face reads file names.
_WORDS = {
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test", "evaluation", "eval"),
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words}
# As in training_set, TestImages, val2017.
_NAMED = re.compile(
    rf"({'|'.join(sorted(_ROLES, key=len, reverse=True))})"
    r"[\s_.-]*(?:(?:data)?sets?|data|images?|imgs?|pictures|split|folder)?[\s_.-]*[0-9]*"
)


class Body(NamedTuple):
    """The images of a split, or of a tree without splits, by their names; `targets` are places in `classes`."""

    pictures: list[str]
    targets: list[int]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def role(name: str) -> str | None:
    """The purpose of a split of this name, train, validation or test; None where it is none."""
    found = _NAMED.fullmatch(name.strip().casefold())
    return _ROLES[found[1]] if found else None


def words(name: str) -> list[str]:
    """The words of a name that are names of splits, as they are written."""
    return [word for word in re.split(r"[^A-Za-z]+", name) if role(word)]


def unwrapped(tree: Tree) -> Tree:
    """The tree inside folders that hold no more than one folder, as archives have; a split is not entered."""
    while True:
        tops = {name.partition("/")[0] for name in [*tree.folders, *tree.pictures]}
        top = next(iter(tops)) if len(tops) == 1 else ""
        if not top or role(top) or not tree.pictures or any(name.count("/") < 2 for name in tree.pictures):
            break
        start = len(top) + 1
        tree = Tree(
            tree.label,
            [name[start:] for name in tree.pictures],
            [name.removeprefix(f"{top}/") for name in tree.others],
            {name[start:] for name in tree.folders if name != top},
            tree.notes,
            f"{tree.inside}{top}/",
        )
    if tree.inside:
        tree.notes.append(f"{shown(tree.label)} is read from its folder {shown(tree.inside[:-1])}")
    return tree


def splits(tree: Tree, named: Collection[str] = ()) -> tuple[list[str], str]:
    """The folders of a tree that are its splits, and a line on what lies beside them.

    named: splits that a user named: with these, what lies beside them is left alone.

    Raises:
        LinsightError: images beside splits, or folders that look like splits of another name.
    """
    asked = {name.casefold() for name in named}
    tops = sorted({name.partition("/")[0] for name in tree.folders})
    found = [name for name in tops if role(name) or name.casefold() in asked]
    if not found:
        _check_disguised(tree, tops)
        return [], ""
    beside = list(dict.fromkeys(name.partition("/")[0] for name in tree.pictures))
    beside = [name for name in beside if name not in found]
    if beside and asked & {name.casefold() for name in found}:
        return found, f"beside the splits of {shown(tree.label)} {some(beside)} is left alone"
    if beside:
        kind = "folder" if len(found) == 1 else "folders"
        raise LinsightError(
            f"{shown(tree.label)} has the split {kind} {some(found)} beside {some(beside)}: move those into a split or "
            f"away; if all are classes, put them into a folder 'train'"
        )
    return found, ""


def body(tree: Tree, top: str = "") -> Body:
    """The images below the folder `top`, whose folders are the classes, in the order of their names.

    Raises:
        LinsightError: no image, images in no class folder, a class folder without one, splits inside of classes.
    """
    where = shown(f"{tree.label}/{top}" if top else tree.label)
    start = len(top) + 1 if top else 0
    pictures = [name for name in tree.pictures if not top or name.startswith(f"{top}/")]
    if not pictures:
        rest = tree.left_out(top)
        if not rest and not tree.folders:
            raise LinsightError(f"the data folder {where} is empty")
        raise LinsightError(
            f"no image in {where} or below it: it should have a folder of images for each class"
            + (f" ({rest})" if rest else "")
        )
    owners = [name[start:].rpartition("/")[0].partition("/")[0] for name in pictures]
    folders = {name[start:].partition("/")[0] for name in tree.folders if not top or name.startswith(f"{top}/")}
    _check_strays(where, tree.label, pictures, owners, folders)
    if hollow := sorted(folders - set(owners)):
        place = f"{top}/{hollow[0]}" if top else hollow[0]
        why = f" ({tree.left_out(place)})" if tree.left_out(place) else ""
        raise LinsightError(
            f"the class folder {shown(f'{tree.label}/{place}')} has no image{why}: add some, or remove the folder"
        )
    _check_inner_splits(where, [name[start:] for name in pictures], folders)
    classes = sort_classes(where, folders)
    number = {name: index for index, name in enumerate(classes)}
    place_of = {folder: number[plain(folder)] for folder in folders}
    return Body(pictures, [place_of[owner] for owner in owners], classes, tuple(filter(None, [tree.left_out(top)])))


def sort_classes(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names of classes, in order, in one spelling of Unicode (NFC).

    Raises:
        LinsightError: a name that is no text, or two names that look the same.
    """
    spelled: dict[str, str] = {}
    for name in sorted(names):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise LinsightError(f"the class folder {shown(name)} of {where} has a name that is no UTF-8: rename it")
        if plain(name) in spelled:
            raise LinsightError(
                f"{where} has two classes {shown(name)}, which Unicode spells in two ways (NFC, NFD): merge the folders"
            )
        spelled[plain(name)] = name
    return tuple(sorted(spelled))


def plain(name: str) -> str:
    """A name in the one spelling of Unicode (NFC) in which names are compared."""
    return unicodedata.normalize("NFC", name)


def alike(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case only."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.casefold(), name)
    return [(first[name.casefold()], name) for name in names if first[name.casefold()] != name]


def _check_strays(where: str, label: str, pictures: list[str], owners: list[str], folders: set[str]) -> None:
    strays = [name for name, owner in zip(pictures, owners, strict=True) if not owner]
    if not strays:
        return
    if len(strays) == len(pictures):
        raise LinsightError(
            f"{where} has no class folder, but {count(len(pictures), 'image', 'images')} directly in it "
            f"({some(strays)}): put them into a folder for each class"
        )
    more = f" (nor are {len(strays) - 1} more)" if strays[1:] else ""
    raise LinsightError(
        f"{shown(f'{label}/{strays[0]}')} is in no class folder{more}: move it into one, or out of {where}"
    )


def _check_inner_splits(where: str, pictures: list[str], folders: set[str]) -> None:
    """Raise where images of several splits would be taken for images of one class."""
    if all(map(role, folders)):
        raise LinsightError(f"{where} has splits in it ({some(sorted(folders))}), not classes: which of them is meant?")
    inner: dict[str, str] = {}
    for path in sorted({name.rpartition("/")[0] for name in pictures}):
        owner, *below = path.split("/")
        for folder in below:
            if role(folder):
                inner.setdefault(folder, owner)
        if below and role(owner):
            raise LinsightError(f"{where} has the split {shown(owner)} in it: put splits first, side by side")
    if inner:
        folder, owner = min(inner.items())
        way = f"put splits first ({shown(f'{folder}/{owner}')}), or rename the folder"
        if len(folders) == 1:
            way = f"give the folder {shown(owner)} as the data"
        raise LinsightError(
            f"the class folder {shown(owner)} of {where} has the split folder {shown(folder)} in it: {way}"
        )


def _check_disguised(tree: Tree, tops: list[str]) -> None:
    """Raise for folders such as cifar_train and cifar_test, which would be two classes."""
    same: dict[tuple[str, ...], dict[str, str]] = {}
    for name in tops:
        parts = [part for part in re.split(r"[\s_.-]+", name.casefold()) if part]
        for place in {0, len(parts) - 1} if len(parts) > 1 else ():
            if parts[place] in _ROLES:
                rest = tuple(parts[:place] + parts[place + 1 :])
                same.setdefault(rest, {})[_ROLES[parts[place]]] = name
    for found in same.values():
        if len(found) > 1:
            raise LinsightError(
                f"{some(sorted(found.values()))} in {shown(tree.label)} look like splits: call them train and test, "
                "or name them with train_split= and val_split=; if all are classes, put them into a folder 'train'"
            )
