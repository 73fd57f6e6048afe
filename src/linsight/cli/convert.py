"""The command linearize."""

from typing import Annotated, Any

import typer

from linsight.errors import LinsightError
from linsight.records import Record
from linsight.runtime.launch import this_copy
from linsight.runtime.places import located
from linsight.tasks import field_of

from .asked import Amp, Device, tell
from .show import Command
from .train import run

_TO = "the mechanism; 'linsight list --mechanisms' has all"
_KEEP = "layers that stay softmax: those that are hardest to replace, by a few batches of the data"
_SET = "any other field of the recipe, as --set weight_decay=0 (may be given again); linsight recipe finetune has them"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("linearize", cls=Command)(linearize)


def _about(name: str) -> str:
    kind: type[Record] = field_of(name)
    return kind.help(name)


def linearize(
    source: Annotated[str, typer.Argument(help="the trained softmax model: a run, or timm/NAME")],
    to: Annotated[str, typer.Option(help=_TO)],
    data: Annotated[str | None, typer.Option(help="images to learn from; none: those of the run")] = None,
    out: Annotated[str | None, typer.Option(help="the run folder; none: runs/linearize-DATE-TIME")] = None,
    layers: Annotated[str, typer.Option(help=_about("layers"))] = "",
    keep: Annotated[int, typer.Option(help=_KEEP, min=0)] = 0,
    transfer_steps: Annotated[int | None, typer.Option(help=_about("transfer_steps"))] = None,
    epochs: Annotated[int | None, typer.Option(help=_about("epochs"))] = None,
    lr: Annotated[str | None, typer.Option(help=_about("lr"))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_about("batch_size"))] = None,
    device: Device = "auto",
    amp: Amp = "auto",
    more: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help=_SET)] = None,
) -> None:
    """Replace the softmax attention of a trained model by a linear mechanism, and win its accuracy back.

    First each new layer learns what the old one gave, then the whole model learns from the labels and from the old one.
    What comes is a run like any other: linsight eval, predict, export, train --resume.
    """
    from linsight.train.softmax import is_timm

    if (
        not is_timm(source)
        and "://" not in source
        and not source.startswith("hf-hub:")
        and not located(source).exists()
    ):
        raise LinsightError(f"there is no '{source}': give the folder of a run, or timm/NAME")
    given: dict[str, Any] = {"task": "linearize", "teacher": source, "attention": to, "layers": layers}
    given |= {"data": data, "transfer_steps": transfer_steps, "epochs": epochs, "lr": lr, "batch_size": batch_size}
    given |= {"device": device, "amp": amp}
    for entry in more or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {entry}: write FIELD=VALUE")
        given[name.strip().replace("-", "_")] = value
    overrides = {key: field_of(key).parse(key, value) for key, value in given.items() if value is not None}
    if keep:
        if this_copy().world > 1:
            raise LinsightError("--keep measures layers in one process: run it alone first, and give several --layers")
        from linsight.train import resolve
        from linsight.train.kept_layers import split_layers

        replaced, kept = split_layers(resolve("finetune", overrides), keep)
        overrides["layers"] = " ".join(replaced)
        tell([f"softmax stays in {', '.join(kept)}"])
    run("finetune", overrides, out=out, title="linearize")
