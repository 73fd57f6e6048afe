"""Losses over pixels. Logits are `(B, K, h, w)`, classes `(B, h, w)` with `NONE` for pixels of none."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.data.masks import NONE


def cross_entropy(
    logits: Tensor, classes: Tensor, *, weights: Tensor | None = None, hardest: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """The mean cross-entropy of the pixels that have a class; 0 where none has one.

    weights: `(K,)`, of classes.
    hardest: of these pixels, the share with the largest loss is counted alone; 0 counts all (online hard example
        mining, Shrivastava et al., CVPR 2016).
    smoothing: of labels.
    """
    logits = logits.float()
    known = classes != NONE
    count = known.sum().clamp(min=1)
    each = F.cross_entropy(
        logits, classes, weights, ignore_index=NONE, label_smoothing=smoothing, reduction="none"
    )  # (B, h, w), 0 where no class
    if hardest:
        kept = max(int(hardest * int(known.sum())), 1)
        each, places = each.flatten().topk(kept)
        known = known.flatten()[places]
        count = known.sum().clamp(min=1)
        classes = classes.flatten()[places]
    if weights is not None:
        return each.sum() / weights[classes.clamp(min=0)].mul(known).sum().clamp(min=1e-12)
    return each.sum() / count


def dice(logits: Tensor, classes: Tensor) -> Tensor:
    """1 minus the mean Dice coefficient of the classes in the batch (Milletari et al., 3DV 2016); 0 where none is.

    With p the probabilities and t the truth of all pixels that have a class: 2 sum p t / (sum p + sum t).
    """
    known = classes != NONE
    shares = logits.float().softmax(1) * known[:, None]
    truth = F.one_hot(classes.clamp(min=0), logits.shape[1]).movedim(-1, 1) * known[:, None]
    both, size = (shares * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    there = size > 0
    coefficients = 2 * both / (shares.sum((0, 2, 3)) + size).clamp(min=1e-12)
    return ((1 - coefficients) * there).sum() / there.sum().clamp(min=1)


def balanced(counts: Sequence[int]) -> Tensor:
    """Weights of classes `(K,)` that fall with the logarithm of their share of pixels: 1 / log(1.02 + share).

    Paszke et al., ENet (arXiv 1606.02147), section 5.1; here their mean is 1. counts: pixels of each class.
    """
    shares = torch.tensor(counts, dtype=torch.float64)
    weights = 1 / torch.log(1.02 + shares / shares.sum().clamp(min=1))
    return (weights / weights.mean()).float()
