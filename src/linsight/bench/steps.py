"""The steps that are timed: a forward, or a forward and backward, of an operator or of a model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from linsight.fuse import fuse
from linsight.runtime.device import autocast, pick_dtype

from ._subjects import Subject, build
from .counting import count_macs, count_parameters
from .operators import operator_step
from .roofline import Traffic, measure_peaks
from .rounds import Send, Step, alternate, peak_of

STEPS = {"infer": "forward", "train": "training"}
CLASSES = 1000
Build = Callable[[Subject, tuple[int, int], "str | torch.device"], nn.Module]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The setting that all cells of a run share.

    device, amp: as `pick_device` and `pick_dtype` take them.  threads: of the CPU.
    seconds: to spend on the rounds of a cell; there are three at least.
    dim, heads: of operators.  compiled: by torch.compile.  graphs: replay CUDA graphs.
    fused: models of ours as `linsight.fuse` makes them.
    """

    device: str = "cpu"
    amp: str = "off"
    threads: int = 1
    seconds: float = 10.0
    dim: int = 192
    heads: int = 6
    compiled: bool = False
    graphs: bool = False
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A measurement: a step of `STEPS` at one size, in pixels of images or in tokens of operators.

    The step "peaks" has no size: it measures what the machine does at its best.
    """

    step: str
    height: int
    width: int
    batch: int
    setting: Setting


def measure(cell: Cell, sides: Mapping[int, Subject], send: Send, build: Build = build) -> None:
    """Measure the sides of a cell, in the process of a `Worker`; `build` makes the models."""
    setting = cell.setting
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    if cell.step == "peaks":
        for side in sides:
            send(side, "begin", None)
            send(side, "facts", measure_peaks(device, pick_dtype(setting.amp, device)[0]))
        return
    alternate(sides, functools.partial(make, cell=cell, build=build), send, device, setting.seconds)


def make(subject: Subject, cell: Cell, build: Build = build) -> tuple[dict[str, Any], Step]:
    """The cost of the step of a cell, and the step to time."""
    setting, device = cell.setting, torch.device(cell.setting.device)
    torch.manual_seed(0)
    if subject.kind == "operator":
        facts, step = operator_step(
            subject.name,
            (cell.height, cell.width),
            cell.batch,
            device,
            pick_dtype(setting.amp, device)[0],
            dim=setting.dim,
            heads=setting.heads,
            train=cell.step == "train",
            compiled=setting.compiled,
        )
    else:
        facts, step = _model_step(subject, cell, build)
    if setting.graphs:  # a replayed graph allocates nothing
        step()
        facts["peak_mb"] = peak_of(step, device)
        eager = step
        step = captured(lambda: eager)
    return facts, step


def step_of(
    model: nn.Module,
    size: int | tuple[int, int],
    batch: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype | None,
    train: bool,
    *,
    graphs: bool = False,
) -> Step:
    """A forward of `model`, or a training step of it with AdamW, on `batch` random images of `size`.

    graphs: whether it is to be captured as a CUDA graph.
    """
    model.train(train)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(batch, 3, height, width, device=device)
    if not train:

        def infer() -> None:
            with torch.inference_mode(), autocast(device, dtype):
                model(images)

        return infer
    labels = torch.randint(classes, (batch,), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, capturable=graphs)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def update() -> None:
        with autocast(device, dtype):
            logits = model(images)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimiser)
        scaler.update()

    return update


@functools.cache
def cost(subject: Subject, size: tuple[int, int], build: Build = build) -> dict[str, float]:
    """Millions of parameters of a model; for one image, billions of multiply-adds and all operations of a forward."""
    model = build(subject, size, "meta").eval()
    macs = count_macs(model, torch.empty(1, 3, *size, device="meta"))
    return {"param_count": round(count_parameters(model) / 1e6, 2), "gmacs": round(macs / 1e9, 2), "flops": 2 * macs}


def _model_step(subject: Subject, cell: Cell, build: Build) -> tuple[dict[str, Any], Step]:
    setting, size, train = cell.setting, (cell.height, cell.width), cell.step == "train"
    device = torch.device(setting.device)
    dtype, _ = pick_dtype(setting.amp, device)
    facts: dict[str, Any] = dict(cost(subject, size, build))
    facts["flops"] *= cell.batch * (3 if train else 1)  # a backward is two forwards: torch's own count errs in groups
    model = build(subject, size, device)
    if setting.fused:
        model = fuse(model, inplace=True)

    def prepared(model: Any) -> Step:
        return step_of(model, size, cell.batch, CLASSES, device, dtype, train, graphs=setting.graphs)

    step = prepared(model)
    step()  # biases of a grid, made at first, are no traffic of a step
    with Traffic() as traffic:
        step()
    facts |= {"bytes": traffic.bytes, "form": ", ".join(sorted(traffic.fused))}
    return facts, prepared(torch.compile(model)) if setting.compiled else step


def captured(prepare: Callable[[], Step]) -> Step:
    """A CUDA graph of the step that `prepare` makes, to be replayed. All of it runs on a CUDA stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = prepare()
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
