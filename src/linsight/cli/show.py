"""`linsight list | info | doctor`: what there is, what it costs, and what runs here. Tables, or `--json`."""

import contextlib
import errno
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from linsight.errors import LinsightError
from linsight.runtime.console import new_console
from linsight.runtime.files import to_json
from linsight.runtime.signals import Interrupted, Unwinding, exit_code, undivided
from linsight.runtime.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Command(TyperCommand):
    """A command that imports linsight when it runs, not for its help, and ends in one line where a user can mend it."""

    def invoke(self, context: Any) -> Any:
        """Run it."""
        try:
            with Unwinding():
                load()
                return super().invoke(context)
        except KeyboardInterrupt as stopped:
            raise Interrupted("stopped", exit_code(stopped)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            name = f"'{error.filename}': " if error.filename else ""
            if not name and error.errno == errno.ENOSPC:
                name = "the output cannot be written: "  # files have names
            raise LinsightError(f"{name}{error.strerror or error}") from error


def load() -> None:
    """Import linsight, which takes seconds, beside a spinner on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting ...") if console.is_terminal else contextlib.nullcontext(), undivided():
        import linsight.api  # noqa: F401


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command("list", cls=Command)(list_)
    app.command(cls=Command)(info)
    app.command(cls=Command)(doctor)


def list_(
    mechanisms: Annotated[bool, typer.Option("--mechanisms", help="Mechanisms only.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Models only.")] = False,
    family: Annotated[str | None, typer.Option(help="Mechanisms of a family, as 'window', only.")] = None,
    can: Annotated[str, typer.Option(metavar="A,B", help="Mechanisms that can do all of 'keep,stream', say.")] = "",
    search: Annotated[str, typer.Option(help="Mechanisms with these words in names, family, year or paper.")] = "",
    as_json: Json = False,
) -> None:
    """List the attention mechanisms, with what each can do, and the models."""
    from linsight import catalogue

    asked = [name.strip() for name in can.split(",") if name.strip()]
    mechanisms = mechanisms or bool(family or asked or search)
    both = mechanisms == models
    found: dict[str, Any] = {}
    if mechanisms or both:
        found["mechanisms"] = catalogue.list_mechanisms(family, asked, search)
    if models or both:
        found["models"] = catalogue.list_models()
    if as_json:
        print_json(found)
        return
    tables = []
    if "mechanisms" in found:
        rows = [
            [row["name"], row["family"], str(row["year"] or ""), row["complexity"], _able(row), ", ".join(_closed(row))]
            for row in found["mechanisms"]
        ]
        shown = 6 if any(row[5] for row in rows) else 5
        columns = ["name", "family", "year", "complexity", "can do", "does not leave by"][:shown]
        tables.append(make_table("mechanisms", columns, [row[:shown] for row in rows]))
    if "models" in found:
        columns = ["name", "attention", "image", "published top-1 %"]
        for kind, title in (
            ("variant", "models"),
            ("host", "hosts, which take any mechanism"),
            ("architecture", "models that take none"),
        ):
            rows = [_model_row(row) for row in found["models"] if row["kind"] == kind]
            tables.append(make_table(title, columns, rows))
    terminal().print(*tables, sep="\n")


def info(
    name: Annotated[str, typer.Argument(help="A mechanism or a model, see 'linsight list'.")],
    attention: Annotated[str | None, typer.Option(help="Another mechanism in this model.")] = None,
    as_json: Json = False,
) -> None:
    """Show all about one mechanism or model: formula, paper, options, parameters, operations."""
    from linsight import catalogue

    found = catalogue.info(name, attention)
    if as_json:
        print_json(found)
        return
    lines, tables = _mechanism(found) if "formula" in found else _model(found)
    console = terminal()
    console.print(make_table("", ["", ""], [[key, value] for key, value in lines if value], header=False))
    for table in tables:
        console.print(table)


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, and which form of each operator runs here and why."""
    from linsight.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    cpu, triton, compiler = found["cpu"], found["triton"], found["compiler"]
    lines = [
        ("linsight", f"{found['linsight']} on Python {found['python']}, {found['platform']}"),
        *(("device", _device(row)) for row in found["devices"]),
        ("CPU", f"{cpu['vector']}, {cpu['threads']} threads on {cpu['cores']} cores"),
        ("bfloat16 on the CPU", f"native ({cpu['bf16']})" if cpu["bf16"] else "emulated: float32 is quicker"),
        ("Triton", ": ".join(filter(None, [triton["version"], triton["why"]]))),
        ("C++ compiler", compiler["path"] or compiler["why"]),
    ]
    packages = [[row["name"], row["version"] or row["get"], row["extra"]] for row in found["packages"]]
    rows = [[row["operator"], row["form"], row["reason"]] for row in found["forms"]]
    console = terminal()
    console.print(make_table("", ["", ""], [list(line) for line in lines], header=False))
    console.print(make_table("packages", ["name", "version", "extra"], packages))
    console.print(make_table(f"operators on {found['devices'][0]['type']}", ["operator", "form", "why"], rows))


def _mechanism(found: dict[str, Any]) -> tuple[list[tuple[str, str]], "list[Table]"]:
    paper = found["paper"]
    lines = [
        ("mechanism", f"{found['name']}: {found['summary']}"),
        ("also called", ", ".join(found["also"])),
        ("formula", found["formula"]),
        ("family", found["family"]),
        ("complexity", found["complexity"]),
        ("paper", ", ".join(filter(None, paper.values()))),
        ("can do", _able(found)),
        ("cannot do", _able(found, False)),
        *_ways(found),
    ]
    options = [
        [row["name"], str(row["default"]), ", ".join(map(str, row["choices"])), row["help"]] for row in found["options"]
    ]
    costs = [
        [row["grid"], str(row["dim"]), str(row["heads"]), f"{row['params']:,}", f"{row['macs'] / 1e6:,.1f}"]
        for row in found["cost"]
    ]
    tables = [
        make_table("options", ["name", "default", "choices", "meaning"], options),
        make_table("one layer", ["grid", "channels", "heads", "parameters", "million multiply-adds"], costs),
    ]
    return lines, [table for table in tables if table.row_count]


def _model(found: dict[str, Any]) -> tuple[list[tuple[str, str]], "list[Table]"]:
    from linsight.train import RECIPES

    recipe = RECIPES.get(found["name"]) if found["published"] else None  # none of another mechanism in this model
    lines = [
        ("model", found["name"]),
        ("host", found["host"] and found["host"] + ", takes any mechanism: --attention NAME"),
        ("attention", found["attention"]),
        ("image size", f"{found['image_size']}; any other works too"),
        ("parameters", f"{found['params']:,}"),
        ("multiply-adds", f"{found['gmacs']:.2f} G for one image"),
        ("to its exits", ", ".join(f"{cost:.3f} G" for cost in found.get("exit_gmacs", ()))),
        ("published", _figures(found)),
        ("paper", ", ".join(filter(None, found["paper"].values()))),
        ("weights", found["weights"]),
        ("code of its authors", found["code"] and f"https://github.com/{found['code']}"),
        ("recipe", recipe.about if recipe else ""),
        *_ways(found),
    ]
    return lines, []


def _model_row(row: dict[str, Any]) -> list[str]:
    # The space lets a narrow terminal break the line between stages.
    return [row["name"], row["attention"].replace(",", ", "), row["image_size"], _top1(row)]


def _figures(row: dict[str, Any]) -> str:
    known, top1 = row["published"], _top1(row)
    texts = [
        f"{top1} % top-1" + (" of averaged weights" if known.get("ema") else "") if top1 else "",
        f"{known['params'] / 1e6:.2f} M parameters" if "params" in known else "",
        f"{known['gmacs']:.2f} G multiply-adds" if "gmacs" in known else "",
    ]
    return ", ".join(filter(None, texts))


def _top1(row: dict[str, Any]) -> str:
    known = row["published"]
    about = "about " if known.get("plotted") else ""
    return f"{about}{known['top1']}" if "top1" in known else ""


def _device(row: dict[str, Any]) -> str:
    memory = f", {row['memory_gib']} GiB" if row["memory_gib"] else ""
    return f"{row['type']}: {row['name']}{memory}"


def _able(row: dict[str, Any], asked: bool = True) -> str:
    return ", ".join(name for name, can in row["capabilities"].items() if can == asked)


def _ways(found: dict[str, Any]) -> list[tuple[str, str]]:
    closed = _closed(found)
    open_ = ", ".join(name for name in found["ways"] if name not in closed)
    return [("leaves by", open_), *(("does not leave by", f"{name}: {found['ways'][name]}") for name in closed)]


def _closed(row: dict[str, Any]) -> list[str]:
    """The ways out that there are not."""
    return [name for name, answer in row["ways"].items() if answer != "yes"]


def make_table(title: str, columns: list[str], rows: list[list[str]], *, header: bool = True) -> "Table":
    """A table in which names stay whole."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE, show_header=header)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=header and i == 0)  # names stay whole
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: square brackets are no markup
    return table


def terminal() -> "Console":
    """The console: a terminal has its own width; a pipe gets one line a row, for grep."""
    seen = sys.stdout is not None and sys.stdout.isatty()
    return new_console() if seen else new_console(no_color=True, width=240)


def print_json(found: Any) -> None:
    """Print `found` as indented JSON."""
    print(to_json(found, indent=2))
