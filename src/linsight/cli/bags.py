"""`linsight bags`: a bag model that learns from the bags of slides."""

import pathlib
from typing import Annotated, Any

import typer

from linsight.errors import LinsightError, UnknownNameError
from linsight.runtime.files import require_place
from linsight.runtime.places import located

from .asked import Device, Json, check, print_facts, tell
from .show import Command, print_json

_DATA = "bags of 'linsight slide --bag', in folders of classes, and these in train/ and val/, or alone"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(bags)


def bags(
    data: Annotated[str, typer.Argument(metavar="FOLDER", help=_DATA)],
    out: Annotated[str, typer.Option(metavar="FILE.safetensors", help="the weights of the best epoch")],
    kind: Annotated[str, typer.Option(metavar="gated|multihead", help="how a branch makes its scores")] = "gated",
    branches: Annotated[int, typer.Option(min=1, help="of attention; 1 and --masked 0: ABMIL")] = 5,
    heads: Annotated[int, typer.Option(min=1, help="of a multihead branch")] = 8,
    masked: Annotated[int, typer.Option(min=0, help="tiles of the largest scores to leave some out of")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the bags, one a step")] = 100,
    lr: Annotated[float, typer.Option(help="learning rate at the start")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="of AdamW")] = 1e-5,
    seed: Annotated[int, typer.Option(min=0, help="of weights, of the order of bags, and of what is left out")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a bag model, ACMIL or ABMIL, on bags of slides; each class is a folder.

    Without val/ a fifth of each class is held out to judge it by. The epoch with the best F1 and AUC is kept, and is in
    the file as soon as it is over.

    linsight bags bags/ --out acmil.safetensors && linsight slide runs/NAME slide.svs --bag-model acmil.safetensors
    """
    check({"device": device, "seed": seed})
    path = located(out)
    if pathlib.Path(out).suffix != ".safetensors":
        raise typer.BadParameter(f"--out {out}: the name must end with .safetensors")
    require_place(path)
    import torch

    from linsight.models.bags import Acmil
    from linsight.runtime.device import pick_device
    from linsight.slides import Learned, open_bags, train_bags

    train, val = open_bags(data)
    torch.manual_seed(seed)
    kinds: Any = {"kind": kind, "branches": branches, "num_heads": heads, "n_masked": masked}
    try:
        model = Acmil(train.width, len(train.classes), **kinds)
    except UnknownNameError:
        raise
    except LinsightError as error:  # of a number of heads: its way out is an argument of Python's
        raise LinsightError(f"{str(error).partition(':')[0]}: give another --heads") from error
    tell([f"{len(train)} bags of {train.label} to learn from, {len(val)} of {val.label} to be judged by"])
    options: dict[str, Any] = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    digits = len(str(epochs))

    def report(epoch: int, found: Any) -> None:
        line = f"F1 {found['f1']:.1f} %  AUC {found['auc']:.1f} %  accuracy {found['accuracy']:.1f} %"
        typer.echo(f"epoch {epoch:{digits}}/{epochs}  loss {found['train_loss']:.4f}  {line}", err=True)

    def improved(best: Learned) -> None:
        best.save(path)

    learned = train_bags(model, train, val, device=pick_device(device), report=report, improved=improved, **options)
    facts = {"epoch": learned.epoch, **learned.measures, "classes": list(learned.classes), "weights": out}
    if as_json:
        print_json(facts)
        return
    rows = [["epoch", f"{learned.epoch} of {epochs}"]]
    rows += [[label, f"{learned.measures[name]:.1f} %"] for name, label in (("f1", "F1"), ("auc", "AUC"))]
    rows += [["accuracy", f"{learned.measures['accuracy']:.1f} %"], ["weights", out]]
    print_facts(rows)
