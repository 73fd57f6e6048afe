"""Draw which tokens the output of one token depends on, for every mechanism: `python docs/patterns.py`.

The picture is docs/patterns.png. With names, only those: `python docs/patterns.py inline nat --out some.png`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from linsight import Grid
from linsight.attention import create_attention, create_block, list_attentions, mechanism
from linsight.errors import UnknownNameError

SIDE, DIM, HEADS = 15, 32, 4  # of the grid, in tokens; of the layer
PROBES, DECADES = 6, 5  # directions of the output that are asked; powers of ten between the lightest and the darkest
COLUMNS = 9


def pattern(name: str, seed: int = 0) -> Tensor:
    """How much the output of the token in the middle depends on each, `(SIDE, SIDE)`, 1 for the most.

    The root of the mean square of its derivatives, along random directions of the output, by each token, for random
    tokens and fresh weights, in float64.
    """
    torch.manual_seed(seed)
    make = create_block if mechanism(name).kind == "block" else create_attention
    layer = make(name, DIM, HEADS, grid=(SIDE, SIDE)).double().eval()
    for parameter in layer.parameters():  # what begins at zero would hide what goes through it
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, SIDE * SIDE, DIM, dtype=torch.float64, requires_grad=True)
    middle = layer(x, Grid(SIDE, SIDE))[0, SIDE * SIDE // 2]
    squares = torch.zeros(SIDE * SIDE, dtype=torch.float64)
    for _ in range(PROBES):
        (slope,) = torch.autograd.grad(middle @ torch.randn_like(middle), x, retain_graph=True)
        squares += slope[0].square().sum(-1)
    found = squares.sqrt().reshape(SIDE, SIDE)
    return found / found.max()


def shade(values: Tensor) -> Tensor:
    """Values of 0 to 1 by their logarithm, from 0 where they are less than 1e-5 to 1."""
    return (1 + values.clamp(min=1e-300).log10() / DECADES).clamp(min=0)


def draw(names: Sequence[str], path: Path) -> None:
    """A picture of the patterns of these mechanisms."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(names) / COLUMNS)
    columns = min(COLUMNS, len(names))
    figure = Figure(figsize=(1.25 * columns, 1.45 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, axis in enumerate(axes):
        axis.set_axis_off()
        if place < len(names):
            axis.imshow(shade(pattern(names[place])).numpy(), cmap="viridis", vmin=0, vmax=1)
            axis.set_title(names[place], fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MECHANISM")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("patterns.png"))
    options = parser.parse_args(arguments)
    known = [entry.name for entry in list_attentions()]
    for name in options.names:
        if name not in known:
            parser.error(str(UnknownNameError("mechanism", name, known)))
    draw(options.names or known, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
