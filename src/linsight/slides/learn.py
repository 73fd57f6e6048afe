"""A bag model learns: one bag a step, as ACMIL is trained, and the epoch with the best F1 and AUC is kept."""

import copy
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError, MissingExtraError
from linsight.models.bags import Acmil, bag_loss
from linsight.runtime.files import replacing, to_json, writing

from .labelled import LabelledBags

MEASURES = ("f1", "auc", "accuracy")  # in percent
Report = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A bag model in evaluation mode, the epoch whose weights it has, from 1, and `MEASURES` and the loss there."""

    model: Acmil
    epoch: int
    measures: Mapping[str, float]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.model.classes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights, with the names of the classes, to a file of safetensors that `load_bag_model` reads.

        Raises:
            LinsightError: it cannot be written.
        """
        about = {"classes": to_json(self.classes), "num_heads": str(self.model.num_heads)}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.model.state_dict().items()}
        target = pathlib.Path(path)
        with writing(target), replacing(target) as temporary:
            temporary.write_bytes(save(tensors, about))


def train_bags(
    model: Acmil,
    train: LabelledBags,
    val: LabelledBags,
    *,
    epochs: int = 100,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    improved: Callable[["Learned"], None] | None = None,
) -> Learned:
    """Train a bag model, in place, by the published recipe: AdamW, and a rate that falls as half a cosine step by step.

    The epoch that is kept has the largest sum of F1 and AUC, both means over the classes, on `val`; of equal ones, that
    of the smaller loss.

    Args:
        model: with as many classes as the bags have.
        lr: 1e-4 as published for Camelyon, 2e-4 for BRACS.
        improved: called with each model that is the best so far: to save it, so that nothing is lost.
        report: called after each epoch, from 1, with `MEASURES`, the loss of `val` and, as "train_loss", that of the
            bags learned from.

    Raises:
        LinsightError: the model does not fit the bags, a number cannot be, a bag is damaged, or the loss is no number.
        MissingExtraError: torchmetrics is not installed.
    """
    _measured(torch.eye(2), torch.arange(2))  # a package that is missing is told before an epoch, not after it
    if (model.in_features, model.num_classes) != (train.width, len(train.classes)):
        raise LinsightError(
            f"the bag model is of {model.in_features} channels and {model.num_classes} classes, and the bags are of "
            f"{train.width} and {len(train.classes)}"
        )
    if epochs < 1 or not lr > 0 or not weight_decay >= 0:
        raise LinsightError(
            f"epochs={epochs}, lr={lr}, weight_decay={weight_decay}: give 1 or more, above 0, 0 or more"
        )
    model.classes = train.classes
    like = next(model.to(device).parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    order = torch.Generator().manual_seed(seed)
    best: Learned | None = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            total = 0.0
            model.train()
            for index in torch.randperm(len(train), generator=order).tolist():
                bag, label = train.features(index).to(like), torch.tensor([train.targets[index]], device=device)
                loss = bag_loss(model(bag[None]), label).total
                value = loss.item()
                if not math.isfinite(value):
                    raise LinsightError(f"the loss became {value:g} in epoch {epoch}: try a smaller lr than {lr:g}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                total += value
            found = judge_bags(model.eval(), val)
            if best is None or _rank(found) > _rank(best.measures):
                best = Learned(copy.deepcopy(model), epoch, found)
                if improved is not None:
                    improved(best)
            if report is not None:
                report(epoch, {**found, "train_loss": total / len(train)})
    assert best is not None
    return best


@torch.inference_mode()
def judge_bags(model: Acmil, bags: LabelledBags) -> dict[str, float]:
    """`MEASURES`, and the mean cross entropy as "loss", of a bag model in evaluation mode.

    F1 and AUC are means over the classes that `bags` has, of each against the others.

    Raises:
        LinsightError: a bag is damaged.
        MissingExtraError: torchmetrics is not installed.
    """
    like = next(model.parameters())
    logits = [model(bags.features(index).to(like)[None]).logits.float().cpu() for index in range(len(bags))]
    return _measured(torch.cat(logits), torch.tensor(bags.targets))


def _measured(logits: Tensor, targets: Tensor) -> dict[str, float]:
    try:
        from torchmetrics.functional.classification import binary_auroc, multiclass_f1_score
    except ImportError:
        raise MissingExtraError("torchmetrics", "train", "to judge a bag model") from None
    shares, there = logits.softmax(-1), targets.unique().tolist()
    each = multiclass_f1_score(logits, targets, num_classes=logits.shape[1], average="none")[there]
    areas = [binary_auroc(shares[:, one], (targets == one).long()) for one in there if len(there) > 1]
    return {
        "f1": 100 * float(each.mean()),
        "auc": 100 * float(torch.stack(areas).mean()) if areas else float("nan"),
        "accuracy": 100 * float((logits.argmax(-1) == targets).float().mean()),
        "loss": float(F.cross_entropy(logits, targets)),
    }


def _rank(found: Mapping[str, float]) -> tuple[float, float]:
    return found["f1"] + (0.0 if math.isnan(found["auc"]) else found["auc"]), -found["loss"]
