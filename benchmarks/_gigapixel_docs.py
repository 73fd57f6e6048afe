"""What `gigapixel.py` found, as text and tables, as a picture, and as a page of the documentation."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linsight.errors import LinsightError
from linsight.runtime.figures import new_figure, require_matplotlib, save_figure
from linsight.runtime.files import write_text

Row = dict[str, Any]
BLOCK = re.compile(r"(<!-- generated: gigapixel -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEADER = (
    "pixels a side",
    "tokens",
    "CPU s",
    "CPU s a megapixel",
    "by the clock",
    "MB of memory",
    "GB of files",
)
FIRST_STRIDE = {"inline_pvt_tiny": 4}  # pixels of a token's side where there are most of them; else 16
HEADS = 3  # of DeiT-T, each with N x N scores


def lines_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each model and way to run it, by size; what is streamed first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["way"] != "streamed", row["side"])):
        found.setdefault((row["model"], row["way"]), []).append(row)
    return found


def ended(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row["error"]]


def table(rows: Sequence[Row]) -> str:
    """One line for each size."""
    body = [HEADER, ("---:",) * len(HEADER)]
    for row in rows:
        tokens = (row["side"] // FIRST_STRIDE.get(row["model"], 16)) ** 2
        if row["error"]:
            body.append((f"{row['side']:,}", f"{tokens:,}", row["error"], *("",) * 4))
            continue
        rate = f"{row['cpu_s'] / megapixels(row):.2f}"
        files = f"{row['scratch_gb']:.1f}" if row["scratch_gb"] >= 0.05 else "-"
        times = (f"{row['cpu_s']:,.1f}", rate, duration(row["wall_s"]))
        body.append((f"{row['side']:,}", f"{tokens:,}", *times, f"{row['anon_mb']:,.0f}", files))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def megapixels(row: Row) -> float:
    return row["side"] ** 2 / 1e6


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What the tables say, of each line of rows."""
    lines = lines_of(rows)
    sides = {row["side"] for row in rows if row["way"] == "streamed"}
    largest = max(row["side"] for row in rows)
    for (model, way), line in lines.items():
        done, stop = ended(line), next((row for row in line if row["error"]), None)
        text = f"`{model}`, {way}: "
        if way == "streamed" and len(done) > 1:
            first, last = done[0], done[-1]
            grown, pixels = (last[key] / first[key] for key in ("cpu_s", "side"))
            text += (
                f"from {first['side']:,} to {last['side']:,} pixels a side, {pixels**2:.0f} times the pixels, "
                f"{grown:.1f} times the CPU seconds (a power of {math.log(grown, pixels) / 2:.2f}); "
                f"memory {first['anon_mb']:,.0f} and {last['anon_mb']:,.0f} MB, of which {last['start_mb']:,.0f} are "
                f"Python, PyTorch and the weights."
            )
        elif stop is not None and not stop["error"].startswith("not run"):
            text += f"stops at {stop['side']:,} pixels a side: {stop['error']}."
        elif done:
            text += f"measured up to {done[-1]['side']:,} pixels a side."
        if way == "all scores in memory":
            scores = HEADS * 4 * ((largest / 16) ** 2 + 1) ** 2
            text += f" The scores of one layer at {largest:,} would be {scores / 1e12:,.0f} TB."
        elif way == "scaled_dot_product_attention" and done:
            guess = done[-1]["cpu_s"] * (largest / done[-1]["side"]) ** 4
            text += f" At {largest:,}, by the square of the tokens, it would take {duration(guess)} of CPU time."
        if way == "streamed" and (missing := sides - {row["side"] for row in line}):
            text += f" Not measured yet: {', '.join(f'{side:,}' for side in sorted(missing))}."
        beside = lines.get((model, "dense"), [])
        if way == "streamed" and (both := differences(line, beside)):
            side, difference = both[-1]
            text += f" Logits differ from those of the dense form by {difference:.1e} of the largest logit at {side:,}"
            dense = next(row for row in beside if row["side"] == side)
            own = next(row for row in line if row["side"] == side)
            text += f", and the CPU seconds are {own['cpu_s'] / dense['cpu_s']:.2f} times its."
        yield text


def differences(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[int, float]]:
    """Of each size that both did: the largest difference of the logits that were kept, by the largest of them."""
    kept = {row["side"]: [float(value) for value in row["logits"].split()] for row in ended(others)}
    found = []
    for row in ended(rows):
        if row["side"] in kept:
            ours, theirs = [float(value) for value in row["logits"].split()], kept[row["side"]]
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            found.append((row["side"], worst / max(map(abs, theirs))))
    return found


def duration(seconds: float) -> str:
    """In the largest unit that leaves a number of two digits or so."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Time of what is streamed on linear axes; all times, and memory, by the side of the image."""
    require_matplotlib(f"drawing {path.name}")
    from matplotlib.ticker import NullLocator

    lines = {key: ended(line) for key, line in lines_of(rows).items() if ended(line)}
    figure = new_figure(15, 5.2)
    growth, times, memory = figure.subplots(1, 3)
    colours = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(model for model, _ in lines))}
    marks = dict(zip(dict.fromkeys(way for _, way in lines), "osxv", strict=False))
    for (model, way), line in lines.items():
        sides = [row["side"] for row in line]
        style = {"color": colours[model], "marker": marks[way], "label": f"{model}, {way}"}
        style["linestyle"] = "-" if way == "streamed" else "--"
        times.plot(sides, [row["cpu_s"] for row in line], **style)
        memory.plot(sides, [row["anon_mb"] / 1e3 for row in line], **style)
        if way == "streamed":
            growth.plot([megapixels(row) for row in line], [row["cpu_s"] / 60 for row in line], **style)
            last = line[-1]
            growth.plot([0, megapixels(last)], [0, last["cpu_s"] / 60], ":", color="grey", linewidth=1)
    limit = float(rows[0]["limit_gb"])
    memory.axhline(limit, color="tab:red", linewidth=1)
    place = (min(row["side"] for row in rows), limit)
    memory.annotate(f"limit, {limit:g} GB", place, (0, -12), textcoords="offset points")
    growth.set(xlabel="megapixels (dotted: in proportion)", ylabel="CPU minutes", title="Time, streamed")
    times.set(xscale="log", yscale="log", ylabel="CPU seconds", title="Time")
    memory.set(xscale="log", ylabel="GB", ylim=(0, 1.05 * limit), title="Anonymous memory, at most")
    for axes in (times, memory):
        shown = sorted({row["side"] for row in rows})
        axes.set_xticks(shown, [f"{side:,}" for side in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("pixels a side")
    for axes in (growth, times, memory):
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def page_of(folder: Path) -> Path:
    """The page to write into; raises a LinsightError where it has no place for the result."""
    path = folder / "gigapixel.md"
    if not path.exists() or not BLOCK.search(path.read_text(encoding="utf-8")):
        raise LinsightError(f"'{path}' is not there, or has no line '<!-- generated: gigapixel -->' to write below")
    return path


def text_of(rows: Sequence[Row], facts: Sequence[str]) -> str:
    """All in Markdown."""
    told = ", ".join(f"{key} {rows[-1][key]}" for key in facts)
    told += f"; limit {float(rows[-1]['limit_gb']):g} GB"
    parts = [told, "\n".join(f"- {sentence}" for sentence in sentences(rows)), "![gigapixel](gigapixel.png)"]
    for (model, way), line in lines_of(rows).items():
        how = f", tiles of {line[0]['tile']} pixels, maps in {line[0]['maps']}" if line[0]["maps"] else ""
        parts += [f"### {model}, {way}{how}", table(line)]
    return "\n\n".join(parts)


def write(folder: Path, rows: Sequence[Row], facts: Sequence[str]) -> None:
    """The generated part of `gigapixel.md` in a folder, and `gigapixel.png` beside it."""
    path = page_of(folder)
    picture(folder / "gigapixel.png", rows)
    text = text_of(rows, facts)
    write_text(path, BLOCK.sub(lambda found: f"{found[1]}{text}\n", path.read_text(encoding="utf-8")))
