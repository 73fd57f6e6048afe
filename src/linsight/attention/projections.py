"""The linear maps in front of a core, as data."""

from typing import NamedTuple


class Projection(NamedTuple):
    """One linear map of a layer: its name in the state dict, and which of q, k, v it yields, in order.

    also: what is the first of these parts, too, as keys that are projected as queries are.
    by_head: the rows of each head stand together, its parts in turn; else those of a part.
    """

    name: str
    parts: tuple[str, ...]
    also: tuple[str, ...] = ()
    by_head: bool = False

    @property
    def yields(self) -> tuple[str, ...]:
        """All that it gives."""
        return self.parts + self.also


OF_QUERIES = ("q", "extra")  # made of the layer's input; the others of its context, or of keys on a coarser grid

# What no projection yields is the layer's input itself.
PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    "qkv": (Projection("qkv", ("q", "k", "v")),),
    "q_kv": (Projection("q", ("q",)), Projection("kv", ("k", "v"))),
    "q_k_v": (Projection("q", ("q",)), Projection("k", ("k",)), Projection("v", ("v",))),
    "qk": (Projection("qk", ("q", "k")),),
    "qk_v": (Projection("qk", ("q", "k")), Projection("v", ("v",))),
    "q_k": (Projection("q", ("q",)), Projection("k", ("k",))),
    "xkv": (Projection("qkv", ("extra", "k", "v")),),
    "qx_kv": (Projection("qx", ("q", "extra")), Projection("kv", ("k", "v"))),
    "q_v": (Projection("q", ("q",), also=("k",)), Projection("v", ("v",))),
    "k_v": (Projection("k", ("k",)), Projection("v", ("v",))),
    "v": (Projection("v", ("v",)),),
    "none": (),  # for a layer that makes its tokens itself
    "qkvx": (Projection("qkv", ("q", "k", "v", "extra")),),
}

# With those that only published layers have: they are loaded into, and exported from, one of the above.
PUBLISHED_PROJECTIONS = {
    **PROJECTIONS,
    "q_kvh": (Projection("q", ("q",)), Projection("kvh", ("k", "v"), by_head=True)),
}
