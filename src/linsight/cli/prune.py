"""`linsight prune`: a trained model with the least of its weights set to zero."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linsight.errors import LinsightError

from .asked import From
from .show import Command, Json, make_table, print_json, terminal

if TYPE_CHECKING:
    from linsight.train import Trained


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(prune)


def prune(
    source: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, its best.safetensors, or a model's name")],
    ratio: Annotated[float, typer.Option(help="the share of weights that become 0, from 0 to below 1")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="weights, which linsight loads as a run: FILE.safetensors")],
    modules: Annotated[
        str,
        typer.Option(
            metavar="KIND,KIND",
            help="of qkv, proj, mlp, and aux: the patch embedding and merging; each is ranked for itself",
        ),
    ] = "qkv,proj,mlp",
    checkpoint: Annotated[str | None, typer.Option(help="published weights, for a model given by name")] = None,
    from_size: From = None,
    as_json: Json = False,
) -> None:
    """Prune a trained model by its weights alone, without data (DiMaP).

    The zeros are in the file; tensors keep their shapes. Train it on with 'linsight train --init FILE', or from Python
    with linsight.convert.prune, whose masks keep the zeros.

    linsight prune runs/NAME --ratio 0.5 --out pruned.safetensors
    """
    from linsight.runtime.files import require_place

    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"--out {out}: the name must end with .safetensors")
    if not 0 <= ratio < 1:
        raise typer.BadParameter(f"--ratio {ratio} must be from 0 to below 1")
    require_place(out)
    trained = _load(source, checkpoint, from_size)
    if out.exists() and trained.path.exists() and out.samefile(trained.path):
        raise LinsightError(f"'{out}' is what is pruned: give another name")
    from linsight.convert.prune import make_permanent
    from linsight.convert.prune import prune as dimap
    from linsight.tasks.building import image_size
    from linsight.train.model import save

    size = (
        (trained.recipe.in_chans, *image_size(trained.recipe, trained.model))
        if trained.task.exported != "detect"
        else None
    )
    kinds = [name.strip() for name in modules.split(",") if name.strip()]
    report = dimap(trained.model, ratio, modules=kinds, input_size=size)
    make_permanent(trained.model)
    facts = {**trained.task.facts, "run": trained.run, "titles": trained.titles}
    save(out, trained.model.state_dict(), trained.recipe, facts)
    if as_json:
        kinds_told = [{**vars(row), "sparsity": row.sparsity} for row in report.kinds]
        print_json({"file": str(out), "kinds": kinds_told, "macs": report.macs, "macs_left": report.macs_left})
        return
    rows = [
        [row.kind, str(row.layers), f"{row.weights:,}", f"{row.zeros:,}", f"{row.sparsity:.1%}"] for row in report.kinds
    ]
    columns = ["kind", "layers", "weights", "zeros", "sparsity"]
    left = "" if report.macs_left is None else f", {report.macs_left:.1%} of its multiply-adds left"
    terminal().print(make_table(f"{out}{left}", columns, rows))


def _load(source: str, checkpoint: str | None, from_size: str | None) -> "Trained":
    from linsight.export.trained import is_exported
    from linsight.train.model import load_source

    if is_exported(source):
        raise LinsightError(f"'{source}' is an exported file: prune the run or the model that it was made of")
    return load_source(source, checkpoint, from_size)
