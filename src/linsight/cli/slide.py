"""`linsight slide`: a whole slide as a bag of tiles, its label, and a picture of the tiles that decide it."""

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from linsight.runtime.console import new_console
from linsight.runtime.files import require_place, to_json
from linsight.runtime.places import located

from .asked import Amp, Device, Fill, From, Json, check, print_facts, tell
from .show import Command
from .source import Source, load


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(slide)


def slide(
    source: Source,
    image: Annotated[str, typer.Argument(help="a slide, a TIFF or another image file")],
    bag_model: Annotated[
        str | None, typer.Option(metavar="FILE", help="weights of the bag model, ACMIL or ABMIL, for a label")
    ] = None,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="names of its classes; none: as its file tells")] = "",
    checkpoint: Annotated[str | None, typer.Option(help="published weights, for a backbone given by name")] = None,
    from_size: From = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="side of a tile in pixels; none: that of the backbone")
    ] = None,
    tissue: Annotated[float, typer.Option(min=0, max=1, help="least share of a tile that is tissue; 0: all")] = 0.05,
    level: Annotated[int | None, typer.Option(min=0, help="of the pyramid; none: 0, the full size")] = None,
    mpp: Annotated[float | None, typer.Option(help="or the level near so many microns a pixel")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="tiles that the backbone sees at a time")] = 64,
    device: Device = "auto",
    amp: Amp = "auto",
    fill: Fill = None,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="draw the attention over the slide; with --bag-model")
    ] = None,
    bag: Annotated[
        str | None, typer.Option(metavar="FILE.safetensors", help="write the features of the tiles, to train on")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a bag model sees in a whole slide, whose tiles go through the backbone RUN; or keep their features."""
    check({"device": device, "amp": amp})
    if bag_model is None and bag is None:
        raise typer.BadParameter("give --bag-model FILE for a label, or --bag FILE.safetensors to keep the features")
    for name, given in (("picture", picture), ("classes", classes)):
        if given and bag_model is None:
            raise typer.BadParameter(f"--{name} goes with --bag-model")
    if picture is not None and pathlib.Path(picture).suffix != ".png":
        raise typer.BadParameter(f"--picture '{picture}' is to be a PNG file: let its name end in .png")
    for file in (picture, bag):
        if file is not None:
            require_place(located(file))
    from linsight.data.images import statistics
    from linsight.runtime.device import autocast, pick_device, pick_dtype
    from linsight.slides import embed_slide, load_bag_model
    from linsight.tasks.building import image_size
    from linsight.train.progress import tile_reporter

    model = None if bag_model is None else load_bag_model(bag_model)
    names = _names(classes, () if model is None else model.classes, 0 if model is None else model.num_classes)
    trained = load(source, checkpoint, from_size, option="a slide")
    where = pick_device(device)
    mean, std = statistics(trained.recipe)
    notes, progress = list[str](), tile_reporter(new_console(stderr=True))
    with autocast(where, pick_dtype(amp, where)[0]), progress.of(image):
        found = embed_slide(
            trained.model.to(where).eval(),
            located(image),
            tile=tile,
            size=image_size(trained.recipe, trained.model),
            tissue=tissue,
            batch_size=batch_size,
            level=level,
            mpp=mpp,
            fill=trained.recipe.fill if fill is None else fill,
            mean=mean,
            std=std,
            report=progress.tile,
            note=notes.append,
        )
    tell(notes)
    if bag is not None:
        found.save(located(bag))
    facts: dict[str, Any] = {"file": image, "tiles": len(found.places), "of": found.grid[0] * found.grid[1]}
    facts |= {} if bag is None else {"bag": bag}
    _tell(facts | ({} if model is None else _seen(model, found, names, picture)), as_json)


def _names(classes: str, told: Sequence[str], count: int) -> list[str]:
    """The names of the classes: the given ones, or those that the bag model was trained for, or their numbers."""
    names = [name.strip() for name in classes.split(",")] if classes else list(told) or list(map(str, range(count)))
    if len(names) != count:
        raise typer.BadParameter(f"--classes has {len(names)} names, and the bag model {count} classes")
    return names


def _seen(model: Any, bag: Any, names: list[str], picture: str | None) -> dict[str, Any]:
    """The answer of a bag model, and the tile that counts most; drawn into a file, too."""
    from linsight.runtime.files import replacing, writing
    from linsight.slides import attention_picture, see_slide

    seen = see_slide(model, bag)
    if picture is not None:
        path = located(picture)
        with writing(path), replacing(path) as temporary:
            attention_picture(bag, seen.weights).save(temporary, "png")
    best, most = int(seen.probabilities.argmax()), int(seen.weights.argmax())
    return {
        "class": names[best],
        "probabilities": dict(zip(names, seen.probabilities.tolist(), strict=True)),
        "most": {
            "top": int(bag.places[most, 0]) * bag.tile,
            "left": int(bag.places[most, 1]) * bag.tile,
            "share": float(seen.weights[most]),
        },
        **({} if picture is None else {"picture": picture}),
    }


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(facts))
        return
    rows = [["slide", facts["file"]], ["tiles", f"{facts['tiles']} with tissue, of {facts['of']}"]]
    if "class" in facts:
        rows.append(["class", facts["class"]])
        rows += [[f"  {name}", f"{100 * value:.1f} %"] for name, value in facts["probabilities"].items()]
        most = facts["most"]
        rows.append(["most", f"{100 * most['share']:.1f} % by the tile at row {most['top']}, column {most['left']}"])
    rows += [[name, facts[name]] for name in ("bag", "picture") if name in facts]
    print_facts(rows)
