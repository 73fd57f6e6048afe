"""The fused kernels on a GPU: their share of the copy bandwidth, beside softmax, and finite at a million tokens.

    python benchmarks/gpu.py --docs docs
    python benchmarks/gpu.py --only linear,inline --tokens 16384

One call, under ten minutes. All times are of CUDA graphs, medians of rounds that alternate between what is compared;
what an eager call takes beyond its graph is a column of its own. A forward reads q, k, v and writes the output; a
backward reads q, k, v and the gradient of the output, and writes three gradients: those bytes, over the time, are
compared with a large copy on the same GPU. The goals are for bf16 at B 2, H 16, D 64.
"""

import argparse
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from _script import exit_status
from torch import Tensor
from torch.nn import functional as F

import linsight
from linsight.bench import Side, Step, alternate, captured, measure_peaks, write_rows
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import (
    Features,
    Grid,
    Tile,
    Turn,
    affine_read,
    central_absorb,
    depthwise_conv,
    dynamic_depthwise_conv,
    focus,
    linear_absorb,
    linear_attention,
    linear_read,
    use_form,
)
from linsight.runtime.files import write_text

HEADS, WIDTH = 16, 64
FORWARD, BACKWARD = 4, 7  # tensors as large as q that each moves
MILLION = 2**20
BLOCK = re.compile(r"(<!-- generated: gpu -->\n).*?(?=<!-- end -->)", re.DOTALL)
# Tokens from which a share of the copy bandwidth is asked of forward and backward.
GOALS = ((16384, 0.80, 0.60), (4096, 0.55, 0.40))
Function = Callable[..., Tensor]


class Cell(NamedTuple):
    """step: "forward", "eager" (the same without a graph) or "backward". tokens: side * side of a square grid."""

    step: str
    batch: int
    tokens: int


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """elu + 1 and a normaliser."""
    return linear_attention(Features(q, "elu+1"), Features(k, "elu+1"), v)


def inline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Central moments and an affine read."""
    moments = central_absorb(k, v)
    return affine_read(q, moments.covariance(q.shape[-1] ** -0.5), moments.v, dtype=v.dtype)


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As MLLA: rotated above the line, plain below it."""
    side = round(q.shape[1] ** 0.5)
    turn = Turn.of(Tile.whole(Grid(side, q.shape[1] // side)), HEADS * WIDTH, device=q.device, dtype=torch.float32)
    state = linear_absorb(Features(k, "elu+1", turn=turn), v)
    return linear_read(Features(q, "elu+1", turn=turn), state, 1e-6, dtype=v.dtype)


def focused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The power map, whose norm is over all heads: it costs another read of q and k."""
    column = torch.ones(HEADS, WIDTH, device=q.device)
    return linear_attention(focus(q, column, 3.0), focus(k, column, 3.0), v)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own, on the layout that it likes best."""
    return F.scaled_dot_product_attention(q, k, v)


FUNCTIONS: dict[str, Function] = {
    "linear": linear, "inline": inline, "rotary": rotary, "focused": focused, "softmax": softmax
}  # fmt: skip


def inputs(name: str, cell: Cell, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """q, k and v: slices of one projection, as a layer has them; apart and head by head for softmax."""
    shape = (cell.batch, cell.tokens, HEADS, WIDTH)
    if name == "softmax":
        shape = (cell.batch, HEADS, cell.tokens, WIDTH)
        return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    qkv = torch.randn(*shape[:2], 3, *shape[2:], device="cuda", dtype=dtype) * scale
    return [t.requires_grad_() for t in qkv.unbind(2)]


def make(name: str, cell: Cell, dtype: torch.dtype) -> tuple[dict[str, Any], Step]:
    """No facts, and the step to time."""
    torch.manual_seed(0)
    function, leaves = FUNCTIONS[name], inputs(name, cell, dtype)

    def infer() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    if cell.step == "eager":
        return {}, infer

    def backward() -> Step:  # of one forward, again and again
        out = function(*leaves)
        slope = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)

    return {}, captured(backward if cell.step == "backward" else lambda: infer)


def compare(names: list[str], made: Callable[[str], tuple[dict[str, Any], Step]], seconds: float) -> dict[str, Side]:
    """The sides, timed by turns."""
    found = [Side() for _ in names]

    def send(side: int, kind: str, value: Any) -> None:
        if kind == "time":
            found[side].times.append(value)
        elif kind == "error":
            found[side].error = value

    alternate(dict(enumerate(names)), made, send, torch.device("cuda"), seconds)
    return dict(zip(names, found, strict=True))


def median(side: Side) -> float | None:
    times = sorted(side.times)
    return times[len(times) // 2] if times else None


def attention_rows(options: argparse.Namespace, copy: float) -> Iterator[dict[str, Any]]:
    """One for each mechanism and number of tokens. `copy`: bytes a second."""
    names = [*options.only, "softmax"]
    for tokens in options.tokens:
        cells = {step: Cell(step, options.batch, tokens) for step in ("forward", "backward", "eager")}
        found = {
            step: compare(names, functools.partial(make, cell=cell, dtype=options.dtype), options.seconds)
            for step, cell in cells.items()
        }
        one = options.batch * tokens * HEADS * WIDTH * torch.finfo(options.dtype).bits // 8
        beside = {step: median(sides["softmax"]) for step, sides in found.items()}
        for name in names:
            row: dict[str, Any] = {"operator": name, "tokens": tokens}
            for step, moved in (("forward", FORWARD), ("backward", BACKWARD)):
                took, softmax_took = median(found[step][name]), beside[step]
                row[f"{step}_error"] = found[step][name].error
                if took is not None:
                    row |= {f"{step}_ms": 1000 * took, f"{step}_share": moved * one / took / copy}
                    row |= {f"{step}_ratio": took / softmax_took} if softmax_took else {}
            eager, graph = median(found["eager"][name]), median(found["forward"][name])
            row["eager_ms"] = None if eager is None or graph is None else 1000 * (eager - graph)
            yield row


def conv_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Depthwise 3x3 convolutions on tokens: fused, beside the plain form."""

    def made(name: str, batch: int, side: int, channels: int) -> tuple[dict[str, Any], Step]:
        kind, form = name.split()
        qkv = torch.randn(batch, side * side, 3 * channels, device="cuda", dtype=options.dtype)
        x, size = qkv[..., 2 * channels :], (side, side)
        kernels = torch.randn(batch, channels, 3, 3, device="cuda", dtype=options.dtype)

        def act() -> Tensor:
            with torch.no_grad(), use_form(form):
                if kind == "static":
                    return depthwise_conv(x, size, kernels[0].unsqueeze(1))
                return dynamic_depthwise_conv(x, size, kernels)

        return {}, captured(lambda: act)

    for batch, side, channels in ((1, 14, 192), (32, 56, 96), (2, 256, 192)):
        for kind in ("static", "dynamic"):
            names = [f"{kind} triton", f"{kind} plain"]
            sides = compare(names, functools.partial(made, batch=batch, side=side, channels=channels), options.seconds)
            fused, plain = (median(side) for side in sides.values())
            yield {
                "operator": f"{kind} depthwise convolution",
                "tokens": side * side,
                "batch": batch,
                "channels": channels,
                "forward_ms": None if fused is None else 1000 * fused,
                "plain_ms": None if plain is None else 1000 * plain,
                "forward_error": "; ".join(side.error for side in sides.values() if side.error),
            }


def finite_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Outputs and gradients at a million tokens: activations of 1e3 where there is a normaliser or range enough."""
    for name in options.only:
        for dtype in (torch.float16, torch.bfloat16):
            bounded = name != "inline" or dtype == torch.bfloat16
            row: dict[str, Any] = {"operator": name, "tokens": MILLION, "dtype": str(dtype).removeprefix("torch.")}
            row["scale"] = 1e3 if bounded else 1.0
            try:
                leaves = inputs(name, Cell("finite", 1, MILLION), dtype, row["scale"])
                out = FUNCTIONS[name](*leaves)
                results = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) / MILLION)]
                row["finite"] = all(bool(t.isfinite().all()) for t in results)
            except (RuntimeError, LinsightError) as error:
                row["finite"], row["forward_error"] = False, str(error).splitlines()[0][:200]
            yield row


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Of each goal: met, or by which rows it was missed."""
    ours = [
        row for row in rows if row["operator"] in FUNCTIONS and row["operator"] != "softmax" and "finite" not in row
    ]
    found = []
    for i, (least, *shares) in enumerate(GOALS):
        most = GOALS[i - 1][0] if i else float("inf")
        for step, share in zip(("forward", "backward"), shares, strict=True):
            asked = [row for row in ours if least <= row["tokens"] < most]
            low = [row for row in asked if row.get(f"{step}_share", 0.0) < share]
            what = f"{step}: {share:.0%} of the copy bandwidth from {least:,} tokens"
            found.append(verdict(what, asked, [f"{row['operator']} at {row['tokens']:,}" for row in low]))
    asked = [row for row in ours if row["tokens"] >= 2048]
    slow = [f"{row['operator']} at {row['tokens']:,}" for row in asked if row.get("forward_ratio", 2.0) >= 1]
    found.append(verdict("forward: quicker than softmax from 2,048 tokens", asked, slow))
    asked = [row for row in rows if "finite" in row]
    bad = [f"{row['operator']} in {row['dtype']}" for row in asked if not row["finite"]]
    return [*found, verdict(f"finite at {MILLION:,} tokens", asked, bad)]


def verdict(what: str, asked: list[Any], missed: list[str]) -> str:
    if not asked:
        return f"{what}: not measured"
    return f"{what}: {'missed by ' + ', '.join(missed) if missed else 'met'}"


def shown(row: dict[str, Any], key: str, form: str) -> str:
    return "-" if row.get(key) is None else format(row[key], form)


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """What goes into the page."""
    parts = {"forward": "ms", "backward": "ms"}
    head = ["operator", "tokens", *(f"{step}, {unit}" for step, unit in parts.items())]
    head += [f"{step}, of a copy" for step in parts] + [f"{step} / softmax" for step in parts] + ["eager adds, ms"]
    lines = [head, ["---"] * len(head)]
    for row in (row for row in rows if "eager_ms" in row):
        errors = {step: row.get(f"{step}_error") for step in parts}
        line = [f"`{row['operator']}`", f"{row['tokens']:,}"]
        line += [errors[step] or shown(row, f"{step}_ms", ".3f") for step in parts]
        line += [shown(row, f"{step}_share", ".0%") for step in parts]
        line += [shown(row, f"{step}_ratio", ".2f") for step in parts]
        lines.append([*line, shown(row, "eager_ms", ".3f")])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = ["operator", "images", "tokens", "channels", "fused, ms", "plain, ms"]
    lines = [head, ["---"] * len(head)]
    for row in (row for row in rows if "plain_ms" in row):
        line = [row["operator"], str(row["batch"]), f"{row['tokens']:,}", str(row["channels"])]
        lines.append([*line, row["forward_error"] or shown(row, "forward_ms", ".3f"), shown(row, "plain_ms", ".3f")])
    convolutions = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    goals = "\n".join(f"- {line}" for line in verdicts(rows))
    return f"{', '.join(f'{key} {value}' for key, value in facts.items())}\n\n{text}\n\n{convolutions}\n\n{goals}\n"


def write_csv(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """The CSV file, whole at any moment."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_rows(path, rows, facts, [*columns, *facts])


def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise LinsightError("this measures CUDA graphs: it needs a CUDA GPU, and PyTorch sees none")
    for name in options.only:
        if name not in FUNCTIONS:
            raise UnknownNameError("operator", name, FUNCTIONS)
    page = options.docs / "how-fast.md" if options.docs else None
    if page is not None and not BLOCK.search(page.read_text(encoding="utf-8")):
        raise LinsightError(f"'{page}' has no part '<!-- generated: gpu -->' to write into")
    copy = measure_peaks(torch.device("cuda"), options.dtype)["peak_gb_per_sec"]
    facts = {"device": torch.cuda.get_device_name(), "copy": f"{copy:,.0f} GB/s", "precision": options.dtype}
    facts |= {"batch": options.batch, "heads": HEADS, "width": WIDTH}
    facts |= {"torch": torch.__version__, "timm": timm.__version__, "linsight": linsight.__version__}
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for source in (finite_rows(options), attention_rows(options, copy * 1e9), conv_rows(options)):
        for row in source:
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items() if value not in (None, "")), flush=True)
            write_csv(options.csv, rows, facts)
    text = markdown(rows, facts)
    print(text)
    if page is not None:
        command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        block = f"```bash\n{command}\n```\n\n{text}"
        write_text(page, BLOCK.sub(lambda found: found.group(1) + block, page.read_text(encoding="utf-8")))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [name for name in FUNCTIONS if name != "softmax"]
    add("--only", type=lambda text: text.split(","), default=",".join(names), help="operators beside softmax")
    add(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default="1024,2048,4096,16384,65536",
        help="of a square grid, if the operator is rotated",
    )
    add("--batch", type=int, default=2)
    add("--dtype", type=lambda text: getattr(torch, text), default="bfloat16", help="bfloat16, float16 or float32")
    add("--seconds", type=float, default=3.0, help="to spend on the rounds of a cell; there are three at least")
    add("--csv", type=Path, default=Path("gpu.csv"), help="file to write")
    add("--docs", type=Path, help="folder whose how-fast.md is to show the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    return exit_status(__file__, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
