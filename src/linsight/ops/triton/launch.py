"""How kernels are started: the one table of block sizes, how tokens are shared among programs, and `Inputs`.

Nothing is tuned at run time: sizes are dynamic, and sums must not depend on timing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..features import Features
from .maps import MAPS


class Blocks(NamedTuple):
    """Sizes. tokens: in a block.  warps: of a program.  stages: blocks that are loaded ahead, and the one at hand."""

    tokens: int
    warps: int
    stages: int


# By the widest block of channels, forward and backward. Chosen by what the compiler says of sm_80 and sm_90: a state is
# width^2 float32 registers, so wide heads take more warps, and backwards, which hold two more tiles, fewer tokens.
HALF = (
    {16: Blocks(128, 4, 3), 32: Blocks(64, 4, 3), 64: Blocks(64, 4, 3), 128: Blocks(64, 8, 2)},
    {16: Blocks(64, 4, 3), 32: Blocks(64, 4, 3), 64: Blocks(32, 4, 3), 128: Blocks(32, 8, 2)},
)
# The ordinary units multiply float32 out of registers: blocks are small, and nothing is loaded ahead.
_FULL = (
    {16: Blocks(64, 4, 1), 32: Blocks(32, 4, 1), 64: Blocks(16, 4, 1), 128: Blocks(16, 8, 1)},
    {16: Blocks(32, 4, 1), 32: Blocks(32, 4, 1), 64: Blocks(16, 4, 1), 128: Blocks(16, 8, 1)},
)
INTERPRETED = Blocks(32, 1, 1)

_WIDEST = 128  # channels of a head
_ROOM = 1280  # bytes of shared memory for each of them, as compiled for sm_80: states lie there as operands
_PROGRAMS = 4  # for each multiprocessor: enough loads in flight to hide the latency of memory
_LEAST = 256  # tokens a program: below, writing partial states costs more than the programs gain
_MOST = 64  # shares, which `fold_kernel` reads at once

# The fields of `Inputs` as arguments of operators of torch.
SCHEMA = (
    "Tensor x, Tensor? column, Tensor? before, Tensor? after, Tensor? cos, Tensor? sin, SymInt[] place, "
    "str map, float power"
)


class Inputs(NamedTuple):
    """`Features` as the arguments of an operator.  place: height, width, prefix and heads of the rotation."""

    x: Tensor
    column: Tensor | None
    before: Tensor | None
    after: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    place: Sequence[int]
    map: str
    power: float

    @classmethod
    def of(cls, features: Features) -> "Inputs":
        """The arguments that `features` are."""
        x, turn, column = features.x, features.turn, features.column
        if column is not None:
            column = column.expand(x.shape[2:])
        cos, sin, place = None, None, [0, 1, 0, 1]
        if turn is not None:
            cos, sin, place = turn.cos, turn.sin, [*turn.size, turn.prefix, turn.heads]
        return cls(x, column, features.before, features.after, cos, sin, place, features.map, float(features.power))

    def plan(self, width: int, states: torch.dtype, tokens: torch.dtype, backward: bool, **flags: bool) -> "Plan":
        """How to run a kernel on these and values of `width`; `flags` are its. `tokens` is how exact it is to be."""
        x, split = self.x, _split(tokens)
        chosen = _blocks(x, width, split, backward)
        images, n, heads, d = x.shape
        factors = tuple(None if t is None else t.to(states).contiguous() for t in self[1:4])
        turn = None
        if self.cos is not None and self.sin is not None:
            turn = (self.cos.to(states).contiguous(), self.sin.to(states).contiguous(), *self.place)
        whole = self.power == int(self.power) and 0 < self.power < 1024
        constants = {
            "MAP": MAPS[self.map].value,
            "POWER": int(self.power) if whole else self.power,
            "WHOLE": whole,
            # Mapped tokens that are values of their own dtype are multiplied as they are.
            "EXACT": MAPS[self.map].exact and self.power == 1 and turn is None and factors == (None, None, None),
            "SPLIT": split,
            "D": d,
            "E": width,
            "BLOCK_N": chosen.tokens,
            "BLOCK_D": block(d),
            "BLOCK_E": block(width),
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
            "enable_fp_fusion": True,  # Triton's default is about to change
            **flags,
        }
        if backward:
            constants["SLOPE"] = MAPS[self.map].slope
        splits, share = shares(n, images * heads, chosen, x.device)
        return Plan(self, factors, turn, splits, share, constants)


class Plan(NamedTuple):
    """splits: programs that share the tokens of an image and head.  share: tokens of one, a multiple of a block."""

    inputs: Inputs
    factors: tuple[Tensor | None, ...]
    turn: tuple[Any, ...] | None
    splits: int
    share: int
    constants: dict[str, Any]

    def run(self, kernel: Any, *arguments: Any) -> None:
        """Start `kernel` on the inputs and `arguments`."""
        x = self.inputs.x
        images, tokens, heads, _ = x.shape
        with on(x):
            kernel[(images * heads, self.splits)](
                *(x, x.stride(), self.factors, self.turn, *arguments, tokens, heads, self.share),
                **self.constants,
            )


def block(width: int) -> int:
    """The block of channels for a width: a power of two, 16 or more, as matrix units ask."""
    return max(16, 1 << (width - 1).bit_length())


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device: make it that of `x`."""
    if x.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def _split(dtype: torch.dtype) -> bool:
    """True where factors in float32 may be two bfloat16: of float32 tokens, where torch is told so."""
    if dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return dtype in (torch.float16, torch.bfloat16)


def _blocks(x: Tensor, width: int, split: bool, backward: bool) -> Blocks:
    if x.device.type == "cpu":
        return INTERPRETED
    return (HALF if split else _FULL)[backward][block(max(width, x.shape[-1]))]


def shares(tokens: int, programs: int, chosen: Blocks, device: torch.device) -> tuple[int, int]:
    """How many shares the tokens are cut into for each of `programs` images and heads, and the length of one."""
    if device.type == "cpu":
        wanted, least = 2, 1
    else:
        wanted, least = -(-_PROGRAMS * multiprocessors(device) // max(programs, 1)), _LEAST
    many = max(1, min(wanted, -(-tokens // least), _MOST))
    length = max(1, -(-tokens // (many * chosen.tokens))) * chosen.tokens
    return max(1, -(-tokens // length)), length


def widest(x: Tensor) -> int:
    """The widest block of channels that programs on tensors like `x` can hold."""
    if x.device.type == "cpu":
        return _WIDEST
    return _widest(x.device, 2 if x.dtype == torch.float64 else 1)


@torch.compiler.assume_constant_result  # compilers cannot trace what asks a device
def _widest(device: torch.device, words: int) -> int:
    # An H100 has 227 KB of shared memory a program, an A100 163 KB, most others 99 KB or 64 KB.
    room = getattr(properties_of(device), "shared_memory_per_block_optin", 0) or 2**16
    return min(_WIDEST, 1 << (room // (_ROOM * words)).bit_length() - 1)


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side."""
    properties = properties_of(device)
    return getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_eu_count", 64) // 8


@cache
def properties_of(device: torch.device) -> Any:
    """torch's properties of the device."""
    return torch.get_device_module(device).get_device_properties(device)
