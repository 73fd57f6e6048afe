"""Two records of what a mechanism can do: what may be asked in a call, and how the mechanism is built."""

import enum
from typing import NamedTuple


class Cost(enum.StrEnum):
    """How the cost of one image grows with its N tokens."""

    LINEAR = "linear"
    N_LOG_N = "n log n"
    N_ROOT_N = "n sqrt n"  # each token sees its row and its column
    WINDOWED = "windowed"  # each token sees a window: linear in N, quadratic in the window
    QUADRATIC = "quadratic"


class Capabilities(NamedTuple):
    """The things that may be asked in a call, as the formula allows. A False one raises an error that names who can.

    keep: drop tokens.  sizes: padded batches.  packed: packed batches (declared by nobody: see `register`).
    cross: keys from another sequence.  score_bias: an additive bias on the scores.  prefix: class and register tokens.
    """

    keep: bool = False
    sizes: bool = False
    packed: bool = False
    cross: bool = False
    score_bias: bool = False
    prefix: bool = False


class Structure(NamedTuple):
    """How a mechanism is built.

    stream: rounds of states that merge, so tiles, ranks and images of any size.  reduced: keys of the same image on
    a coarser grid.  causal: a causal form (`causal=True`).  bidirectional: a form in which every token sees all.
    rotary: places by a rotary embedding (`rotary=True`; declared by nobody: see `register`).
    cost: in N; hosts give windows and reductions to what is quadratic.
    """

    stream: bool = False
    reduced: bool = False
    causal: bool = False
    bidirectional: bool = True
    rotary: bool = False
    cost: Cost = Cost.LINEAR


# What is listed of a mechanism, and named in errors.
FLAGS = ("keep", "sizes", "packed", "cross", "reduced", "score_bias", "stream", "prefix", "causal", "rotary")
