"""The task `linearize`: a trained softmax classifier becomes one of a mechanism, and learns from what it was.

Two stages (convert's `transfer` and `recovery`): each new layer learns to give what the old one gave, for the images of
the data; then the whole model is trained, by the labels, the teacher's logits, and its hidden states. The student is a
host of linsight; its teacher is the same host with softmax, and with the weights of `teacher`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from linsight.checkpoints import load_published
from linsight.convert import distil_layers, layer_errors, linearize, new_parameters
from linsight.convert.recovery import blocks, hidden_states
from linsight.convert.transfer import relative_error
from linsight.errors import CheckpointError, LinsightError
from linsight.recipe import Recipe

from .building import build, image_size
from .classify import Criterion
from .distil import Distil
from .records import LinearizeRecipe
from .task import Load, Loaded, Student

_JUDGED = 4  # batches by which the error of layers is told


class Heard(NamedTuple):
    """The logits of a model, and the outputs of its converted blocks, in their order."""

    logits: Tensor
    states: tuple[Tensor, ...]


class Hearing(nn.Module):
    """A model that tells in training mode, or always, what these blocks of it give besides its logits."""

    def __init__(self, model: nn.Module, names: list[str], always: bool = False) -> None:
        super().__init__()
        self.model, self.names, self.always = model, names, always

    def forward(self, images: Tensor) -> Any:
        """`(B, C, H, W)` -> `Heard`, or the logits alone."""
        if not (self.training or self.always):
            return self.model(images)
        with hidden_states(self.model, self.names) as kept:
            logits = self.model(images)
        return Heard(logits, tuple(kept[name] for name in self.names))


class Linearize(Distil):
    """See the module. `facts["layers"]` are the errors of the layers after their stage, and before."""

    name = "linearize"
    about = "one class for each image, by a trained softmax model whose attention is replaced"
    record: ClassVar[type[Recipe]] = LinearizeRecipe

    def build(self) -> nn.Module:
        """See `Task`: the softmax model, converted, with fresh weights."""
        recipe = self.recipe
        if recipe.attention in (None, "softmax"):
            raise LinsightError("the task linearize replaces softmax: name the mechanism, as in attention=hedgehog")
        return linearize(
            self._softmax(),
            recipe.attention,
            layers=recipe.layers.replace(",", " ").split() or None,
            neutral=recipe.neutral,
            in_place=True,
            **recipe.attention_options,
        )

    def around(self, model: nn.Module, load: Load) -> nn.Module:
        """See `Task`: the student inherits, and its layers learn one by one, unless the run did so before."""
        self.twin = self._softmax()
        self.student = model
        whole = super().around(model, load)
        if self.known is None:
            self._inherit(model)
            self._transfer(model)
        else:
            self.facts["layers"] = self.known.get("layers")
        names = blocks(model)
        if not self.recipe.hidden:
            return whole
        self.teacher.model = Hearing(self.teacher.model, names, always=True).eval()
        return Hearing(whole, names)

    def new(self, model: nn.Module) -> list[str]:
        """See `Task`."""
        return list(new_parameters(model))

    def ask(self, load: Load) -> Loaded:
        """See `Distil`: the model is the softmax host, which says what its blocks and layers do as the student does."""
        found: Any = super().ask(load)
        try:
            load_published(self.twin, found.model.state_dict())
        except CheckpointError as error:
            line = str(error).splitlines()[0]
            raise CheckpointError(f"the teacher is not '{self.recipe.model}' with softmax: {line}") from error
        return dataclasses.replace(found, model=self.twin)

    def judged(self, student: Student, outputs: Any, images: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
        """See `Classify`; the teacher's states are compared beside its logits."""
        loss = super().judged(student, outputs, images, targets, criterion)
        if isinstance(outputs, Heard):
            pairs = zip(outputs.states, self.heard.states, strict=True)
            loss = loss + self.recipe.hidden * torch.stack([relative_error(a, b) for a, b in pairs]).mean()
        return loss

    def logits(self, outputs: Any) -> Tensor:
        """See `Classify`."""
        if isinstance(outputs, Heard):
            return outputs.logits
        return super().logits(outputs)

    def _softmax(self) -> nn.Module:
        recipe = self.recipe.changed(attention="softmax", attention_options={}, drop_path=0.0)
        return build(recipe, self.outputs)

    def _inherit(self, model: nn.Module) -> None:
        """Give the student the teacher's weights, all but those that the mechanism brought.

        Raises:
            LinsightError: a tensor has no counterpart, as where the student is of another host.
        """
        theirs, new = self.twin.state_dict(), new_parameters(model)
        own = {key: tensor for key, tensor in model.state_dict().items() if ".mixing." not in key}
        odd = [key for key in own if key not in theirs or theirs[key].shape != own[key].shape]
        if odd:
            raise LinsightError(f"the teacher lacks {odd[0]}, which the student is to inherit: {len(new)} are new")
        model.load_state_dict({key: theirs[key] for key in own}, strict=False)

    def _transfer(self, model: nn.Module) -> None:
        recipe, teacher = self.recipe, self.teacher
        images = list(self._images(_JUDGED, seed=1))
        before = layer_errors(teacher.model, model, images)
        if recipe.transfer_steps and new_parameters(model):
            distil_layers(
                teacher.model,
                model,
                self._images(recipe.transfer_steps, seed=recipe.seed),
                steps=recipe.transfer_steps,
                lr=recipe.transfer_lr,
            )
        after = layer_errors(teacher.model, model, images)
        self.facts["layers"] = {name: [round(before[name], 4), round(after[name], 4)] for name in before}

    def _images(self, batches: int, seed: int) -> Iterator[Tensor]:
        """So many batches of training images as the teacher takes them, drawn by a seed of their own."""
        recipe, facts = self.recipe, self.facts
        source = self.open().train
        self.facts = facts
        samples = self.samples(source, image_size(recipe, self.student), training=True)
        draw, size, epoch = torch.Generator().manual_seed(seed), min(recipe.batch_size, len(source)), 0
        while batches:
            for some in torch.randperm(len(source), generator=draw).split(size)[: len(source) // size]:
                if not batches:
                    return
                batch = self.collate([samples[epoch, int(i)] for i in some])
                if len(batch.images):
                    yield self.teacher.images(self.inputs(batch.images))
                batches -= 1
            epoch += 1
