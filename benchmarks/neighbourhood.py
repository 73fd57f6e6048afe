"""Neighbourhood attention by its windows, beside softmax under a mask of all pairs: equality, memory, time.

    python benchmarks/neighbourhood.py --flex --docs docs
    python benchmarks/neighbourhood.py --sides 32,64 --kernel 13 --dilation 2 --device cuda --dtype bfloat16

Random q, k and v on square grids, without a bias. The mask is made before the clock starts. A third form is torch's
FlexAttention, compiled for each grid: on CUDA that of linsight, with --flex on a CPU, where it has no gradients, tokens
row by row and the windows as a mask. --docs puts the table into how-fast.md there.
"""

import argparse
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _script import exit_status
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from linsight.bench import Side, alternate, ratios
from linsight.errors import LinsightError
from linsight.ops import AxisWindow, Grid, Tile, axis_window, neighbourhood_attention, use_form
from linsight.runtime.device import pick_device
from linsight.runtime.files import write_text

PAGE = "how-fast.md"
BLOCK = re.compile(r"(<!-- generated: neighbourhood -->\n).*?(?=<!-- end -->)", re.DOTALL)
DENSE, FLEX = "masked softmax", "FlexAttention, compiled"
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def pairs(side: int, window: AxisWindow, device: torch.device) -> Tensor:
    """`(N, N)` bool of a square grid, True where the query of a row sees the key of a column."""
    place = torch.arange(side, device=device)
    keys, _, seen = axis_window(place, torch.tensor([[side]], device=device), window)
    keys = torch.where(seen, keys, place[:, None])[0]  # each query sees itself
    axis = torch.zeros(side, side, dtype=torch.bool, device=device).scatter(1, keys, True)
    return (axis[:, None, :, None] & axis[:, None]).flatten(2).flatten(0, 1)


def masked_flex(side: int, window: AxisWindow) -> Form:
    """FlexAttention on a CPU, compiled. Its mask is arithmetic: torch does not compile one that reads tables there."""
    kernel, step = window.kernel, window.dilation
    if kernel % 2 == 0 or side < kernel * step:
        raise LinsightError(f"--flex is for an odd --kernel, and sides from {kernel * step} on")

    def sees(place: Tensor, key: Tensor) -> Tensor:
        group = place % step
        most = (side - group + step - 1) // step - kernel
        first = torch.minimum((place // step - kernel // 2).clamp(min=0), most)
        return (key % step == group) & (key // step >= first) & (key // step < first + kernel)

    def mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(i // side, j // side) & sees(i % side, j % side)

    torch._dynamo.reset()  # or one graph would be made for all grids
    run, blocks = torch.compile(flex_attention), create_block_mask(mask, None, None, side**2, side**2, device="cpu")
    return lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)


def forms(side: int, window: AxisWindow, device: torch.device, flex_too: bool = False) -> dict[str, Form]:
    """All ways to compute it, of `(B, N, H, D)`; the last one is what the others are beside."""
    tile, mask = Tile.whole(Grid(side, side)), pairs(side, window, device)

    def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighbourhood_attention(q, k, v, tile, (window, window)).to(v.dtype)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_form("flex"):
            return windows(q, k, v)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    found: dict[str, Form] = {"windows": windows}
    if device.type == "cuda":
        found[FLEX] = flex
    elif flex_too:
        found[FLEX] = masked_flex(side, window)
    return {**found, DENSE: dense}


def step_of(form: Form, tokens: tuple[Tensor, ...], train: bool) -> Callable[[], Any]:
    """A forward, or a forward and the gradients of all inputs."""

    def infer() -> None:
        with torch.inference_mode():
            form(*tokens)

    def gradients() -> None:
        leaves = [x.detach().requires_grad_() for x in tokens]
        torch.autograd.grad(form(*leaves).sum(), leaves)

    return gradients if train else infer


def rows(side: int, options: argparse.Namespace) -> list[str]:
    """The rows of a grid, one for each form but the last."""
    device, dtype = pick_device(options.device), getattr(torch, options.dtype)
    window = AxisWindow(options.kernel, options.dilation)
    shape = (options.batch, side * side, options.heads, options.width)
    tokens = tuple(torch.randn(3, *shape, device=device, dtype=dtype))
    ways = forms(side, window, device, options.flex)
    with torch.inference_mode():
        outs = {name: form(*tokens).float() for name, form in ways.items()}
    cells: dict[str, list[str]] = {name: [] for name in ways}
    for train in (False, True):
        timed = [name for name in ways if not train or name != FLEX or device.type == "cuda"]
        for name in cells.keys() - timed:
            cells[name].append("no gradients | -")
        sides = {i: Side() for i in range(len(timed))}

        def send(i: int, kind: str, told: Any, sides: dict[int, Side] = sides) -> None:
            if kind == "error":
                raise LinsightError(told)
            if kind == "facts":
                sides[i].facts |= told
            elif kind == "time":
                sides[i].times.append(told)

        def make(name: str, train: bool = train) -> tuple[dict[str, Any], Callable[[], Any]]:
            return {}, step_of(ways[name], tokens, train)

        alternate(dict(enumerate(timed)), make, send, device, options.seconds)
        *_, dense = sides.values()
        for name, found in zip(timed, sides.values(), strict=True):
            beside = statistics.median(ratios(found, dense))
            peaks = (found.facts.get("peak_mb"), dense.facts.get("peak_mb"))
            memory = " / ".join("-" if peak is None else f"{peak:,.0f}" for peak in peaks)
            cells[name].append(f"{1000 * statistics.median(found.times):.3g} ({beside:.2f}) | {memory}")
    largest = outs[DENSE].abs().max()
    return [
        f"| {side * side:,} | {name} | {' | '.join(own)} | {(outs[name] - outs[DENSE]).abs().max() / largest:.0e} |"
        for name, own in cells.items()
        if name != DENSE
    ]


def measure(options: argparse.Namespace) -> str:
    """The table, with what it was measured with."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    table = [row for side in map(int, options.sides.split(",")) for row in rows(side, options)]
    where = f"{options.device}, {options.threads} threads, {platform.machine()}, torch {torch.__version__}"
    return "\n".join(
        [
            f"Windows of {options.kernel} x {options.kernel}, dilation {options.dilation}; {options.batch} x "
            f"{options.heads} heads of {options.width}, {options.dtype}; {where}. `ms (ratio)`: to masked softmax in "
            f"the same rounds; MB: of the form / of masked softmax, whose mask of N^2 bytes is not counted.",
            "",
            "| tokens | form | forward, ms (ratio) | MB | training, ms (ratio) | MB | largest difference |",
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
            *table,
            "",
        ]
    )


def document(folder: Path, text: str) -> None:
    """Put the result into the page of `folder`."""
    path = folder / PAGE
    old = path.read_text(encoding="utf-8")
    if not BLOCK.search(old):
        raise LinsightError(f"'{path}' has no place for the table: '<!-- generated: neighbourhood -->'")
    write_text(path, BLOCK.sub(lambda found: f"{found[1]}{text}\n", old))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sides", default="16,32,64", help="of the grids, in tokens")
    add("--kernel", type=int, default=7)
    add("--dilation", type=int, default=1)
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=32, help="of a head")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", default="cpu")
    add("--flex", action="store_true", help="on a CPU, FlexAttention too")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, default=3.0, help="for the rounds of a grid, forward and training each")
    add("--docs", type=Path, help=f"the folder of {PAGE}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        text = measure(options)
        print(text)
        if options.docs:
            document(options.docs, text)

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
