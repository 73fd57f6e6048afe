"""Data sets of Hugging Face, and Parquet files, as sources."""

import bisect
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from linsight.errors import LinsightError, MissingExtraError, UnknownNameError

from ._layout import plain, role, sort_classes, words
from .sources import Reading, Source, first_line
from .trees import shown, some

_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")
_MASKS = ("mask", "annotation", "segmentation_mask", "segmentation", "semantic", "label", "labels", "gt")
LABELS = ("label", "labels", "fine_label", "class", "target", "category", "class_name")
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})")


class Rows:
    """The images of a table of Hugging Face, by row; undecoded."""

    def __init__(self, table: Any, key: str, folder: str) -> None:
        self.rows, self.key, self.folder = table, key, folder
        self._last: tuple[int, Any] = (-1, None)  # an image is opened and named, and its row read once

    def open(self, index: int) -> BinaryIO:
        """The image of a row, undecoded; raises OSError where there is none."""
        return stored(self._cell(index), self.folder)

    def _cell(self, index: int) -> Any:
        if self._last[0] != index:
            self._last = index, self.rows[index][self.key]
        return self._last[1]

    def filename(self, index: int) -> str:
        """The file that a row is of, or the row's number."""
        with contextlib.suppress(OSError, ValueError):
            if path := (self._cell(index) or {}).get("path"):
                return str(path)
        return f"row {index}"

    def stamp(self) -> str:
        """A digest of the table."""
        return f"{self.rows._fingerprint} {self.key}"


class Table:
    """The images of a Parquet file, by row, of which a row group is in memory at a time.

    Raises:
        LinsightError: it is no Parquet file, is damaged, or has no column of images.
    """

    def __init__(self, path: pathlib.Path, image_key: str | None) -> None:
        hf = import_datasets()
        from pyarrow import parquet

        self.path, name = path, str(path)
        try:
            with parquet.ParquetFile(path) as file:
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                kinds = hf.Features.from_arrow_schema(file.schema_arrow)
        except Exception as error:  # of a damaged file it raises anything
            raise LinsightError(f"{shown(path)} is no readable Parquet file: {first_line(error)}") from error
        self.ends = list(itertools.accumulate(counts))
        self.key = image_column(name, kinds, image_key)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def open(self, index: int) -> BinaryIO:
        """The image of a row, undecoded; raises OSError where there is none."""
        group = bisect.bisect_right(self.ends, index)
        images = _row_group(self.path, group, self.key)
        return stored(images[index - self.ends[group]].as_py(), str(self.path.parent))


@functools.lru_cache(maxsize=1)
def _row_group(path: pathlib.Path, group: int, key: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[key], use_threads=False)[key]


def stored(cell: Any, folder: str) -> BinaryIO:
    """The image of a cell, which has bytes, a path, or both; raises OSError where there is none."""
    cell = {"bytes": cell} if isinstance(cell, bytes) else {"path": cell} if isinstance(cell, str) else cell or {}
    if cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if not cell.get("path"):
        raise OSError("no image there")
    return open(pathlib.Path(folder, cell["path"]), "rb")


def split_files(
    label: str, names: Sequence[str], kind: str = "Parquet files"
) -> tuple[dict[str, list[str]], list[str]]:
    """The splits of files of one kind by their names, train, validation, test or others, and lines on what is odd.

    Folders say more than files do; where no name says anything, all are one split, "".

    Raises:
        LinsightError: names of which some say a split and some don't, or that say one in several ways.
    """
    found: dict[str, list[str]] = {}
    spelled: dict[str, set[str]] = {}
    parts: dict[tuple[str, int], int] = {}
    for name in names:
        *folders, file = name.split("/")
        stem = file.rpartition(".")[0]
        shard = _SHARD.match(stem)
        said = next(([folder] for folder in folders if role(folder)), None) or words(shard[1] if shard else stem)
        roles = {role(word) or "" for word in said}
        if len(roles) > 1:
            raise LinsightError(f"{shown(name)} in {shown(label)} is of several splits by its name: rename it")
        split = roles.pop() if roles else shard[1] if shard else ""
        found.setdefault(split, []).append(name)
        if said:
            spelled.setdefault(split, set()).add(said[0])
        if shard:
            place = "/".join([*folders, shard[1]]), int(shard[3])
            parts[place] = parts.get(place, 0) + 1
    if "" in found and len(found) > 1:
        raise LinsightError(
            f"{some(found[''])} in {shown(label)} is of no split by its name, and {some(found[max(found)])} is: "
            "rename it, or move it out"
        )
    for split, spellings in spelled.items():
        if len(spellings) > 1:
            raise LinsightError(
                f"{shown(label)} has {kind} of the splits {some(sorted(spellings))}, which are all for {split}: "
                "rename those that are one, and move the others out"
            )
    missing = [
        f"{shown(label)} has {there} of the {whole} files of {shown(start)}"
        for (start, whole), there in parts.items()
        if there < whole
    ]
    return found, missing


def check_files(label: str, paths: Sequence[pathlib.Path]) -> None:
    """Check the files of a split, of which the first would speak for all.

    Raises:
        LinsightError: a file that is no Parquet, is damaged or without rows; other columns than the first has, text
            where that has numbers, or classes in another order.
    """
    import_datasets()
    import pyarrow
    from pyarrow import parquet

    first: dict[str, str] | None = None
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                kinds, rows = _kinds(file.schema_arrow), file.metadata.num_rows
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
            raise LinsightError(f"{shown(path)} is no readable Parquet file: {first_line(error)}") from error
        if not rows:
            raise LinsightError(f"{shown(path)} has no row")
        first = first or kinds
        odd = sorted(name for name in first.keys() | kinds.keys() if first.get(name) != kinds.get(name))
        if odd:
            raise LinsightError(
                f"the Parquet files of {shown(label)} differ in their columns {some(odd)}: write them alike, "
                f"{shown(path)} and {shown(paths[0].name)}"
            )


def count_rows(paths: Iterable[str]) -> int:
    """The rows of Parquet files, as these tell."""
    from pyarrow import parquet

    total = 0
    for path in paths:
        with parquet.ParquetFile(path) as file:
            total += file.metadata.num_rows
    return total


def _kinds(schema: Any) -> dict[str, str]:
    """The kind of each column: text or not, and the names of classes."""
    kinds = {name: "text" if "string" in str(schema.field(name).type) else "other" for name in schema.names}
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for name, feature in features.items():
            if name in kinds and "names" in feature:
                kinds[name] = str(feature["names"])
    return kinds


def parquet(
    label: str,
    paths: Sequence[pathlib.Path],
    cache: str | None,
    split: str,
    image_key: str | None,
    label_key: str | None,
) -> Source:
    """The rows of Parquet files as a source; `split` is `train`, or a part of it in Hugging Face's words."""
    return _source(label, parquet_table(label, paths, cache, split), str(paths[0].parent), image_key, label_key)


def parquet_table(label: str, paths: Sequence[pathlib.Path], cache: str | None, split: str) -> Any:
    """The rows of Parquet files."""
    hf = import_datasets()
    files = [glob.escape(str(path.absolute())) for path in paths]
    name = split.partition("[")[0]
    return from_hub(label, lambda: hf.load_dataset("parquet", data_files={name: files}, split=split, cache_dir=cache))


def hugging_face(name: str, cache: str | None, split: str, image_key: str | None, label_key: str | None) -> Source:
    """A data set of Hugging Face as a source: the columns are found by their types."""
    return _source(name, hub_table(name, cache, split), "", image_key, label_key)


def hub_table(name: str, cache: str | None, split: str) -> Any:
    """The rows of a data set of Hugging Face."""
    hf = import_datasets()
    return from_hub(name, lambda: hf.load_dataset(name, split=split, cache_dir=cache))


def mask_rows(name: str, table: Any, folder: str, image_key: str | None, mask_key: str | None) -> tuple[Rows, Rows]:
    """The images of a table, and their masks, which are images of another column."""
    hf, kinds = import_datasets(), table.features
    if image_key is None and not any(key in _IMAGES for key in kinds):
        found = [key for key, kind in kinds.items() if isinstance(kind, hf.Image) and key not in (*_MASKS, mask_key)]
        image_key = found[0] if len(found) == 1 else None
    images = image_column(name, kinds, image_key or next((key for key in _IMAGES if key in kinds), None))
    rest = {key: kind for key, kind in kinds.items() if key != images and _is_image(kind)}
    masks = mask_key or _column(name, rest, _MASKS, "label_key", hf.Image, _is_bytes)
    if masks not in rest:
        raise UnknownNameError(f"column of masks of {shown(name)}", masks, rest)
    return _undecoded(name, table, images, folder), _undecoded(name, table, masks, folder)


def hugging_face_images(name: str, split: str, image_key: str | None) -> Rows:
    """The images of a split of a data set of Hugging Face, which needs no labels."""
    hf = import_datasets()
    table = from_hub(name, lambda: hf.load_dataset(name, split=split))
    return _undecoded(name, table, image_column(name, table.features, image_key), "")


def hugging_face_splits(name: str) -> list[str]:
    """The names of the splits of a data set of Hugging Face."""
    hf = import_datasets()
    return [str(split) for split in from_hub(name, lambda: hf.get_dataset_split_names(name))]


def import_datasets() -> Any:
    """The package datasets."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "reading Parquet files and Hugging Face data sets") from None
    return datasets


def _source(name: str, table: Any, folder: str, image_key: str | None, label_key: str | None) -> Source:
    hf = import_datasets()
    kinds = table.features
    image_key = image_column(name, kinds, image_key)
    label_key = label_column(name, kinds, image_key, label_key)
    labels = from_hub(name, lambda: table.select_columns(label_key)[:][label_key])
    if isinstance(kinds[label_key], hf.ClassLabel):
        classes = tuple(map(plain, kinds[label_key].names))
        targets = [-1 if label is None else label for label in labels]
    else:
        said = [label_text(label) for label in labels]
        classes = sort_classes(shown(name), set(said) - {""})
        place = {label: index for index, label in enumerate(classes)}
        targets = [place.get(plain(label), -1) for label in said]
    return Reading(_undecoded(name, table, image_key, folder), targets, classes)


def _undecoded(name: str, table: Any, image_key: str, folder: str) -> Rows:
    """The images of a table."""
    kind = import_datasets().Image(decode=False)
    return Rows(from_hub(name, lambda: table.select_columns(image_key).cast_column(image_key, kind)), image_key, folder)


def image_column(name: str, kinds: Mapping[str, Any], image_key: str | None) -> str:
    """The column of images, `image_key` where it is given; a LinsightError where there is none."""
    image_key = image_key or _column(name, kinds, _IMAGES, "image_key", import_datasets().Image, _is_bytes)
    if image_key not in kinds:
        raise UnknownNameError(f"column of {shown(name)}", image_key, kinds)
    if not _is_image(kinds[image_key]):
        raise LinsightError(
            f"the column {shown(image_key)} of {shown(name)} has no image a row: name another, image_key="
        )
    return image_key


def label_column(name: str, kinds: Mapping[str, Any], image_key: str, label_key: str | None) -> str:
    """The column of labels, `label_key` where it is given; a LinsightError where there is none."""
    rest = {key: kind for key, kind in kinds.items() if key != image_key}
    label_key = label_key or _column(name, rest, LABELS, "label_key", import_datasets().ClassLabel, _is_label)
    if label_key not in kinds:
        raise UnknownNameError(f"column of {shown(name)}", label_key, kinds)
    if not _is_label(kinds[label_key]):
        raise LinsightError(
            f"the column {shown(label_key)} of {shown(name)} has no label a row: name another, label_key="
        )
    return label_key


def label_text(label: Any) -> str:
    """The name of a class by its label; "" where a row has none."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    if isinstance(label, int | float) and label < 0:  # as Hugging Face and shards say it of what nobody labelled
        return ""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def from_hub(name: str, read: Any) -> Any:
    """The answer of `read`, in silence; any error of the library is a LinsightError."""
    hf = import_datasets()
    with quiet(hf):
        try:
            return read()
        except Exception as error:  # of a damaged file, or an odd one, it raises anything
            cause = error.__cause__ if isinstance(error, hf.exceptions.DatasetGenerationError) else None
            raise LinsightError(f"cannot read the data set {shown(name)}: {first_line(cause or error)}") from error


@contextlib.contextmanager
def quiet(hf: Any) -> Iterator[None]:
    """Without bars, and without lines on errors that are raised, too."""
    shown_bars, level = hf.is_progress_bar_enabled(), hf.logging.get_verbosity()
    hf.disable_progress_bars()
    hf.logging.set_verbosity(hf.logging.CRITICAL)
    try:
        yield
    finally:
        hf.logging.set_verbosity(level)
        if shown_bars:
            hf.enable_progress_bars()


def _is_image(kind: Any) -> bool:
    """True for a column of images: typed so, or bytes, paths, or both."""
    hf = import_datasets()
    if isinstance(kind, dict):
        return "bytes" in kind or "path" in kind
    return isinstance(kind, hf.Image) or getattr(kind, "dtype", "") in (
        "binary",
        "large_binary",
        "string",
        "large_string",
    )


def _is_bytes(kind: Any) -> bool:
    """True for a column that is one of images without being called so: text may be anything."""
    return _is_image(kind) and "string" not in getattr(kind, "dtype", "")


def _is_label(kind: Any) -> bool:
    """True for a column with one label a row."""
    hf = import_datasets()
    simple = re.fullmatch(r"u?int\d+|bool|float\d+|(large_)?string", str(getattr(kind, "dtype", "")))
    return isinstance(kind, hf.ClassLabel) or (isinstance(kind, hf.Value) and simple is not None)


def _column(name: str, kinds: Mapping[str, Any], usual: Sequence[str], field: str, typed: type, fits: Any) -> str:
    """The column that is meant: by its type, by its usual name, or the only one that can be it."""
    named = {key.casefold(): key for key in kinds}
    for among in (
        [key for key, kind in kinds.items() if isinstance(kind, typed)],
        [named[key] for key in usual if key in named],
        [key for key, kind in kinds.items() if fits(kind)],
    ):
        if len(among) == 1:
            return among[0]
        for key in usual:
            if named.get(key) in among:
                return named[key]
    if not kinds:
        raise LinsightError(f"{shown(name)} has one column only, and no other for {field}=")
    raise LinsightError(f"{shown(name)} has the columns {', '.join(kinds)}: say which to use with {field}=")
