"""Objects drawn into the images that they are in, by torchvision."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from linsight.data.dense import collate
from linsight.data.images import Batch
from linsight.data.objects import unpacked_masks
from linsight.data.pictures import decode
from linsight.errors import LinsightError
from linsight.runtime.figures import drawing, new_figure, save_figure
from linsight.runtime.files import replacing, write_json, writing

from ._masks_drawn import palette

_ROWS = 6
RESULT = "detections.json"


def drawn(
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int],
    texts: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    masks: Sequence[Mapping[str, Any]] = (),
) -> Tensor:
    """An image `(C, H, W)` of uint8 with boxes `(N, 4)`, their texts, and masks as run lengths."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if not len(boxes):
        return image
    own = [colours[label] for label in labels]
    if masks:
        image = draw_segmentation_masks(image, unpacked_masks(masks).bool(), alpha=0.4, colors=own)
    boxes = boxes.clone()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    side = max(image.shape[-2:])
    font = _font()
    look: dict[str, Any] = {} if font is None else {"font": font, "font_size": max(10, round(side / 36))}
    look |= {"label_colors": "white", "label_background_colors": own, "fill_labels": True}
    return draw_bounding_boxes(image, boxes, list(texts), own, width=max(1, round(side / 300)), **look)


@functools.cache
def _font() -> str | None:
    """A file of letters of any size, which matplotlib has; None without it: then letters are small."""
    try:
        from matplotlib.font_manager import findfont
    except ImportError:
        return None
    return findfont("DejaVu Sans")


def colours_of(count: int) -> list[tuple[int, int, int]]:
    """So many colours."""
    return [tuple(row) for row in palette(count).tolist()]


def side_by_side(
    image: Tensor, objects: Any, answer: Mapping[str, Any], classes: Sequence[str], least: float
) -> tuple[Tensor, Tensor]:
    """An image `(C, H, W)` of uint8, in the size of its file, with its objects, and with those that were found.

    least: score of what is drawn.
    """
    colours = colours_of(len(classes))
    labels = objects.labels.tolist()
    truth = drawn(image, objects.boxes, labels, [classes[label] for label in labels], colours)
    kept = torch.where(answer["scores"] >= least)[0].tolist()
    labels, scores = answer["labels"][kept].tolist(), answer["scores"][kept].tolist()
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    masks = [answer["masks"][place] for place in kept] if "masks" in answer else []
    return truth, drawn(image, answer["boxes"][kept], labels, texts, colours, masks)


def in_own_size(image: Tensor, size: tuple[int, int], own: tuple[int, int]) -> Tensor:
    """An image of a batch `(C, H, W)` of uint8, of which `size` is its own part, in the size of its file."""
    part = image[None, :, : size[0], : size[1]]
    return part[0] if size == own else F.interpolate(part.float(), own, mode="bilinear").round().to(torch.uint8)[0]


def draw_objects(
    path: pathlib.Path, samples: Any, answers: Callable[[Batch], Any], classes: Sequence[str], least: float
) -> None:
    """Draw images spread over `samples`: each with its objects, and with those of what `answers` gives for it."""
    total = len(samples)
    count = min(_ROWS, total)
    rows = []
    for sample in (samples[0, (2 * place + 1) * total // (2 * count)] for place in range(count)):
        if isinstance(sample, str):
            continue  # a line about a bad image
        batch = collate([sample])
        (scene,) = batch.targets
        image = in_own_size(batch.images[0], scene.size, scene.own)
        rows.append(side_by_side(image, scene.objects, answers(batch)[0], classes, least))
    if rows:
        _draw(path, rows)


@drawing()
def _draw(path: pathlib.Path, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
    height = sum(truth.shape[1] / truth.shape[2] for truth, _ in rows)
    figure = new_figure(9.6, 0.6 + 4.6 * height + 0.1 * len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for line, pictures in zip(grid, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.axis("off")
    for axes, title in zip(grid[0], ("objects", "found"), strict=True):
        axes.set_title(title, fontsize=9)
    save_figure(figure, path)


def write_objects(
    folder: pathlib.Path, found: Sequence[Any], told: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> list[pathlib.Path]:
    """Write what was found in images as a file in COCO's form, and as pictures NAME.jpg; their paths.

    found: `Detected`.  told: the same as JSON has it.

    Raises:
        LinsightError: two images would have one name, or the folder cannot be written to.
    """
    names = [f"{pathlib.Path(entry.file).stem}.jpg" for entry in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LinsightError(f"two images would be written as {twice[0]}: predict them apart, into two folders")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT
    with writing(result):
        write_json(result, _in_coco(told, classes))
    place, colours = {name: label for label, name in enumerate(classes)}, colours_of(len(classes))
    paths = [result]
    for entry, name in zip(found, names, strict=True):
        image = decode(pathlib.Path(entry.file), "RGB", entry.file).image
        texts = [f"{kind} {score:.2f}" for kind, score in zip(entry.classes, entry.scores, strict=True)]
        boxes = torch.tensor(entry.boxes).reshape(-1, 4)
        labels = [place[kind] for kind in entry.classes]
        picture: Image.Image = to_pil_image(drawn(pil_to_tensor(image), boxes, labels, texts, colours, entry.masks))
        paths.append(folder / name)
        with writing(paths[-1]), replacing(paths[-1]) as temporary:
            picture.save(temporary, "jpeg", quality=92)
    return paths


def _in_coco(told: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Images, categories and annotations with scores; ids are counted from 1."""
    place = {name: label for label, name in enumerate(classes, 1)}
    images, rows = [], list[dict[str, Any]]()
    for number, entry in enumerate(told, 1):
        height, width = entry["size"]
        images.append({"id": number, "file_name": entry["file"], "height": height, "width": width})
        masks = entry.get("masks", [None] * len(entry["boxes"]))
        for kind, score, box, mask in zip(entry["classes"], entry["scores"], entry["boxes"], masks, strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            row = {"id": len(rows) + 1, "image_id": number, "category_id": place[kind], "bbox": sides, "score": score}
            rows.append({**row, "area": sides[2] * sides[3], "iscrowd": 0, **({"segmentation": mask} if mask else {})})
    categories = [{"id": label, "name": name} for name, label in place.items()]
    return {"images": images, "categories": categories, "annotations": rows}
