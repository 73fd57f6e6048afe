"""The records that Dynamic Perceiver is made from, and those that it gives."""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor


class Network(NamedTuple):
    """The convolutional branch: one of `CNNS`, its channels times `width`.

    stem_stride: how much smaller the stem's map is than the image; None: the network's own.
    """

    name: str
    width: float = 1.0
    stem_stride: int | None = None


class Latents(NamedTuple):
    """The latent branch.

    tokens: how many; half as many at each later stage.
    depth_factor: 3, 3, 9 and 3 self-attention layers before the four stages, times these.
    mlp_ratio: of the self-attention layers.
    pool: sides of the map that latents read.
    isc: logits of an exit feed the next one.  last_z2x: x reads z before the last exit.
    dwc: a convolution before pooling.  x2z, z2x: the exchange, from the second stage on.
    """

    tokens: int = 128
    depth_factor: tuple[float, ...] = (1, 1, 1, 1)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratio: int = 4
    pool: int = 7
    isc: bool = True
    last_z2x: bool = True
    dwc: bool = True
    x2z: bool = True
    z2x: bool = True


class ExitLogits(NamedTuple):
    """The output in training: logits `(B, classes)` of each exit."""

    early: Tensor
    att: Tensor
    cnn: Tensor
    merge: Tensor


@dataclasses.dataclass(frozen=True)
class State:
    """All that is needed to go on after an exit, for a batch of images.

    state[which]: that of some of them; a mask, indices or a slice.
    passed: the exit.  x: the map.  z: the latents.  logits: of the latents' last exit, if they feed the next.
    """

    passed: int
    x: Tensor
    z: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: Any) -> "State":
        logits = None if self.logits is None else self.logits[which]
        return State(self.passed, self.x[which], self.z[which], logits)


class Exit(NamedTuple):
    """An exit passed: its number, from 1; its logits; the state to resume from."""

    number: int
    logits: Tensor
    state: State


class Decision(NamedTuple):
    """Logits `(B, classes)` of the exits at which images left, and the numbers of those, `(B,)`."""

    logits: Tensor
    exits: Tensor
