"""ACMIL: several branches of attention pool the patches of a slide, and in training top patches are left out at random.

Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", ECCV 2024 (arXiv
2311.07125), by its published code. Of N feature vectors, F wide, h = relu(W x) is L wide. A branch k has scores s_k of
the patches and weights P_k = softmax(s_k) over them:

    gated        s = W_a (tanh(W_V h) * sigmoid(W_U h)),   f_k = P_k h,   bag: f = mean_k(P_k) h
    multihead    s_k = d^(-1/2) (W_q q_k) . (W_k h) of each head,   f_k = LN(W_o P_k (W_v h)),
                 bag: mean_k(P_k) of each head, with a W_v, a W_o and a LayerNorm of its own

Each branch has a classifier of f_k, and the bag one of f, whose logits are the prediction. With one gated branch and no
loss of branches this is ABMIL (arXiv 1802.04712). The cost is linear in patches: O(N F L).

In training, for each branch and head, `int(n * mask_drop)` of the n = `n_masked` patches of the largest scores are
drawn and set to -1e9 before the softmax. The published training is of one bag a step, 100 epochs of AdamW with weight
decay 1e-5 and a rate of 1e-4 (2e-4 on BRACS) that falls as half a cosine.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import held, split_heads
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import accumulator, full_precision, mask_tokens, traced

from ..doors import check_whole
from ..papers.acmil import INNER_DIMS
from ..parts.sets import check_kept, check_members

MASKED = -1e9  # score of a patch that is left out in training
KINDS = ("gated", "multihead")


class BagOutput(NamedTuple):
    """The answers to bags, and how they came about.

    logits: `(B, classes)`, the prediction.  branches: `(B, K, classes)`, those of each branch.
    scores: `(B, heads, K, N)` before the softmax, in float32 or float64; gated branches have one head.
    """

    logits: Tensor
    branches: Tensor
    scores: Tensor

    @property
    def weights(self) -> Tensor:
        """The share `(B, N)` of each patch in the answer: the mean over branches and heads; the sum is 1."""
        return self.scores.softmax(-1).mean((1, 2))


class BagLoss(NamedTuple):
    """The published loss and its three terms, of which it is the sum."""

    total: Tensor
    branch: Tensor
    slide: Tensor
    diversity: Tensor


def bag_loss(out: BagOutput, labels: Tensor) -> BagLoss:
    """The loss of answers to bags of classes `labels` `(B,)`.

    Cross-entropy of the logits, and, of more than one branch, that of all branches, and the mean cosine between the
    weights of two branches, which are to look at different patches.

    Raises:
        LinsightError: labels of another shape, or no whole numbers.
    """
    if labels.shape != out.logits.shape[:1] or labels.is_floating_point():
        raise LinsightError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: give the class of each of the "
            f"{len(out.logits)} bags, a whole number"
        )
    count = out.branches.shape[1]
    slide = F.cross_entropy(out.logits, labels)
    if count == 1:
        return BagLoss(slide, slide.new_zeros(()), slide, slide.new_zeros(()))
    branch = F.cross_entropy(out.branches.flatten(0, 1), labels.repeat_interleave(count))
    with full_precision(out.scores):
        directions = F.normalize(out.scores.softmax(-1), dim=-1)
        cosines = directions @ directions.transpose(-1, -2)  # (B, heads, K, K)
    pairs = count * (count - 1) / 2
    diversity = (cosines.triu(1).sum((-1, -2)) / pairs).mean()
    return BagLoss(slide + branch + diversity, branch, slide, diversity)


class Reduction(nn.Module):
    """relu(W x)."""

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, F)` to `(B, N, L)`."""
        return F.relu(self.fc1(x))


class Gate(nn.Module):
    """Scores of all branches by a gated layer of `hidden` channels."""

    def __init__(self, dim: int, hidden: int, branches: int, **factory: Any) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(dim, hidden, **factory), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(dim, hidden, **factory), nn.Sigmoid())
        self.attention_weights = nn.Linear(hidden, branches, **factory)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, N, L)` to scores `(B, 1, K, N)`."""
        return self.attention_weights(self.attention_V(h) * self.attention_U(h)).transpose(1, 2)[:, None]


class Reading(nn.Module):
    """LN(W_o P (W_v h)) of given weights P, of each head its own."""

    def __init__(self, dim: int, heads: int, **factory: Any) -> None:
        super().__init__()
        self.heads = heads
        self.v_proj = nn.Linear(dim, dim, **factory)
        self.out_proj = nn.Linear(dim, dim, **factory)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6, **factory)

    def forward(self, weights: Tensor, h: Tensor) -> Tensor:
        """Weights `(B, heads, N)` and patches `(B, N, L)` to `(B, L)`."""
        v = split_heads(self.v_proj(h), self.heads).transpose(1, 2)  # (B, H, N, d)
        read = pooled(weights[:, :, None], v).flatten(1).to(v.dtype)
        return self.layer_norm(self.dropout(self.out_proj(read)))


class Asking(Reading):
    """A `Reading` whose weights are those of a query."""

    def __init__(self, dim: int, heads: int, **factory: Any) -> None:
        super().__init__(dim, heads, **factory)
        self.q_proj = nn.Linear(dim, dim, **factory)
        self.k_proj = nn.Linear(dim, dim, **factory)

    def scores(self, query: Tensor, h: Tensor) -> Tensor:
        """Scores `(B, heads, N)` of patches `(B, N, L)`, by a query `(1, 1, L)`."""
        q, k = (split_heads(x, self.heads).transpose(1, 2) for x in (self.q_proj(query), self.k_proj(h)))
        with full_precision(k):
            dtype = accumulator(k.dtype)
            q = q.to(dtype) * q.shape[-1] ** -0.5
            return (q @ k.to(dtype).transpose(-1, -2)).squeeze(2)


class Classifier(nn.Module):
    """A linear map to classes."""

    def __init__(self, dim: int, num_classes: int, **factory: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., L)` to `(..., classes)`."""
        return self.fc(x)


class Acmil(nn.Module):
    """The model: bags `(B, N, F)` of N patches to a `BagOutput`. Its state dict has the published keys.

    Args:
        in_features: F.
        num_classes: how many classes there are.
        kind: how scores are made, see above.
        branches: K.
        inner_dim: L; 0: as published for F, or else half of it.
        hidden_dim: channels of a gated layer.
        num_heads: heads of a multihead branch.
        n_masked, mask_drop: how many patches of the largest scores there are to draw from in training, and which share
            of them is drawn; 0 and 0.0 draw none.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: Literal["gated", "multihead"] = "gated",
        branches: int = 5,
        inner_dim: int = 0,
        hidden_dim: int = 128,
        num_heads: int = 8,
        n_masked: int = 10,
        mask_drop: float = 0.6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind not in KINDS:
            raise UnknownNameError("kind", str(kind), KINDS)
        check_whole(in_features=in_features, num_classes=num_classes, branches=branches, hidden_dim=hidden_dim)
        check_whole(0, inner_dim=inner_dim, n_masked=n_masked)
        if not 0 <= mask_drop < 1:
            raise LinsightError(f"mask_drop={mask_drop} must be a share of 0 or more, below 1")
        dim = inner_dim or INNER_DIMS.get(in_features, max(in_features // 2, 1))
        if kind == "multihead" and (num_heads < 1 or dim % num_heads):
            raise LinsightError(f"num_heads={num_heads} does not divide the {dim} channels inside: pass inner_dim=")
        self.in_features, self.num_classes, self.kind = in_features, num_classes, kind
        self.n_masked, self.mask_drop, self.num_heads = n_masked, mask_drop, num_heads
        self.classes: tuple[str, ...] = ()  # their names, where a file told them
        if kind == "multihead":
            self.q = nn.Parameter(torch.empty(1, branches, dim, **factory))
            nn.init.normal_(self.q, std=1e-6)
        self.dimreduction = Reduction(in_features, dim, **factory)
        if kind == "gated":
            self.attention = Gate(dim, hidden_dim, branches, **factory)
        else:
            self.sub_attention = nn.ModuleList(Asking(dim, num_heads, **factory) for _ in range(branches))
            self.bag_attention = Reading(dim, num_heads, **factory)
        self.classifier = nn.ModuleList(Classifier(dim, num_classes, **factory) for _ in range(branches))
        self.Slide_classifier = Classifier(dim, num_classes, **factory)

    def forward(self, bags: Tensor, keep: Tensor | None = None) -> BagOutput:
        """Bags `(B, N, F)`; `keep` `(B, N)` drops patches, as those that pad bags to one length.

        Raises:
            LinsightError: bags of another shape, or without a patch.
        """
        self._check(bags, keep)
        h = self.dimreduction(mask_tokens(bags, keep))
        scores = self._scores(h)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
        if self.training and self.n_masked and self.mask_drop:
            scores = scores.masked_fill(self._drawn(scores, keep), MASKED)
        weights = scores.softmax(-1)
        if self.kind == "gated":
            each = pooled(weights[:, 0], h).to(h.dtype)  # (B, K, L)
            whole = pooled(weights.mean(2), h)[:, 0].to(h.dtype)
        else:
            each = torch.stack([part(weights[:, :, k], h) for k, part in enumerate(self.sub_attention)], dim=1)
            whole = self.bag_attention(weights.mean(2), h)
        branches = torch.stack([head(each[:, k]) for k, head in enumerate(self.classifier)], dim=1)
        return BagOutput(self.Slide_classifier(whole), branches, scores)

    def _scores(self, h: Tensor) -> Tensor:
        """`(B, heads, K, N)`, in the dtype of sums."""
        if self.kind == "gated":
            scores: Tensor = self.attention(h)
            return scores.to(accumulator(scores.dtype))
        asked = [part.scores(self.q[:, k : k + 1], h) for k, part in enumerate(self.sub_attention)]  # type: ignore[operator]
        return torch.stack(asked, dim=2)

    def _drawn(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        """True for patches that are left out, drawn for each branch and head: of a padded bag as of it alone."""
        most = min(self.n_masked, scores.shape[-1])
        top = scores.topk(most, dim=-1).indices  # those that `keep` drops come last
        drawn, none = torch.rand(top.shape, device=top.device), torch.zeros_like(scores, dtype=torch.bool)
        shares = [int(count * self.mask_drop) for count in range(most + 1)]
        if keep is None:
            return none.scatter(-1, top.gather(-1, drawn.argsort(-1)[..., : shares[most]]), True)
        there, place = keep.sum(-1).clamp(max=most)[:, None, None, None], torch.arange(most, device=top.device)
        order = drawn.masked_fill(place >= there, 2.0).argsort(-1)
        chosen = place < torch.tensor(shares, device=top.device)[there]
        return none.scatter(-1, top.gather(-1, order), chosen.expand_as(order))

    def _check(self, bags: Tensor, keep: Tensor | None) -> None:
        if traced(bags):
            return
        fc1 = self.dimreduction.fc1
        check_members(bags, self.in_features, held(fc1), name="bags", of="patches")
        check_kept(keep, bags, "patches")
        if keep is not None and not keep.any(1).all():
            raise LinsightError("keep= drops all patches of a bag: there must be a patch in each bag")


def pooled(weights: Tensor, x: Tensor) -> Tensor:
    """Sums `(..., K, E)` of `x` `(..., N, E)` by weights `(..., K, N)`, in the dtype of sums."""
    with full_precision(x):
        return weights @ x.to(accumulator(x.dtype))
