"""A model over the processes of a run: copies that agree (DDP), or parts that are joined as they are needed (FSDP2).

Both are torch's own. An image may lie over processes, too, in bands of rows (`linsight.parallel`).
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from linsight.attention import Layer
from linsight.errors import LinsightError
from linsight.parallel import shard_image, split
from linsight.runtime.launch import Copy
from linsight.runtime.processes import Processes

from .norms import synchronised

T = TypeVar("T")


class Spread:
    """The way in which the models of a run lie over its processes.

    Args:
        processes: of the run.
        device: that this one computes on.
        kind: "ddp" or "fsdp".
        rows: how many processes share an image, each a band of its rows.

    Raises:
        LinsightError: so many processes cannot be shared out so.
    """

    def __init__(self, processes: Processes, device: torch.device, kind: str = "ddp", rows: int = 1) -> None:
        copy = processes.copy
        if copy.world % rows:
            raise LinsightError(f"image_ranks={rows} does not divide the number of processes, which is {copy.world}")
        self.processes, self.device = processes, device
        self.copies = copy.world > 1 and kind == "ddp"
        self.shards = copy.world > 1 and kind == "fsdp"
        self.rows: DeviceMesh | None = None
        self.all: DeviceMesh | None = None
        if copy.world > 1:
            mesh = init_device_mesh(device.type, (copy.world // rows, rows), mesh_dim_names=("images", "rows"))
            self.rows = mesh["rows"] if rows > 1 else None
            self.all = init_device_mesh(device.type, (copy.world,))
        # which images are those of this process
        self.copy = Copy(copy.rank // rows, copy.world // rows, copy.local_rank, copy.local_world)

    def check(self, batch_size: int, model: nn.Module) -> None:
        """Raise a LinsightError unless each process, or each group of them with an image, has a share of a batch.

        Of a model with batch norms, some of which treat one image otherwise, that is two images.
        """
        if self.copy.world == 1:
            return
        norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        least = self.copy.world * (2 if norms else 1)
        if batch_size < least:
            raise LinsightError(
                f"batch_size={batch_size} is of all {self.copy.world} processes together: take {least} or more, for "
                f"each to have {'two images for its batch norms' if norms else 'an image'}"
            )

    @property
    def about(self) -> str:
        """A phrase on it."""
        world = self.processes.copy.world
        rows = f", {world // self.copy.world} an image" if self.rows is not None else ""
        return "" if world == 1 else f"{world} processes ({'fsdp' if self.shards else 'ddp'}{rows}); "

    def gather(self, value: T) -> list[T]:
        """A value of every process that has images of its own, by rank."""
        rows = self.processes.copy.world // self.copy.world
        return self.processes.gather(value)[::rows]

    def lay(self, model: nn.Module) -> nn.Module:
        """Lay a model over the processes, in place: before an optimiser knows its parameters."""
        if self.processes.copy.world == 1:
            return model
        if self.rows is not None:
            split(model, self.rows)
        synchronised(model)
        if self.shards:
            for unit in units(model):
                fully_shard(unit, mesh=self.all)
            fully_shard(model, mesh=self.all)
            for method in ("forward_features", "forward_head"):
                register_fsdp_forward_method(model, method)
        return model

    def lay_beside(self, whole: nn.Module, model: nn.Module) -> None:
        """Lay what is learned beside a laid model, by the module around both.

        Raises:
            LinsightError: images lie in bands, and what is around the model asks for more than logits.
        """
        if whole is model:
            return
        if self.rows is not None:
            raise LinsightError("image_ranks: an image in bands gives logits, and this task learns of features, too")
        for module in whole.children() if self.shards else ():
            if module is not model and any(True for _ in module.parameters()):
                fully_shard(module, mesh=self.all)

    def runnable(self, model: nn.Module) -> nn.Module:
        """The form of a laid model that is called with whole images."""
        return model if self.rows is None else Banded(model, self.rows)

    def learning(self, run: nn.Module) -> nn.Module:
        """The form whose gradients are the mean of those of all processes."""
        if not self.copies:
            return run
        # of depthwise kernels, which have one channel: as fast, whatever its stride
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(run, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextlib.contextmanager
    def adding(self, run: nn.Module, *, last: bool) -> Iterator[None]:
        """A context for a part of a batch. With the last one, the gradients become those of all processes."""
        if isinstance(run, DistributedDataParallel) and not last:
            with run.no_sync():
                yield
            return
        for module in run.modules() if self.shards else ():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
        yield

    def whole(self, state: Any) -> Any:
        """A state with whole tensors, on the CPU of the main process; elsewhere None in their place."""
        return _whole(state, self.processes.main) if self.shards else state

    def laid(self, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """The state of a module as it lies over the processes, from whole tensors of the same names."""
        if not self.shards:
            return state
        own = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        return {name: like(value, own.get(name)) for name, value in state.items()}

    def laid_optimiser(self, state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimiser as its parameters lie over the processes, from whole tensors."""
        if not self.shards:
            return state
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        entries = {
            number: {name: like(value, parameters[number]) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": entries}


class Banded(nn.Module):
    """A host that is split over ranks, called with whole images: each rank takes its rows, all get the logits."""

    def __init__(self, module: nn.Module, rows: DeviceMesh) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, images: Tensor) -> Any:
        """`(B, C, H, W)`, the same on the ranks of an image, -> logits `(B, classes)`."""
        return self.module(shard_image(images, self.rows), output="logits")


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the modules around its attention layers, which FSDP puts together one at a time."""
    return [
        module
        for module in model.modules()
        if module is not model and any(isinstance(c, Layer) or n == "attn" for n, c in module.named_children())
    ]


def _whole(tree: Any, keep: bool) -> Any:
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
    if isinstance(tree, Tensor):
        return tree.detach().cpu() if keep else None
    if isinstance(tree, Mapping):
        return {name: _whole(value, keep) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_whole(value, keep) for value in tree)
    return tree


def like(value: Any, own: Tensor | None) -> Any:
    """A whole tensor as another one lies over the processes, where it does."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape and value.dim():
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
