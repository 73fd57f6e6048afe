"""A trained model that another one learns from: the same images as it takes them, and what is compared of both."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.images import Normalise
from linsight.errors import LinsightError

from .building import image_size
from .task import Loaded

FEATURES = ("features", "map")  # the kinds that compare features


class Seen(NamedTuple):
    """The logits of a model `(B, classes)`, and its features `(B, C)` or, of a map, `(B, H, W, C)`."""

    logits: Tensor
    features: Tensor


def see(model: nn.Module, images: Tensor, kind: str) -> Seen:
    """A model's answer for normalised images, with the features of `kind`: pooled, or the last map, normed as it is.

    kind: "features" or "map".
    """
    whole: Any = model
    if kind == "map":
        final, maps = whole.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
        return Seen(whole.forward_head(final), maps[-1].permute(0, 2, 3, 1))
    final = whole.forward_features(images)
    return Seen(whole.forward_head(final), whole.forward_head(final, pre_logits=True))


class Seeing(nn.Module):
    """A model whose forward is `see`, in training mode with the features brought to the width of a teacher's.

    width: of the teacher's features, None to leave them and to give them in evaluation mode, too.
    own: of the model's.
    """

    def __init__(self, model: nn.Module, kind: str, own: int = 0, width: int | None = None) -> None:
        super().__init__()
        self.model, self.kind, self.always = model, kind, width is None
        self.project = nn.Identity() if width in (None, own) else nn.Linear(own, width)

    def forward(self, images: Tensor) -> Any:
        """Normalised `(B, C, H, W)` -> `Seen`, or in evaluation mode the logits alone."""
        if not (self.training or self.always):
            return self.model(images)
        logits, features = see(self.model, images, self.kind)
        return Seen(logits, self.project(features))


def probe(model: nn.Module, kind: str, images: Tensor, who: str) -> Seen:
    """The answer for images of zeros, in evaluation mode; the features are empty where `kind` does not compare them.

    Raises:
        LinsightError: `who` cannot answer so.
    """
    training = model.training
    try:
        with torch.no_grad():
            if kind in FEATURES:
                found = see(model.eval(), images, kind)
            else:
                found = Seen(model.eval()(images), images.new_empty(0))
            if not (isinstance(found.logits, Tensor) and found.logits.ndim == 2):
                raise TypeError("it has no single set of logits")
            return found
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
        size = "x".join(map(str, images.shape[-2:]))
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise LinsightError(f"{who} gives nothing for distil_kind={kind} of images of {size}: {reason:.200}") from error
    finally:
        model.train(training)


class Teacher:
    """A trained model on a device, for images that were normalised for a student.

    It is frozen, in evaluation mode, and no part of the student.

    name: what errors call it.  inputs: how the student's images were normalised.  size: of the images that it sees,
    empty for those it was trained on.

    Raises:
        LinsightError: it takes other channels, or no images of this size.
    """

    def __init__(self, name: str, found: Loaded, kind: str, inputs: Normalise, size: Sequence[int]) -> None:
        self.name, self.classes, self.named = f"the teacher '{name}'", found.classes, found.run
        channels, wanted = found.recipe.in_chans, inputs.mean.shape[1]
        if channels != wanted:
            raise LinsightError(
                f"{self.name} takes images of {channels} channels: set in_chans={channels}, not {wanted}"
            )
        self.digest = digest(found.model)
        model = found.model.to(inputs.device).to(memory_format=inputs.format).requires_grad_(False).eval()
        height, width = (tuple(size) * 2)[:2] or image_size(found.recipe, model)
        self.size = (height, width)
        own = Normalise(found.recipe, inputs.device)
        # from the student's scale to the teacher's: x * gain + shift
        self.gain, self.shift = own.scale / inputs.scale, (inputs.mean - own.mean) * own.scale
        self.same = bool(torch.equal(own.mean, inputs.mean) and torch.equal(own.scale, inputs.scale))
        seen = probe(model, kind, torch.zeros(1, channels, *self.size, device=inputs.device), self.name)
        self.count = seen.logits.shape[-1]
        self.width = seen.features.shape[-1] if kind in FEATURES else 0
        self.model = Seeing(model, kind).eval() if kind in FEATURES else model

    def images(self, images: Tensor) -> Tensor:
        """The student's images `(B, C, H, W)` in the size and on the scale of the teacher."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        return images if self.same else images * self.gain + self.shift

    def order(self, classes: Sequence[str], count: int) -> Tensor | None:
        """The places of the teacher's logits in the order of the student's; None where they are the same.

        classes: of the student.  count: of its logits.

        Raises:
            LinsightError: it has other classes.
        """
        ways = "distil_kind=features or map learns from any"
        if count != self.count:
            raise LinsightError(f"{self.name} has {self.count} classes, and the student {count}: {ways}")
        if not self.named or tuple(classes) == self.classes:
            return None
        if set(classes) != set(self.classes):
            one, other = (sorted(set(a) - set(b)) for a, b in ((classes, self.classes), (self.classes, classes)))
            odd = f"no class '{one[0]}'" if one else f"a class '{other[0]}' besides"
            raise LinsightError(f"{self.name} knows other classes than the data has, as it has {odd}: {ways}")
        places = [self.classes.index(name) for name in classes]
        return torch.tensor([*places, *range(len(places), count)], device=self.gain.device)


def digest(model: nn.Module) -> str:
    """A short digest of all weights of a model on the CPU."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
