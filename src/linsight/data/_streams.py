"""Data sets of Hugging Face as streams: rows in sequence, shard by shard, without a download of the whole."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import fsspec
import fsspec.asyn
import torch.utils.data

from linsight.errors import ImageError, LinsightError
from linsight.recipe import Recipe

from ._layout import plain
from ._parquet import from_hub, image_column, import_datasets, label_column, label_text, quiet, stored
from .images import Batch, Samples
from .lanes import StreamFeed
from .sources import Reading, Source, first_line
from .trees import shown, some

_TOGETHER = 64  # rows that are taken out of a table at a time
_SHOWN = 96  # images of the head of a stream
_FEW = 8  # shards below which row groups are shards, where they can be


class Row(NamedTuple):
    """An image as a table keeps it, its class, -1 where it has none that is known, and where it stands."""

    cell: Any
    target: int
    label: str
    shard: int
    number: int

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{shown(self.label)}, shard {self.shard}, row {self.number}"


class Stream(Source):
    """Images of a table that is read in sequence: by shards, and in a shard by rows. None is found by its number.

    Args:
        name: what a user called it.
        table: of datasets, an IterableDataset.
        keys: the columns of images and labels.
        classes: their names; () where they are not known before they are read.
        length: how many images it has; None: not known.
        folder: of files that are told by their paths.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, name: str, table: Any, keys: tuple[str, str], classes: tuple[str, ...], length: int | None, folder: str
    ) -> None:
        kind = table.features[keys[1]]
        self.label_names: Sequence[str] | None = getattr(kind, "names", None)
        table = table.select_columns(list(keys))
        if table.num_shards < _FEW and hasattr(table, "reshard"):
            table = from_hub(name, table.reshard)
        self.table = table.with_format("arrow")
        self.label, self.keys, self.length, self.folder = name, keys, length, folder
        self.num_shards = int(table.num_shards)
        self.targets: list[int] = []  # not known before they are read
        self.classes = classes
        self._place = {plain(name): index for index, name in enumerate(classes)}

    def __len__(self) -> int:
        if self.length is None:
            self.length = sum(1 for shard in range(self.num_shards) for _ in self.rows(shard))
        return self.length

    def stored(self, index: int) -> Any:
        """See `Source`."""
        raise ImageError(f"{self.name(index)} cannot be read by its number: {shown(self.label)} is a stream")

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"image {index} of {shown(self.label)}"

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of a shard in sequence, from one on; raises a LinsightError where it cannot be read."""
        hf, number = import_datasets(), 0
        if torch.utils.data.get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # which a process has from the one that started it, perhaps locked
        image, label = self.keys
        try:
            pieces = self.table.shard(num_shards=self.num_shards, index=shard).iter(batch_size=_TOGETHER)
            while True:
                with quiet(hf):
                    piece = next(pieces, None)
                if piece is None:
                    return
                first, number = number, number + len(piece)
                if number <= start:
                    continue
                cells = piece.slice(max(0, start - first)).to_pydict()
                for offset, (cell, value) in enumerate(zip(cells[image], cells[label], strict=True)):
                    yield Row(cell, self._target(value), self.label, shard, max(first, start) + offset)
        except LinsightError:
            raise
        except Exception as error:  # of a network, or of a damaged file, it raises anything
            raise LinsightError(
                f"cannot read {shown(self.label)}, shard {shard}, from row {number}: {first_line(error)}"
            ) from error

    def _target(self, value: Any) -> int:
        if self.label_names is not None:
            known = isinstance(value, int) and 0 <= value < len(self.label_names)
            return self._place.get(plain(self.label_names[value]), -1) if known else -1
        return self._place.get(plain(label_text(value)), -1)

    def source(self, rows: Sequence[Row]) -> Source:
        """Some rows as a source."""
        return Reading(_Cells(rows, self.folder), [row.target for row in rows], self.classes)

    def head(self) -> Source:
        """The first images as a source: of some shards, as there are."""
        rows: list[Row] = []
        for shard in range(self.num_shards):
            rows += itertools.islice(self.rows(shard), _SHOWN // min(self.num_shards, 8))
            if len(rows) >= _SHOWN:
                break
        return self.source([row for row in rows if row.target >= 0])

    def under(self, classes: tuple[str, ...]) -> "Stream":
        """The stream under the classes of a model, found by their names.

        Raises:
            LinsightError: it has classes that the model does not know.
        """
        known = set(map(plain, classes))
        if others := [name for name in self.classes if plain(name) not in known]:
            raise LinsightError(
                f"{shown(self.label)} has the class {shown(others[0])}, which the model was not trained on: it knows "
                f"{some(classes)}"
            )
        found = copy.copy(self)
        found.classes = classes
        found._place = {plain(name): index for index, name in enumerate(classes)}
        return found

    def feed(self, samples: Samples, batches: Any, **more: Any) -> Iterable[Batch]:
        """A loader of its batches, with the arguments of `StreamFeed`: see `loader`."""
        return StreamFeed(self, samples, batches, **more)


class _Cells:
    """Images of rows, by place."""

    def __init__(self, rows: Sequence[Row], folder: str) -> None:
        self.rows, self.folder = rows, folder

    def open(self, index: int) -> BinaryIO:
        """An image, undecoded."""
        cell = self.rows[index].cell
        path = cell.get("path") if isinstance(cell, Mapping) and not cell.get("bytes") else None
        if path and "://" in path:
            with fsspec.open(path, "rb") as file:
                return stored(file.read(), self.folder)
        return stored(cell, self.folder)

    def filename(self, index: int) -> str:
        """The shard and the row."""
        return self.rows[index].name


class Streamed:
    """A data set that is read as a stream: a name of Hugging Face's hub, or Parquet files by split.

    Args:
        label: what a user called it.
        files: Parquet files by split; None: `label` is a name.
        lengths: how many rows the files of each split have.
        folder: of files that are told by their paths.
        recipe: columns, and what a stream does not tell of itself.
    """

    exact = False
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        label: str,
        files: Mapping[str, list[str]] | None,
        lengths: Mapping[str, int],
        folder: str,
        recipe: Recipe,
    ) -> None:
        hf = import_datasets()
        self.label, self.recipe, self.folder = label, recipe, folder
        if files is None:
            found = from_hub(label, lambda: hf.load_dataset(label, streaming=True, cache_dir=recipe.data_dir))
        else:
            named = {split or "train": names for split, names in files.items()}
            found = from_hub(label, lambda: hf.load_dataset("parquet", data_files=named, streaming=True))
        self.tables: Mapping[str, Any] = dict(found)
        self.splits: Sequence[str] = list(self.tables)
        self.lengths = dict(lengths)
        for split, table in self.tables.items():
            about = (table.info.splits or {}).get(split)
            if split not in self.lengths and about is not None and about.num_examples:
                self.lengths[split] = about.num_examples

    def open(self, split: str | None) -> Source:
        """The rows of a split, whose classes are () where they are not known before they are read."""
        hf, name = import_datasets(), f"hfids/{self.label}"
        split = split or self.splits[0]
        table = self.tables[split]
        kinds = table.features or from_hub(name, table._resolve_features).features
        image = image_column(name, kinds, self.recipe.image_key)
        label = label_column(name, kinds, image, self.recipe.label_key)
        kind, classes = kinds[label], tuple[str, ...]()
        if isinstance(kind, hf.ClassLabel):
            classes = tuple(map(plain, kind.names))
        elif kind.dtype == "bool":
            classes = ("False", "True")
        elif "int" in kind.dtype and self.recipe.num_classes:
            classes = tuple(map(str, range(self.recipe.num_classes)))
        if table.features is None:
            table = table.cast(kinds)
        return Stream(name, table, (image, label), classes, self.lengths.get(split), self.folder)
