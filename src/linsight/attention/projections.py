"""The linear maps in front of a core, as data."""

from typing import NamedTuple


class Projection(NamedTuple):
    """One linear map of a layer: its name in the state dict, and which of q, k, v it yields, in order.

    also: what is the first of these parts, too, as keys that are projected as queries are.
    """

    name: str
    parts: tuple[str, ...]
    also: tuple[str, ...] = ()


# What no projection yields is the layer's input itself.
PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    "qkv": (Projection("qkv", ("q", "k", "v")),),
    "q_kv": (Projection("q", ("q",)), Projection("kv", ("k", "v"))),
    "q_k_v": (Projection("q", ("q",)), Projection("k", ("k",)), Projection("v", ("v",))),
    "qk": (Projection("qk", ("q", "k")),),
    "q_v": (Projection("q", ("q",), also=("k",)), Projection("v", ("v",))),
    "none": (),  # for a layer that makes its tokens itself
    "qkvx": (Projection("qkv", ("q", "k", "v", "extra")),),
}
