"""The end of a dense task: the kept maps of a stream, part by part, to classes or logits of each pixel."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from linsight.models import Decode, MapEnd
from linsight.runtime.finite import require_finite

from .store import Canvas

Span = tuple[int, int]


def parts(size: tuple[int, int], side: int, stride: int, margin: int) -> Iterator[tuple[tuple[Span, Span], ...]]:
    """Parts of an image, of whole strides: rows and columns of each, without and with its margin."""
    step = max(side // stride, 1) * stride
    for top in range(0, size[0], step):
        for left in range(0, size[1], step):
            own = tuple((start, min(start + step, whole)) for start, whole in zip((top, left), size, strict=True))
            wide = tuple(
                (max(start - margin * stride, 0), min(end + margin * stride, whole))
                for (start, end), whole in zip(own, size, strict=True)
            )
            yield own, wide  # type: ignore[misc]


def decode(
    plan: Decode,
    ends: Sequence[MapEnd],
    maps: Sequence[Canvas],
    cut: Iterable[Any],
    *,
    like: Tensor,
    name: str,
    write: Callable[[slice, slice, Tensor], None],
) -> None:
    """Give the logits `(K, h, w)` of each part of an image to `write`, with its rows and columns.

    ends: of the maps.  cut: `parts` of the image.  like: whose device and dtype they are computed in.  name: of the
    image.
    """
    maps, ends = [*maps], [*ends]
    if plan.begin is not None:
        whole = [(0, side) for side in maps[-1].data.shape[:2]]
        x = plan.begin(_crop(maps[-1], ends[-1], 1, whole, like))
        maps[-1], ends[-1] = Canvas(x[0].movedim(0, -1)), MapEnd(ends[-1].steps)
    for own, wide in cut:
        each = zip(maps, ends, plan.strides, strict=True)
        crops = [_crop(canvas, end, stride, wide, like) for canvas, end, stride in each]
        high, across = (end - start for start, end in wide)
        logits = require_finite(plan.run(crops, (high, across)), name)
        rows, columns = (slice(start - first, end - first) for (start, end), (first, _) in zip(own, wide, strict=True))
        write(slice(*own[0]), slice(*own[1]), logits[0, :, rows, columns])


def _crop(canvas: Canvas, end: MapEnd, stride: int, wide: Sequence[Span], like: Tensor) -> Tensor:
    """The part `(1, C, h, w)` of a map that a part of the image is of."""
    rows, columns = ((first // stride, -(-last // stride)) for first, last in wide)
    x = canvas.rectangle(rows, columns, like)
    if end.norm is not None:
        x = end.norm(x.flatten(1, 2)).unflatten(1, (x.shape[1], x.shape[2]))
    return x.permute(0, 3, 1, 2)
