"""Progress of a run: a bar with speed and time left on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.status import Status

if TYPE_CHECKING:
    from linsight.tasks import Column


class Silent:
    """A reporter that says nothing; the base of the others."""

    def note(self, text: str) -> None:
        """One line that the user should see."""

    def busy(self, text: str) -> None:
        """Before the first step: the run is at this."""

    def begin(self, epochs: int, steps: int, epoch: int, step: int, columns: "Sequence[Column]" = ()) -> None:
        """The run starts, or goes on, at `epoch` and `step` of `epochs` times `steps`. columns: measures to show."""

    def step(self, epoch: int, step: int, images: int, loss: float) -> None:
        """`step` steps of `epoch` are done, the last with `images` images."""

    def update(self, done: int, loss_sum: float, images: int, lr: float) -> None:
        """`done` updates are made in all, the last at the rate `lr`; of the epoch, `images` have this sum of losses."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch is done, with these metrics."""

    def end(self) -> None:
        """The run is over, in whatever way."""


class Lines(Silent):
    """A reporter of one line an epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.columns: Sequence[Column] = ()

    def note(self, text: str) -> None:
        """See `Silent`."""
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def begin(self, epochs: int, steps: int, epoch: int, step: int, columns: "Sequence[Column]" = ()) -> None:
        """See `Silent`."""
        self.columns = columns

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """See `Silent`."""
        skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
        number = f"{row['epoch']:>{len(str(epochs))}}/{epochs}"
        value = f"  val {row['val_loss']:.4f}" if "val_loss" in row else ""
        measures = "".join(f"  {column.label} {column.text(row)}" for column in self.columns)
        self.note(
            f"epoch {number}  loss {row['train_loss']:.4f}{value}{measures}"
            f"  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s{skipped}"
        )


class Bars(Lines):
    """A reporter of a line an epoch, above two bars; before the first step, beside a spinner."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.spinner: Status | None = None
        text = TextColumn("{task.fields[text]}")
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text)
        self.bars = Progress(*columns, console=console, transient=True)

    def busy(self, text: str) -> None:
        """See `Silent`."""
        if self.spinner is None:
            self.spinner = self.console.status(text)
            self.spinner.start()
        self.spinner.update(f"{text} ...")

    def _rest(self) -> None:
        if self.spinner is not None:
            self.spinner.stop()
            self.spinner = None

    def begin(self, epochs: int, steps: int, epoch: int, step: int, columns: "Sequence[Column]" = ()) -> None:
        """See `Silent`."""
        super().begin(epochs, steps, epoch, step, columns)
        self._rest()
        self.steps, self.images, self.seen = steps, 0, 0
        self.started = self.shown = time.perf_counter()
        self.total = self.bars.add_task("run", total=epochs * steps, completed=epoch * steps + step, text="")
        self.one = self.bars.add_task("epoch", total=steps, completed=step, text="the first batch ...")
        self.bars.start()

    def step(self, epoch: int, step: int, images: int, loss: float) -> None:
        """See `Silent`."""
        self.images += images
        self.seen += 1
        now = time.perf_counter()
        if now - self.shown < 0.2 and step < self.steps:
            return
        self.shown = now
        elapsed = now - self.started
        done = epoch * self.steps + step
        left = elapsed / self.seen * ((self.bars.tasks[0].total or 0) - done)
        self.bars.update(self.total, completed=done, text=f"about {_clock(left)} left")
        self.bars.update(
            self.one,
            description=f"epoch {epoch + 1}",
            completed=step,
            text=f"{self.images / elapsed:.0f} images/s  loss {loss:.4f}",
        )

    def end(self) -> None:
        """See `Silent`."""
        self._rest()
        self.bars.stop()


class Tiles:
    """A reporter of how far the stream of an image is, which says nothing; the base of the others."""

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """While entered, tiles are those of the image `name`."""
        self.name, self.first, self.started = name, 0, time.perf_counter()  # set anew when a first tile is done
        yield

    def tile(self, done: int, total: int) -> None:
        """`done` of all `total` tiles of all passes are done; a resumed run does not begin with the first."""

    def left(self, done: int, total: int, now: float) -> str:
        """About how long the others take, once two have told."""
        if not self.first:
            self.first, self.started = done, now
            return ""
        each = (now - self.started) / max(1, done - self.first)
        return f"about {_clock(each * (total - done))} left"


class TileLines(Tiles):
    """A reporter of a line a minute."""

    every = 60.0

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """See `Tiles`."""
        with super().of(name):
            self.said = self.started
            yield

    def tile(self, done: int, total: int) -> None:
        """See `Tiles`."""
        now = time.perf_counter()
        left = self.left(done, total, now)
        if left and now - self.said >= self.every:
            self.said = now
            line = f"{self.name}: {100 * done // total} % of {total} tiles, {left}"
            self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class TileBar(Tiles):
    """A reporter with a bar."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """See `Tiles`."""
        text = (TextColumn("{task.description}", markup=False), TextColumn("{task.percentage:>3.0f} %"))
        columns = (*text, BarColumn(), MofNCompleteColumn(), TextColumn("tiles, {task.fields[left]}"))
        with super().of(name), Progress(*columns, console=self.console, transient=True) as self.bar:
            self.task = self.bar.add_task(name, total=None, left="")
            yield

    def tile(self, done: int, total: int) -> None:
        """See `Tiles`."""
        self.bar.update(self.task, completed=done, total=total, left=self.left(done, total, time.perf_counter()))


def tile_reporter(console: Console) -> Tiles:
    """The reporter of tiles that fits the console."""
    return TileBar(console) if console.is_terminal else TileLines(console)


class Images:
    """A reporter of how many images are predicted, which says nothing; the base of the others."""

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` images were predicted before."""
        self.first, self.done, self.total, self.started = done, done, total, time.perf_counter()

    def step(self, images: int) -> None:
        """So many more are."""
        self.done += images

    def end(self) -> None:
        """No more will be."""

    def speed(self) -> str:
        """Images a second, and about how long the others take."""
        rate = max(self.done - self.first, 1) / max(time.perf_counter() - self.started, 1e-9)
        return f"{rate:,.{0 if rate >= 10 else 1}f} images/s, about {_clock((self.total - self.done) / rate)} left"


class ImageLines(Images):
    """A reporter of a line a minute."""

    every = 60.0

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, done: int, total: int) -> None:
        """See `Images`."""
        super().begin(done, total)
        self.said = self.started

    def step(self, images: int) -> None:
        """See `Images`."""
        super().step(images)
        if time.perf_counter() - self.said >= self.every:
            self.said = time.perf_counter()
            line = f"{self.done:,} of {self.total:,} images, {self.speed()}"
            self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class ImageBar(Images):
    """A reporter with a bar."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, {task.fields[text]}"))
        self.bar = Progress(SpinnerColumn(), *columns, console=console, transient=True)

    def begin(self, done: int, total: int) -> None:
        """See `Images`."""
        super().begin(done, total)
        self.task = self.bar.add_task("images", total=total, completed=done, text="the first batch ...")
        self.bar.start()

    def step(self, images: int) -> None:
        """See `Images`."""
        super().step(images)
        self.bar.update(self.task, completed=self.done, text=self.speed())

    def end(self) -> None:
        """See `Images`."""
        self.bar.stop()


def image_reporter(console: Console) -> Images:
    """The reporter of images that fits the console."""
    return ImageBar(console) if console.is_terminal else ImageLines(console)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def reporter(console: Console) -> Silent:
    """The reporter of a run that fits the console."""
    return Bars(console) if console.is_terminal else Lines(console)
