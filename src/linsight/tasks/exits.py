"""Policies for models with several exits: who leaves where, what that costs, and what it is worth.

An image leaves at the first exit k whose confidence, the probability of its likeliest class, is at least T_k. The
thresholds follow from quotas q_k, the share that is to leave at exit k, on images kept apart for it (Huang et al.,
"Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018; the settings are those of Dynamic
Perceiver, arXiv 2306.11248):

    q_k ~ p^k, k = 1 ... K; then q_j <- m_j q_j for j = 1 ... K-1 in turn, the later ones rescaled to a sum of 1

An exit that does not pay, being no better than one before it, is passed by: m_j = 0.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError

# From leaving early to staying long.
POWERS = (*((i + 4) / 20 for i in range(17)), *(20 / (37 - i) for i in range(17, 33)))
FACTORS = (0.85, 1.0, 0.5)


class Scored(NamedTuple):
    """Answers of each exit on some images: confidences `(images, exits)`, and whether it was right."""

    confidences: Tensor
    correct: Tensor

    def accuracies(self) -> list[float]:
        """The accuracy of each exit alone, in percent."""
        return [100 * share for share in self.correct.double().mean(0).tolist()]


class Outcome(NamedTuple):
    """Share of the images at each exit, mean multiply-adds in G, top-1 in percent."""

    shares: tuple[float, ...]
    gmacs: float
    top1: float


class Setting(NamedTuple):
    """A policy.

    name: its p, or the exit that all leave at.
    thresholds: of all exits but the last; infinite where an exit is passed by.
    calibration, report: what comes of it where it was made, and on other images.
    """

    name: str
    thresholds: tuple[float, ...]
    calibration: Outcome
    report: Outcome


def quotas(power: float, factors: Sequence[float] = FACTORS) -> tuple[float, ...]:
    """The share of images that is to leave at each exit, the last one included; they sum to 1."""
    shares = [power**k for k in range(1, len(factors) + 2)]
    shares = [share / sum(shares) for share in shares]
    for j, factor in enumerate(factors):
        shares[j] *= factor
        scale = (1 - sum(shares[: j + 1])) / sum(shares[j + 1 :])
        shares[j + 1 :] = [share * scale for share in shares[j + 1 :]]
    return tuple(shares)


def calibrate(confidences: Tensor, quotas: Sequence[float]) -> tuple[float, ...]:
    """Thresholds of all exits but the last, by which the shares `quotas` of these images leave.

    confidences: `(images, exits)`. A share of less than one image is none: an infinite threshold.
    """
    staying = torch.ones(len(confidences), dtype=torch.bool)
    thresholds = []
    for k, quota in enumerate(quotas[:-1]):
        ranked = confidences[staying, k].sort(descending=True).values
        count = min(math.floor(len(confidences) * quota), len(ranked))
        thresholds.append(ranked[count - 1].item() if count else math.inf)
        staying &= confidences[:, k] < thresholds[-1]
    return tuple(thresholds)


def leaving(confidences: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The index of the exit, from 0, at which each image leaves."""
    sure = confidences >= torch.tensor([*thresholds, -math.inf], dtype=confidences.dtype)
    return sure.int().argmax(1)


def outcome(scored: Scored, thresholds: Sequence[float], gmacs: Sequence[float]) -> Outcome:
    """The outcome of `thresholds`; gmacs: to each exit, those not used being passed by."""
    exits = leaving(scored.confidences, thresholds)
    shares = torch.bincount(exits, minlength=len(gmacs)).double() / len(exits)
    right = scored.correct.gather(1, exits[:, None]).double().mean()
    return Outcome(tuple(shares.tolist()), float(shares @ torch.tensor(gmacs, dtype=shares.dtype)), 100 * float(right))


def paying(scored: Scored) -> tuple[int, ...]:
    """The exits, numbered from 1, that are right more often than every one before them."""
    tops = scored.accuracies()
    return tuple(k for k, top1 in enumerate(tops, 1) if top1 > max(tops[: k - 1], default=-1.0))


def static(exit: int, exits: int) -> tuple[float, ...]:
    """Thresholds by which all images leave at `exit`, numbered from 1."""
    return tuple(math.inf if k < exit else 0.0 for k in range(1, exits))


def curve(
    calibration: Scored, report: Scored, costs: Callable[[Sequence[int]], Sequence[int]]
) -> tuple[list[Setting], list[Setting]]:
    """The settings of `POWERS`, over the exits that pay; and each exit alone.

    costs: multiply-adds to the exits that it is given, the others being passed by.
    """
    exits = calibration.correct.shape[1]

    def setting(name: str, thresholds: tuple[float, ...], gmacs: Sequence[float]) -> Setting:
        return Setting(name, thresholds, *(outcome(scored, thresholds, gmacs) for scored in (calibration, report)))

    def spread(used: Sequence[int]) -> list[float]:
        known = dict(zip(used, costs(used), strict=True))
        return [known.get(k, 0) / 1e9 for k in range(1, exits + 1)]

    used = paying(calibration)
    gmacs = spread(used)
    factors = [factor if k in used else 0.0 for k, factor in enumerate(FACTORS, 1)]
    settings = []
    for power in POWERS:
        thresholds = calibrate(calibration.confidences, quotas(power, factors))
        final = (0.0,) * (exits - used[-1])  # who is left leaves at the last exit that pays
        settings.append(setting(f"p = {power:.2f}", thresholds[: used[-1] - 1] + final, gmacs))
    alone = [setting(f"exit {k}", static(k, exits), spread((k,))) for k in range(1, exits + 1)]
    return settings, alone


def choose(settings: Iterable[Setting], budget: float) -> Setting:
    """The setting that is right most often, of those that cost at most `budget` G, where they were calibrated.

    Raises:
        LinsightError: none is as cheap.
    """
    settings = list(settings)
    fitting = [setting for setting in settings if setting.calibration.gmacs <= budget]
    if not fitting:
        least = min(setting.calibration.gmacs for setting in settings)
        raise LinsightError(f"budget={budget:g} is less than the first exit costs: give {1.001 * least:.4g} or more")
    return max(fitting, key=lambda setting: (setting.calibration.top1, -setting.calibration.gmacs))
