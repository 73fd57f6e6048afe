"""The run: steps in order, each over all tiles."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from linsight.data import Picture, opened
from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.fuse import fused
from linsight.models import HOSTS, Decode, Sample, StreamPlan, Streams
from linsight.ops import Grid, Tile, accumulator, tiles
from linsight.runtime.finite import require_finite

from ._decode import decode, parts
from .source import Source
from .store import Canvas, Memory, Scratch, fingerprint
from .tiled import TiledBlock

OUTPUTS = ("logits", "features", "map", "mask")
# Called after each tile with how many of all tiles of all passes are done.
Report = Callable[[int, int], None]


class Layer(NamedTuple):
    """A step made ready: what it is of, its block if it mixes, the grid it writes and the channels of a token."""

    step: Any
    block: TiledBlock | None
    grid: Grid
    dim: int
    cut: list[Tile]

    @property
    def passes(self) -> int:
        """How often each tile passes."""
        return 1 if self.block is None else self.block.passes


def stream(
    model: nn.Module,
    image: Any,
    *,
    tile: int = 1024,
    output: Literal["logits", "features", "map", "mask"] = "logits",
    scratch: str | os.PathLike[str] | None = None,
    resume: bool = False,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    level: int | None = None,
    mpp: float | None = None,
    fill: float | None = None,
    report: Report | None = None,
    note: Callable[[str], None] | None = None,
) -> Tensor:
    """Run `model` over an image of any size, tile by tile and layer by layer, exact to rounding.

    The result is that of `model(image)` on the whole image: global terms go through states that merge, local ones
    through halos. At any time, one map of activations is read and one written; all else of a tile is forgotten.

    Args:
        model: a host with mechanisms that stream, in evaluation mode.
        image: `(H, W, C)` or `(C, H, W)`, anything that has a shape and can be sliced: a memory map, a tensor, zarr;
            or the path of a file: .npy, TIFF, a whole slide, or what Pillow opens. White is 255 in uint8, 65535 in
            uint16, 1 in floats and in bool. Other whole numbers are of 0 to 255 where none is above that, else of 0 to
            65535; they are all looked at first. In a file, floats may be of 0 to 255, too. What is in no such range,
            and int8, is refused.
        tile: side of a tile in pixels. Larger ones are quicker and need more memory.
        output: "logits" `(1, classes)`, "features" `(1, C)` before the classifier, or "map" `(h, w, C)`, the last
            map after the last norm. Of a segmenter, "mask" `(H, W)`, the class of each pixel, in uint8 or int16, or
            "logits" `(1, classes, H, W)`.
        scratch: a folder for the maps, and for the state of a run that is stopped; None keeps all in memory. "map"
            and "mask" leave `map.npy` and `mask.npy` there, and give them memory-mapped.
        resume: go on with a stopped run in `scratch`, from the last step that it finished.
        dtype: that of the maps, float32 or bfloat16; a tile is computed in the model's own.
        mean, std: what pixels, brought to 0 to 1, are normalised by; None: those of the model. With a mean of 0 and a
            deviation of 1, floats in arrays and .npy files may be of any range: they are normalised already.
        level: which level of a pyramid is read, of a slide or a TIFF file; None: the first, of full size.
        mpp: or the level that is nearest to so many microns a pixel.
        fill: the value of pixels that are no number, in the image's own units; None: they are refused.
        report: called as `report(done, total)` after each tile of each pass.
        note: called with a line about a file that is not read as it is, as of several frames the first.

    Raises:
        CapabilityError: the host tells no steps, or a mechanism in it has no states that merge; before any work.
        LinsightError: the maps do not fit, there is no such level, or the model gives what is no number; as an
            ImageError, the image or a part of it cannot be read, or has values in no range, or that are no number.
        MissingExtraError: the file needs a package that is not installed.
    """
    if output not in OUTPUTS:
        raise UnknownNameError("output", output, OUTPUTS)
    if tile < 1:
        raise LinsightError(f"tile={tile}: give the side of a tile in pixels, 1 or more")
    if dtype not in (torch.float32, torch.bfloat16):
        raise LinsightError(f"dtype={dtype}: maps are kept in torch.float32 or torch.bfloat16")
    if resume and scratch is None:
        raise LinsightError("resume=True needs scratch=, the folder of the stopped run")
    plan = plan_of(model)
    if model.training:
        raise LinsightError("the model is in training mode, where layers are random: call model.eval()")
    model = fused(model)
    plan = plan_of(model)
    able = ("logits", "features", "map") if plan.decode is None else ("logits", "mask")
    if output not in able:
        raise CapabilityError(
            f"output='{output}': a {type(model).__name__} gives {', '.join(able)} of an image in tiles"
        )
    if plan.head is None and plan.decode is None and output != "map":
        raise CapabilityError("this model pools in a way that does not stream: take output='map', or global_pool='avg'")
    channels = next(part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d))  # the stem's
    mean, std = (_statistic(model, key, given, channels) for key, given in (("mean", mean), ("std", std)))
    plain = set(mean) == {0.0} and set(std) == {1.0}
    reader = opened(image, channels, level=level, mpp=mpp, fill=fill, any_range=plain)
    with reader as (pixels, name), torch.inference_mode():
        source = Source(pixels, mean, std, name, fill)
        if note is not None and isinstance(pixels, Picture):
            for line in pixels.notes:
                note(f"{name} has {line}")
        layers = _layers(plan, source.size, tile)
        ends = [end.steps - 1 for end in plan.maps] if plan.decode else []
        store = Memory(dtype) if scratch is None else Scratch(scratch, dtype, resume)
        store.keep(ends)
        run = _Run(model, plan, source, store, layers, report or (lambda done, total: None), tile)
        try:
            return run(output)
        except BaseException as error:
            store.stopped()
            if _is_out_of_memory(error):
                raise LinsightError(f"no memory for a tile of {tile} pixels: make tile= (--tile) smaller") from error
            raise


def _statistic(model: nn.Module, key: str, given: Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """One value a channel: what is given, or what the model's configuration has, which may know of colours alone."""
    if given is None:
        known: Sequence[float] = resolve_model_data_config(model)[key]
        return tuple(known) if len(known) == channels else (sum(known) / len(known),) * channels
    if len(given) != channels:
        raise LinsightError(f"{key}= has {len(given)} values, and the model takes {channels} channels")
    return tuple(given)


def _is_out_of_memory(error: BaseException) -> bool:
    """True where memory was short, on any device; on the CPU torch has no type of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def plan_of(model: nn.Module) -> StreamPlan:
    """The steps of `model`; raises a CapabilityError, naming the hosts that stream, where it tells none."""
    if not isinstance(model, Streams):
        able = {name.rpartition("_")[0] for name, host in HOSTS.items() if hasattr(host.model_cls, "stream_plan")}
        raise CapabilityError(
            f"a {type(model).__name__} does not tell the steps of an image in parts; these hosts do: "
            f"{', '.join(sorted(able))}"
        )
    return model.stream_plan()


def _layers(plan: StreamPlan, size: tuple[int, int], tile: int) -> list[Layer]:
    """The steps with their grids and tiles, all checked before any work."""
    found: list[Layer] = []
    cut: list[Tile] = []
    grid, dim, down, right = Grid(*size), 0, 1, 1
    for step in plan.steps:
        if isinstance(step, Sample):
            prefix = 0 if step.prefix is None else step.prefix.shape[1]
            grid, dim = Grid(*step.size((grid.height, grid.width)), prefix), step.dim
            if min(grid[:2]) < 1:
                raise LinsightError(f"an image of {size[0]}x{size[1]} pixels leaves no tokens in this model")
            down, right = down * step.stride[0], right * step.stride[1]
            cut = tiles(grid, max(1, tile // down), max(1, tile // right))
            found.append(Layer(step, None, grid, dim, cut))
        else:
            found.append(Layer(step, TiledBlock(step.block), grid, dim, cut))
    return found


class _Run:
    def __init__(
        self,
        model: nn.Module,
        plan: StreamPlan,
        source: Source,
        store: Memory | Scratch,
        layers: list[Layer],
        report: Report,
        tile: int,
    ) -> None:
        self.model, self.plan, self.source, self.store, self.layers = model, plan, source, store, layers
        self.like = next(model.parameters())  # whose device and dtype tiles are computed in
        self.report, self.tile = report, tile
        self.ends = {end.steps - 1 for end in plan.maps} if plan.decode else set()  # steps whose maps are kept
        self.done, self.total = 0, sum(layer.passes * len(layer.cut) for layer in layers)
        self.total += len(layers[-1].cut) if plan.decode is None else sum(1 for _ in self._parts())

    def __call__(self, output: str) -> Tensor:
        last = self.layers[-1]
        shapes = [(layer.grid.height, layer.grid.width, layer.dim) for layer in self.layers]
        sizes = [h * w * c * self.store.dtype.itemsize for h, w, c in shapes]
        peaks = [a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True)]
        if output == "map":
            h, w, c = shapes[-1]
            peaks[-1] += 4 * h * w * c
        for end in self.ends:  # a kept map is there beside those of later steps
            peaks = [peak + sizes[end] * (place > end + 1) for place, peak in enumerate(peaks)]
        self.store.check(max(peaks))
        work = self._work()
        start, canvas, prefix = self.store.resume(work)
        if prefix is not None:
            prefix = prefix.to(self.like)
        self.done = sum(layer.passes * len(layer.cut) for layer in self.layers[:start])
        kept = {i: self.store.kept(i, shapes[i]) for i in sorted(self.ends) if i < start}
        for i, (layer, shape) in enumerate(zip(self.layers[start:], shapes[start:], strict=True), start):
            new = self.store.new(i, shape)
            if layer.block is None:
                prefix = self._sample(layer, canvas, new)
            else:
                assert canvas is not None
                prefix = self._mix(layer, canvas, prefix, new)
            canvas = new
            kept |= {i: canvas} if i in self.ends else {}
            self.store.done(i, canvas, prefix, work)
        assert canvas is not None
        if self.plan.decode is not None:
            return self._decode(self.plan.decode, [kept[end.steps - 1] for end in self.plan.maps], output)
        return self._end(last, canvas, prefix, output)

    def _parts(self) -> Iterator[Any]:
        plan = self.plan.decode
        assert plan is not None
        return parts(self.source.size, self.tile, plan.step, plan.margin)

    def _decode(self, plan: Decode, maps: list[Canvas], output: str) -> Tensor:
        """The class of each pixel, or their logits."""
        count, size = (1 if output == "mask" else plan.classes), self.source.size
        kind = (torch.uint8 if plan.classes <= 256 else torch.int16) if output == "mask" else torch.float32
        final = self.store.output((*size, count), kind, f"{output}.npy")

        def write(rows: slice, columns: slice, logits: Tensor) -> None:
            found = logits.argmax(0, keepdim=True) if output == "mask" else logits
            final.data[rows, columns] = found.movedim(0, -1).to(final.data)
            self._tell()

        decode(plan, self.plan.maps, maps, self._parts(), like=self.like, name=self.source.name, write=write)
        found = self.store.end(final)
        assert found is not None
        return found[..., 0] if output == "mask" else found.movedim(-1, 0)[None]

    def _work(self) -> dict[str, Any]:
        """The work that a stopped run must have been doing, for this one to go on with it."""
        if isinstance(self.store, Memory):
            return {}
        height, width = self.source.size
        # Where there may be something: much of a slide is blank.
        rows, columns = (
            [(part * side // 8, min(side, part * side // 8 + 32)) for part in range(8)] for side in (height, width)
        )
        patches = [self.source.read(row, column) for row in rows for column in columns]
        return {
            "model": fingerprint(self.model.state_dict().values()),
            "image": f"{self.source.shape} {fingerprint(patches)}",
            "dtype": str(self.store.dtype),
        }

    def _tell(self) -> None:
        self.done += 1
        self.report(self.done, self.total)

    def _sample(self, layer: Layer, canvas: Canvas | None, new: Canvas) -> Tensor | None:
        step: Sample = layer.step
        size = self.source.size if canvas is None else canvas.data.shape[:2]
        for tile in layer.cut:
            wide = dataclasses.replace(tile, halo=step.margin)
            rows, columns = (
                (first * stride, min(end * stride, side) if end < count else side)
                for (first, end), stride, side, count in zip(
                    (wide.rows, wide.columns), step.stride, size, layer.grid[:2], strict=True
                )
            )
            if canvas is None:
                crop = self.source.read(rows, columns).to(self.like)
            else:
                crop = canvas.rectangle(rows, columns, self.like).permute(0, 3, 1, 2)
            x = step.run(crop)
            top, left = tile.top - wide.rows[0], tile.left - wide.columns[0]
            x = x[:, top : top + tile.height, left : left + tile.width]
            assert x.shape[1:3] == (tile.height, tile.width)
            x = x.flatten(1, 2)
            own = dataclasses.replace(tile, grid=tile.grid._replace(prefix=0))
            new.write(tile, x if step.place is None else step.place(x, own))
            self._tell()
        return step.prefix

    def _mix(self, layer: Layer, canvas: Canvas, prefix: Tensor | None, new: Canvas) -> Tensor | None:
        block, width, after = layer.block, layer.step.width, prefix
        assert block is not None
        again = True
        while again:
            for tile in layer.cut:
                wide = dataclasses.replace(tile, halo=block.reach)
                x = canvas.read(wide, self.like)
                if block.seen(wide).prefix:
                    assert prefix is not None
                    x = torch.cat([prefix, x], dim=1)
                out = block.run(x[..., :width], wide)
                if out is not None:
                    if width < layer.dim:
                        own = canvas.read(tile, self.like)
                        rest = own if not tile.prefix or prefix is None else torch.cat([prefix, own], dim=1)
                        out = torch.cat([out, rest[..., width:]], dim=-1)
                    if tile.prefix:
                        after = out[:, : tile.prefix]
                    new.write(tile, out[:, tile.prefix :])
                self._tell()
            again = block.end_pass()
        return after

    def _end(self, layer: Layer, canvas: Canvas, prefix: Tensor | None, output: str) -> Tensor:
        plan, shape = self.plan, layer.grid[:2]
        final: Canvas | None = None
        total: Tensor | None = None
        for tile in layer.cut:
            x = require_finite(plan.norm(canvas.read(tile, self.like)), self.source.name)
            if output == "map":
                final = final or self.store.output((*shape, x.shape[-1]))
                final.write(tile, x)
            else:
                x = x if plan.pooled is None else plan.pooled(x)
                part = x.sum(dim=1, keepdim=True, dtype=accumulator(x.dtype))
                part = part.cpu().double()  # there, as not every device has float64
                total = part if total is None else total + part
            self._tell()
        found = self.store.end(final)
        if output == "map":
            assert found is not None
            return found
        assert total is not None and plan.head is not None
        mean = (total / (shape[0] * shape[1])).to(self.like)
        first = mean[:, :0] if prefix is None else plan.norm(prefix)
        return require_finite(plan.head(first, mean, output == "features"), self.source.name)
