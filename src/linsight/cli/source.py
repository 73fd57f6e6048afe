"""The model that a command is given: a run, a name with published weights, or an exported file."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from linsight.train import Trained

Source = Annotated[
    str, typer.Argument(metavar="RUN", help="a run folder, its best.safetensors, an exported file, or a model's name")
]


def load(
    source: str,
    checkpoint: str | None,
    from_size: str | None,
    settings: dict[str, Any] | None = None,
    *,
    option: str = "",
) -> "Trained":
    """The model, with what it takes to use it.

    settings: of the command; an exported file runs on the CPU and in its own precision, which is entered there.
    option: one that exported files do not go with.
    """
    from linsight.export import load_exported
    from linsight.export.trained import is_exported
    from linsight.train.model import load_source

    if not is_exported(source):
        return load_source(source, checkpoint, from_size)
    if option:
        raise typer.BadParameter(f"{option} does not go with an exported file: give the run that it was made of")
    if checkpoint is not None or from_size is not None:
        raise typer.BadParameter(f"--{'checkpoint' if checkpoint else 'from-size'} does not go with an exported file")
    settings = {} if settings is None else settings
    for name, own in (("device", "cpu"), ("amp", "off")):
        if settings.get(name, own) not in ("auto", own):
            raise typer.BadParameter(
                f"--{name} {settings[name]}: exported files run on the CPU, in their own precision"
            )
        settings[name] = own
    return load_exported(source)
