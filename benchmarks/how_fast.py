"""All numbers of docs/how-fast.md, in one call: mechanisms and models beside softmax on this machine.

    python benchmarks/how_fast.py --docs docs
    python benchmarks/how_fast.py --device cuda --parts operators,deit --docs docs

Four parts. Operators: all mechanisms with a core, beside PyTorch's softmax attention, from 14x14 to 112x112 tokens, in
time and in memory, and where each becomes faster than softmax. Whole: those that are whole layers or blocks, in DeiT-T
beside timm's, forward; those that know no prefix tokens without its class token.
Pyramids: linear Swin-T and MLLA-T, plain and fused, beside timm's Swin-T. DeiT: InLine-DeiT-T, plain and fused,
beside timm's DeiT-T from 224 to 1344 pixels, in float32 and bf16, and beside its own floor: the same model in which the
values go straight from the projection to the output projection, with no mixing, no generator and no dynamic
convolution. `--parts` takes some of them; each has its own place in how-fast.md, and the others keep what they have.
"""

import argparse
import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _script import exit_status
from torch import Tensor, nn

import linsight.bench as room
from linsight.attention import Attention, Capabilities, Core, Tokens, list_attentions, mechanism
from linsight.bench import STEPS, Done, Group, Plan, Setting, Subject
from linsight.bench.rows import digits
from linsight.errors import LinsightError, UnknownNameError
from linsight.fuse import fuse
from linsight.models import create_model
from linsight.ops import Layout
from linsight.runtime.files import write_text

FLOOR = Subject("model", "inline_deit_tiny", "floor")
FUSED = Subject("model", "inline_deit_tiny", "fused")
INLINE, SOFTMAX = Subject("model", "inline_deit_tiny"), Subject("model", "deit_tiny_patch16_224")
PYRAMIDS = ("inline_swin_tiny", "focused_swin_tiny", "agent_swin_tiny", "mlla_tiny")


class Floor(Core):
    """The values themselves."""

    capabilities = Capabilities(prefix=True)

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, tokens: Tokens, layout: Layout, **_: Any) -> Tensor:
        return tokens.v


def build(subject: Subject, size: tuple[int, int], device: str | torch.device) -> nn.Module:
    """As `linsight bench` does, and besides fused models, the floor, and DeiT-T without a class token."""
    if subject.name == SOFTMAX.name and subject.attention and not mechanism(subject.attention).capabilities.prefix:
        with torch.device(device):
            without = {"class_token": False, "global_pool": "avg"}
            return create_model(subject.name, attention=subject.attention, img_size=size, **without)
    if subject.attention not in ("fused", "floor"):
        return room.build(subject, size, device)
    model = room.build(subject._replace(attention=""), size, device)
    if subject.attention == "fused":
        return fuse(model, inplace=True)
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = Floor(module.num_heads)
    return model


def plans(options: argparse.Namespace) -> dict[str, list[Plan]]:
    """What each part measures."""

    def plan(group: Group, sizes: Any, steps: tuple[str, ...], amp: str = "off", compiled: bool = False) -> Plan:
        setting = Setting(options.device, amp, options.threads, options.seconds, compiled=compiled)
        return Plan((group,), tuple(sizes), setting, steps, options.limit)

    kinds = {entry.name: entry.kind for entry in list_attentions()}
    cores = tuple(Subject("operator", name) for name, kind in kinds.items() if kind == "core" and name != "softmax")
    operators = Group(cores, Subject("operator", "softmax"))
    host = SOFTMAX.name
    whole = Group(tuple(Subject("model", host, name) for name, kind in kinds.items() if kind != "core"), SOFTMAX)
    swin = Subject("model", "swin_tiny_patch4_window7_224")
    plain, fused = (tuple(Subject("model", name, form) for name in PYRAMIDS) for form in ("", "fused"))
    deit = Group((INLINE, FUSED, FLOOR), SOFTMAX)
    both = tuple(STEPS)
    images = [(side, side, 1) for side in (224, 448, 896, 1344)]
    return {
        "operators": [plan(operators, [(side, side, 1) for side in (14, 28, 56, 112)], both)],
        "whole": [plan(whole, images, ("infer",))],
        "pyramids": [
            plan(Group((*plain, *fused), swin), [(224, 224, 4)], ("infer",)),
            plan(Group(plain, swin), [(224, 224, 4)], ("train",)),
        ],
        "deit": [
            *(plan(deit, images, ("infer",), amp) for amp in ("off", "bf16")),
            plan(deit, [images[0], images[-1]], ("infer",), compiled=True),
        ],
    }


def markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def by_size(rows: list[dict[str, Any]], step: str) -> str:
    """One line for each mechanism: milliseconds and the time ratio to softmax, by tokens."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["model"], row["tokens"]): row for row in rows}
    body = []
    for name in names:
        ratio = {n: found[name, n][f"{step}_ratio"] for n in sizes if found[name, n].get(f"{step}_ratio")}
        passes = room.pays_from(ratio)
        line = [f"`{name}`"]
        for n in sizes:
            row = found[name, n]
            shown = digits(row[f"{step}_step_time"]) if f"{step}_step_time" in row else row[f"{step}_error"]
            line.append(f"{shown} ({ratio[n]:.2f})" if n in ratio else shown)
        never = "-" if name == "softmax" else "not up to here"
        body.append([*line, never if passes is None else f"{passes:,.0f} tokens" if passes else "always"])
    return markdown([f"{STEPS[step]}, ms (ratio)", *(f"{n:,} tokens" for n in sizes), "faster from"], body)


def memory(rows: list[dict[str, Any]], step: str) -> str:
    """One line for each mechanism: the most megabytes that a step takes, by tokens."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["model"], row["tokens"]): row.get(f"{step}_peak_mb") for row in rows}
    body = [[f"`{name}`", *(_megabytes(found[name, size]) for size in sizes)] for name in names]
    return markdown([f"{STEPS[step]}, MB", *(f"{size:,} tokens" for size in sizes)], body)


def _megabytes(value: float | None) -> str:
    return "-" if value is None else digits(value)


def beside_floor(done: Done) -> Iterator[list[str]]:
    """One size: the model and its fused form beside the floor, and softmax beside the fused form."""
    plain, fused, floor, softmax = (done.sides[subject] for subject in (INLINE, FUSED, FLOOR, SOFTMAX))
    found = [room.ratios(plain, floor), room.ratios(fused, floor), room.ratios(softmax, fused)]
    shown = [room.spread(values, ".2f") if values else "-" for values in found]
    memory = [side.facts.get("peak_mb") for side in (fused, softmax)]
    megabytes = ["-" if value is None else f"{value:.0f}" for value in memory]
    yield [str(done.cell.height), precision(done), *shown, *megabytes]


def precision(done: Done) -> str:
    return f"{done.facts['precision']}, compiled" if done.facts.get("compiled") else done.facts["precision"]


TITLES = {
    "operators": "Operators, {dim} channels in {heads} heads, batch 1",
    "whole": "Whole layers and blocks, in DeiT-T",
    "pyramids": "Pyramids",
    "deit": "InLine-DeiT-T, its floor, and DeiT-T",
}


def run(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Measure all parts, tell of them as they come, and give the name of each and what the page says of it."""
    rows: list[dict[str, Any]] = []
    for name in options.parts:  # its page is written as soon as a part is done
        text: list[str] = []
        facts: dict[str, Any] = {}
        floors: list[list[str]] = []
        for plan in plans(options)[name]:
            done = None
            for done in room.bench(plan, functools.partial(room.measure, build=build)):
                tell(done)
                if name == "deit":
                    floors += beside_floor(done)
                room.write_rows(options.csv, [*rows, *({**row, **done.facts} for row in done.rows)], {})
            assert done is not None
            facts = facts or done.facts
            rows += [{**row, **done.facts} for row in done.rows]
            text.append(f"### {TITLES[name].format(**vars(plan.setting))}, {precision(done)}")
            text += operator_tables(done.rows) if name == "operators" else [model_table(done.rows)]
            if options.docs and len(plan.sizes) > 2:
                picture = f"how-fast-{name}-{plan.setting.amp}.png".replace("-off", "")
                room.write_plot(options.docs / picture, done.rows, f"{facts['device']}, {done.facts['precision']}")
                text.append(f"![{name}]({picture})")
        if floors:
            names = [
                "pixels",
                "precision",
                "plain / floor",
                "fused / floor",
                "softmax / fused",
                "MB, fused",
                "MB, softmax",
            ]
            text += ["### InLine-DeiT-T beside its floor, and beside softmax", markdown(names, floors)]
        known = {key: value for key, value in facts.items() if value not in (None, False) and key != "precision"}
        told = ", ".join(f"{key} {value}" for key, value in known.items())
        command = shlex.join(["python", "benchmarks/how_fast.py", *options.arguments])
        yield name, "\n\n".join([f"```bash\n{command}\n```", told, *text]) + "\n"


def tell(done: Done) -> None:
    """What a cell found, at once: a run takes long."""
    for subject, side in done.sides.items():
        times = room.spread([1000 * t for t in side.times]) if side.times else side.error
        print(f"{subject.label}, {done.cell.height}, {done.cell.step}: {times}", flush=True)


def operator_tables(rows: list[dict[str, Any]]) -> list[str]:
    return [by_size(rows, step) for step in STEPS] + [memory(rows, step) for step in STEPS]


def model_table(rows: list[dict[str, Any]]) -> str:
    head, body = room.table(rows)
    return markdown(head, [[f"`{line[0]}`", *line[1:]] for line in body])


def block(part: str) -> re.Pattern[str]:
    """The place of a part in how-fast.md."""
    return re.compile(rf"(<!-- generated: how fast, {part} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def document(path: Path, part: str, text: str) -> None:
    """Put what the page says of a part into its place."""
    write_text(path, block(part).sub(lambda found: f"{found[1]}{text}\n", path.read_text(encoding="utf-8")))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default="operators,whole,pyramids,deit", help="which of them, all")
    add("--device", default="cpu", help="cpu, cuda ...")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--seconds", type=float, default=8.0, help="to spend on the rounds of a cell; there are three at least")
    add("--limit", type=float, default=200.0, help="seconds for the first steps of something, or a later one")
    shipped = "linsight ships its rows of operators as bench/operators.csv"
    add("--csv", type=Path, default=Path("how_fast.csv"), help=f"file to write; {shipped}")
    add("--docs", type=Path, help="the folder of how-fast.md, to write the result into")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    options.parts = options.parts.split(",")
    for part in options.parts:
        if part not in plans(options):
            raise UnknownNameError("part", part, plans(options))
    options.page = options.docs and options.docs / "how-fast.md"
    if options.page:
        page = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
        for part in options.parts:
            if not block(part).search(page):
                line = f"<!-- generated: how fast, {part} -->"
                raise LinsightError(f"'{options.page}' is not there, or has no line '{line}' to write below")
    return options


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        for part, text in run(options):
            print(text)
            if options.page:
                document(options.page, part, text)

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
