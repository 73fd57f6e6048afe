"""The task `distil`: one class for each image, learned from the labels and from what another model makes of it.

Knowledge distillation: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; `hard` is that of DeiT
(Touvron et al., ICML 2021), on the one classifier that a student has here. The finished run is a classifier like any
other, and is used without its teacher.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.recipe import Recipe

from .building import image_size
from .classify import Classify, Criterion
from .records import DistilRecipe
from .task import Load, Loaded, Student
from .teacher import FEATURES, Seeing, Seen, Teacher, probe


class Distil(Classify):
    """See the module. The loss is `(1 - w) * labels + w * teacher`, with w of `distil_weight`, and MESA's besides."""

    name = "distil"
    about = "one class for each image, learned from another model, too"
    record: ClassVar[type[Recipe]] = DistilRecipe

    def check(self, model: nn.Module) -> None:
        """See `Task`."""
        super().check(model)
        if hasattr(model, "training_loss"):
            raise LinsightError(
                f"distil needs a model with one set of logits: '{self.recipe.model}' has a loss of its own"
            )

    def around(self, model: nn.Module, load: Load) -> nn.Module:
        """See `Task`: the teacher is loaded; a student of features has them beside its logits.

        Raises:
            LinsightError: there is no such teacher, or it is none for this student.
        """
        recipe, kind = self.recipe, self.recipe.distil_kind
        found = self.ask(load)
        teacher = self.teacher = Teacher(recipe.teacher, found, kind, self.inputs, recipe.teacher_size)
        self.facts["teacher"] = teacher.digest  # a resumed run has the same one
        self.order: Tensor | None = None
        if kind not in FEATURES:
            self.order = teacher.order(self.classes, recipe.num_classes or self.outputs)
            return model
        blank = torch.zeros(1, recipe.in_chans, *image_size(recipe, model), device=self.inputs.device)
        own = probe(model, kind, blank, f"the student '{recipe.model}'").features.shape[-1]
        return Seeing(model, kind, own, teacher.width).to(self.inputs.device)

    def ask(self, load: Load) -> Loaded:
        """The teacher, loaded.

        Raises:
            LinsightError: it is not named, or cannot be used.
        """
        recipe = self.recipe
        if recipe.teacher is None:
            raise LinsightError(f"the task {self.name} learns from a teacher: name it, as in teacher=runs/NAME")
        try:
            return load(recipe.teacher, recipe.teacher_checkpoint)
        except LinsightError as error:
            raise LinsightError(f"the teacher cannot be used: {error}") from error

    def judged(self, student: Student, outputs: Any, images: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
        """See `Classify`: the teacher sees the images as they were augmented and mixed for the student."""
        recipe, teacher = self.recipe, self.teacher
        labels = super().judged(student, self.logits(outputs), images, targets, criterion)
        told = self.heard = student.asked(teacher.model, teacher.images(images))
        if recipe.distil_kind in FEATURES:
            other = apart(outputs.features, told.features, recipe.distil_distance)
        else:
            ours, logits = self.logits(outputs), self.logits(told)
            logits = logits if self.order is None else logits[:, self.order]
            other = (
                soft(ours, logits, recipe.distil_temperature) if recipe.distil_kind == "soft" else hard(ours, logits)
            )
        return (1 - recipe.distil_weight) * labels + recipe.distil_weight * other

    def logits(self, outputs: Any) -> Tensor:
        """See `Classify`."""
        return outputs.logits if isinstance(outputs, Seen) else outputs


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(teacher || student)` of logits `(B, classes)` divided by T, the mean over the images."""
    ours, theirs = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """The cross entropy of logits `(B, classes)` with the class that the teacher decides for."""
    return F.cross_entropy(student.float(), teacher.argmax(-1))


def apart(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """The mean distance of features, `(B, C)` or `(B, H, W, C)` with the teacher's map resized to the student's.

    distance: "mse", of features of mean 0 and variance 1 over their channels, or "cosine", 1 minus it, of these.
    """
    student, teacher = student.float(), teacher.float()
    if student.ndim == 4 and student.shape[1:3] != teacher.shape[1:3]:
        planes = teacher.permute(0, 3, 1, 2)
        size = list(student.shape[1:3])
        resized = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
        teacher = resized.permute(0, 2, 3, 1)
    ours, theirs = (F.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
    if distance == "cosine":
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    return F.mse_loss(ours, theirs)
