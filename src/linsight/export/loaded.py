"""An exported file as the model of its task: it takes what a trained model takes, and answers alike."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import CheckpointError

from .files import Opened


class FileModel(nn.Module):
    """The base: an opened file as a module.

    opened: the file and its facts.  path: in messages.
    """

    def __init__(self, opened: Opened, path: str | pathlib.Path) -> None:
        super().__init__()
        self.opened: Callable[[], Opened] = lambda: opened  # no part of this module: it is not cast, nor moved
        self.path = str(path)

    def outputs(self, images: Tensor) -> list[list[Tensor]]:
        """The outputs of the file for images as its model takes them, `(B, C, H, W)`: of each part of the batch.

        Pixels are uint8 of whole images, one at a time.
        """
        model, facts = self.opened()
        images = images.permute(0, 2, 3, 1) if facts.pixels else images.to(getattr(torch, facts.dtype))
        found = [model(part) for part in (images.split(1) if not facts.dynamic or facts.single else [images])]
        return [_listed(answer, facts.outputs) for answer in found]

    def example(self) -> Tensor:
        """An image of the size that the file tells, of zeros."""
        facts = self.opened().facts
        return torch.zeros(1, *facts.input_size, dtype=torch.uint8 if facts.pixels else torch.float32)

    def count(self) -> int:
        """How many classes the file tells apart.

        Raises:
            CheckpointError: its outputs are not those of its task.
        """
        raise NotImplementedError

    def other(self, said: str) -> CheckpointError:
        """The error of a file that is something else."""
        return CheckpointError(f"'{self.path}' gives {said}: open it by open_exported")


class Classes(FileModel):
    """A file of a classifier: float32 `(B, C, H, W)` -> logits `(B, K)`, of probabilities their logarithm."""

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        answers = torch.cat([answer[-1] for answer in self.outputs(images)]).float().to(images.device)
        pixels = self.opened().facts.pixels
        return answers.clamp_min(torch.finfo(torch.float32).tiny).log() if pixels else answers

    def count(self) -> int:
        """See `FileModel`."""
        answer = self(self.example())
        if answer.ndim != 2:
            raise self.other(f"maps {tuple(answer.shape)} and no classes")
        return answer.shape[1]


class Masks(FileModel):
    """A file of a segmenter: float32 `(B, C, H, W)` -> logits `(B, K, H, W)`; 1 and 0 where it gives a mask."""

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        found = torch.cat([answer[0] for answer in self.outputs(images)]).to(images.device)
        facts = self.opened().facts
        if not facts.pixels:
            return found.float()
        if int(found.min()) < 0 or int(found.max()) >= len(facts.classes):
            raise self.other(f"the class {int(found.max())}, of {len(facts.classes)}")
        return F.one_hot(found.long(), len(facts.classes)).movedim(-1, 1).float()

    def count(self) -> int:
        """See `FileModel`."""
        facts, example = self.opened().facts, self.example()
        (answer,) = self.outputs(example)
        if answer[0].ndim != (3 if facts.pixels else 4):
            raise self.other(f"no mask, but an output {tuple(answer[0].shape)}")
        return len(facts.classes) if facts.pixels else answer[0].shape[1]


class Objects(FileModel):
    """A file of a detector: images `(C, H, W)` of any sizes -> for each boxes, labels, scores, and perhaps masks."""

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See the class."""
        facts, found = self.opened().facts, list[dict[str, Tensor]]()
        for image in images:
            (answer,) = self.outputs(image[None])
            own = dict(zip(facts.outputs, answer, strict=True))
            labels = own["labels"]
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(facts.classes):
                raise self.other(f"the label {int(labels.max())}, of {len(facts.classes)} classes")
            if "masks" in own and own["masks"].ndim == 3:  # of whole pixels
                own["masks"] = own["masks"][:, None].float()
            found.append(own)
        return found

    def count(self) -> int:
        """See `FileModel`."""
        facts = self.opened().facts
        (answer,) = self.outputs(self.example())
        forms = {name: tuple(tensor.shape[1:]) for name, tensor in zip(facts.outputs, answer, strict=True)}
        if {name: forms.get(name) for name in ("boxes", "labels", "scores")} != _OF_AN_OBJECT:
            raise self.other(f"no boxes, labels and scores, but {', '.join(facts.outputs)}")
        return len(facts.classes)


_OF_AN_OBJECT: dict[str, tuple[int, ...]] = {"boxes": (4,), "labels": (), "scores": ()}
KINDS: dict[str, type[FileModel]] = {"classify": Classes, "segment": Masks, "detect": Objects}


def _listed(answer: Any, names: Sequence[str]) -> list[Tensor]:
    """Outputs in the order of their names."""
    if isinstance(answer, dict):
        return [answer[name] for name in names]
    return list(answer) if isinstance(answer, list | tuple) else [answer]
