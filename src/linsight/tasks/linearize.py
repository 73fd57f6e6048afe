"""The task `linearize`: a trained softmax classifier becomes one of a mechanism, and learns from what it was.

Two stages (convert's `transfer` and `recovery`): each new layer learns to give what the old one gave, for the images of
the data; then the whole model is trained, by the labels, the teacher's logits, and its hidden states. The student is a
host of linsight; its teacher is the same host with softmax, and with the weights of `teacher`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from linsight.checkpoints import load_published
from linsight.convert import converted_layers, distil_layers, layer_errors, linearize, new_parameters
from linsight.convert.profiles import profile, worst
from linsight.convert.recovery import blocks, hidden_states
from linsight.convert.saved import told_layers
from linsight.convert.terms import terms_alone
from linsight.convert.transfer import relative_error
from linsight.data.feeds import default_workers
from linsight.data.images import loader
from linsight.data.random import Batches
from linsight.errors import CheckpointError, LinsightError
from linsight.models.bounds import require_bounded
from linsight.recipe import Recipe

from .building import build, image_size, looks_large
from .classify import Criterion
from .distil import Distil
from .records import LinearizeRecipe
from .task import Load, Loaded, Shown, Student
from .teacher import Teacher

_JUDGED = 4  # batches by which the error of layers is told
_CONTROL = "mean"  # the mechanism that no token learns anything by
_STAGES = {  # as the page of a run calls them
    "teacher": "softmax, the teacher",
    "replaced": "its attention replaced",
    "layers": "each layer has learned what the old one gave",
}

_CONTROLS = {
    "formula": "the same weights, without local terms",
    "local": "the same weights, only what local terms add",
    _CONTROL: "the same weights, attention is the mean of the values",
}


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
    """See the module.

    `facts["layers"]` are the errors of the layers before their stage and after it; `facts["stages"]` are the top-1 of
    the teacher, of the student as it inherited, and once its layers learned, on the images of the evaluation.
    """

    name = "linearize"
    about = "one class for each image, by a trained softmax model whose attention is replaced"
    record: ClassVar[type[Recipe]] = LinearizeRecipe

    def build(self) -> nn.Module:
        """See `Task`: the softmax model, converted, with fresh weights."""
        recipe = self.recipe
        if recipe.attention in (None, "softmax"):
            raise LinsightError("the task linearize replaces softmax: name the mechanism, as in attention=hedgehog")
        return self._converted(recipe.attention, **recipe.attention_options)

    def as_start(self) -> Mapping[str, Any]:
        """See `Task`: the softmax model, with what of it was converted as an argument."""
        recipe = self.recipe
        if looks_large(recipe):
            require_bounded(recipe.model, self.build, told="as its recipe describes it")
        with torch.device("meta"):
            layers = told_layers(self.build())
        return {
            "attention": "softmax",
            "attention_options": {},
            "model_args": {**recipe.model_args, "linearized": layers},
        }

    def around(self, model: nn.Module, load: Load) -> nn.Module:
        """See `Task`: the student inherits, and its layers learn one by one, unless the run did so before."""
        self.twin = self._softmax()
        self.student = model
        whole = super().around(model, load)
        # the classifier is inherited, whatever is compared
        self.order = self.teacher.order(self.classes, self.recipe.num_classes or self.outputs)
        if self.known is None:
            self._inherit(model)
            self._transfer(model)
        else:
            self.facts |= {name: self.known.get(name) for name in ("layers", "stages")}
        names = blocks(model)
        if not self.recipe.hidden:
            return whole
        self.teacher.model = Hearing(self.teacher.model, names, always=True).eval()
        return Hearing(whole, names)

    def hardest(self, count: int, device: torch.device, load: Load) -> tuple[list[str], list[str]]:
        """The layers that the recipe converts, in two parts: those to convert, and the `count` that best stay softmax.

        These are the ones whose output changes most where they alone are replaced, by a few batches of the data. No
        weight changes. load: gives the teacher by its name.

        Raises:
            LinsightError: there are not so many.
        """
        self.open()
        self.begin(device)
        recipe, self.student = self.recipe, self.build()
        names = list(converted_layers(self.student))
        self.twin = self._softmax()
        super().around(self.student.to(device), load)
        images = self._images(_JUDGED, seed=1)
        options = {"layers": names, "neutral": recipe.neutral, **recipe.attention_options}
        kept = worst(profile(self.teacher.model, images, attention=recipe.attention, **options), keep=count)
        return [name for name in names if name not in kept], kept

    def new(self, model: nn.Module) -> list[str]:
        """See `Task`."""
        return list(new_parameters(model))

    def ask(self, load: Load) -> Loaded:
        """See `Distil`: the model is the softmax host, which says what its blocks and layers do as the student does."""
        found: Any = super().ask(load)
        if converted_layers(found.model):
            name = self.recipe.teacher
            raise LinsightError(
                f"the teacher '{name}' is converted already: give the softmax model that it was made of"
            )
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

    def controls(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """See `Task`: the same weights, where tokens receive the mean of the values, and with one part alone."""
        if self.recipe.attention == _CONTROL:
            return {}
        control, trained = self._converted(_CONTROL), model.state_dict()
        control.load_state_dict({key: trained[key] for key in control.state_dict()})
        control = control.to(self.inputs.device).to(memory_format=self.inputs.format).eval()
        return {_CONTROL: control, **terms_alone(model)}

    def compared(self, measures: Mapping[str, Mapping[str, float]]) -> Sequence[Shown]:
        """See `Task`."""
        stages, layers = self.facts.get("stages"), self.facts.get("layers")
        if not stages or not layers:  # weights of before these were kept
            return ()
        reached = {words: stages[name] for name, words in _STAGES.items() if name in stages}
        reached["the whole model trained"] = measures[""][self.best]
        reached |= {words: measures[name][self.best] for name, words in _CONTROLS.items() if name in measures}
        whole = max(stages["teacher"], 1e-9)
        stage_rows = [(words, top1 / 100, f"{top1:.2f} %", f"{top1 / whole:.1%}") for words, top1 in reached.items()]
        layer_rows = [
            (name, min(1.0, after), f"{before:.3f}", f"{after:.3f}") for name, (before, after) in layers.items()
        ]
        return (
            Shown(
                "Conversion",
                "How much the mean of the values keeps, the rest of the network does without attention. Whether the "
                "teacher was needed, a run from scratch of as many epochs tells: linsight report RUN --beside OTHER.",
                ("", "", "top-1", "of the teacher's"),
                stage_rows,
                shares=(1,),
            ),
            Shown(
                "Layers",
                "Squared error of each layer's output over the variance of the old one's, before the whole model was "
                "trained. 0: as softmax gave it; 1: as its mean.",
                ("layer", "", "replaced", "after its own stage"),
                layer_rows,
                shares=(1,),
            ),
        )

    def _converted(self, attention: str, **options: Any) -> nn.Module:
        recipe = self.recipe
        layers = recipe.layers.replace(",", " ").split() or None
        return linearize(self._softmax(), attention, layers=layers, neutral=recipe.neutral, in_place=True, **options)

    def _softmax(self) -> nn.Module:
        recipe = self.recipe.changed(attention="softmax", attention_options={}, drop_path=0.0)
        return build(recipe, self.outputs)

    def _inherit(self, model: nn.Module) -> None:
        """Give the student the teacher's weights, in the order of its classes, and none that the mechanism brought.

        Raises:
            LinsightError: a tensor has no counterpart, as where the student is of another host.
        """
        theirs, new = self.twin.state_dict(), new_parameters(model)
        own = {key: tensor for key, tensor in model.state_dict().items() if ".mixing." not in key}
        odd = [key for key in own if key not in theirs or theirs[key].shape != own[key].shape]
        if odd:
            raise LinsightError(f"the teacher lacks {odd[0]}, which the student is to inherit: {len(new)} are new")
        model.load_state_dict({key: theirs[key] for key in own}, strict=False)
        if self.order is not None:
            head: Any = model
            for tensor in head.get_classifier().state_dict().values():  # a row of each class
                tensor.copy_(tensor[self.order])

    def _transfer(self, model: nn.Module) -> None:
        recipe, teacher = self.recipe, self.teacher
        images = list(self._images(_JUDGED, seed=1))
        stages = {"teacher": self._reached(teacher.model, teacher), "replaced": self._reached(model)}
        before = layer_errors(teacher.model, model, images)
        if recipe.transfer_steps and new_parameters(model):
            distil_layers(
                teacher.model,
                model,
                self._images(recipe.transfer_steps, seed=recipe.seed),
                steps=recipe.transfer_steps,
                lr=recipe.transfer_lr,
            )
            stages["layers"] = self._reached(model)
        after = layer_errors(teacher.model, model, images)
        self.facts["stages"] = {name: round(top1, 3) for name, top1 in stages.items()}
        self.facts["layers"] = {name: [round(before[name], 4), round(after[name], 4)] for name in before}

    @torch.inference_mode()
    def _reached(self, model: nn.Module, teacher: Teacher | None = None) -> float:
        """Top-1 in percent on the images to evaluate on; of the teacher, as that takes them."""
        samples = self.samples(self.open_again(), image_size(self.recipe, self.student), training=False)
        order = Batches(len(samples), self.at_once, shuffle=False)
        workers = default_workers() if self.recipe.workers is None else self.recipe.workers
        meter, training = self.measure(), model.training
        model.eval()
        for batch in loader(samples, order, workers=min(workers, len(order)), pin=False, collate=self.collate):
            if len(batch.images):
                images = self.inputs(batch.images)
                answers = self.logits(self.answer(model, images if teacher is None else teacher.images(images)))
                if teacher is not None and self.order is not None:
                    answers = answers[:, self.order]
                meter.update(answers.float().cpu(), batch)
        model.train(training)
        return float(meter.compute()[self.best])

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
