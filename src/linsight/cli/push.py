"""`linsight push`: a trained run to the Hugging Face Hub, in timm's layout, with a model card."""

import sys
from typing import Annotated

import typer

from .show import Command


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(push)


def push(
    source: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its best.safetensors")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="the repository, made where it is not there")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="who may see a repository that is made; neither: as the Hub has it, which is all, but in "
            "organisations that decided otherwise",
        ),
    ] = None,
    message: Annotated[str, typer.Option(help="of the commit")] = "",
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="made where it is not there; none: main")
    ] = None,
    licence: Annotated[
        str,
        typer.Option("--licence", "--license", metavar="ID", help="of the weights, as apache-2.0; none: not stated"),
    ] = "",
    card: Annotated[bool, typer.Option("--card", help="replace a model card that is there")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write into --out what would be pushed, no more")] = False,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="goes with --dry-run")] = None,
) -> None:
    """Push a trained run to the Hugging Face Hub: timm, transformers and linsight.from_pretrained load it from there.

    One commit has the weights, config.json and a model card. The token is that of 'hf auth login', or HF_TOKEN.
    """
    if dry_run != (out is not None):
        raise typer.BadParameter("--dry-run and --out FOLDER go together")
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from linsight.export import push_to_hub, save_for_hub

    if not sys.stderr.isatty():
        disable_progress_bars()
    if out is not None:
        typer.echo(str(save_for_hub(source, out, name=name, licence=licence)))
        return
    done = push_to_hub(source, name, private=private, message=message, revision=revision, licence=licence, card=card)
    typer.echo(done)
