"""Dynamic Perceiver: a convolutional network and a latent branch joined by attention, with four exits.

Han et al., "Dynamic Perceiver for Efficient Visual Recognition", ICCV 2023 (arXiv 2306.11248). A few
latent tokens z classify, while the network's maps x keep what is local. Before stage s of the network

    z <- tokens mixed (L -> L/2), channels expanded to those of x          s >= 2
    x <- x + attention(x, z), and an MLP                                   s >= 2
    z <- z + attention(z, pool(x + DW(x)) + R), and an MLP; self-attention

so both directions cost O(H*W*L): linear in the pixels. Exits, in the order of time: the latents before
stage 3 ("early"), before stage 4 ("att"), the network itself ("cnn"), and both together, after x has read
z once more ("merge"). Logits of the latents' exits feed the next one of theirs through a small layer.

The published forward always computes all four. Here each exit computes what it needs beyond the one
before, and returns a state to go on from, of the whole batch or of some of its images:

    found = model.start(images)                      # the first exit: found.logits
    found = model.resume(found.state[undecided])     # the second one

Any image size. The networks are torchvision's.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models._input import update_model_input_size
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from linsight.attention import Rename
from linsight.errors import LinsightError
from linsight.ops import is_proxy

from ...doors import check_whole, whole_size
from ...parts.images import check_images, refuse_fx
from .cnn import cut
from .parts import CrossAttention, Exchange, FeatureNorm, Writer
from .types import Decision, Exit, ExitLogits, Latents, Network, State

EXITS = ("early", "att", "cnn", "merge")
LAST = len(EXITS)
_DEPTHS = (3, 3, 9, 3)  # self layers before each stage, times the depth factor

# Of the loss, for the exits in order; then of what the last one teaches the others.
_WEIGHTS = (0.5, 0.5, 1.0, 1.0)
_TEACHING, _TEMPERATURE = 0.5, 1.0


class DynamicPerceiver(nn.Module):
    """The model.

    Args:
        network: the convolutional branch.
        latents: the latent branch.
        img_size: what `exit_costs` counts for unless told; any size works.
        drop_rate: before the classifier of the network, or inside it where it has a hidden layer; None:
            as published for this network.
        drop_path_rate: of the network's residual branches.

    In training it gives `ExitLogits`, for `training_loss`; in evaluation the logits of the last exit.
    """

    def __init__(
        self,
        network: Network,
        latents: Latents = Latents(),  # noqa: B008 - a tuple
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.img_size, self.latents = in_chans, img_size, latents
        self.grad_checkpointing = False
        with torch.device(torch.get_default_device() if device is None else device):
            parts = cut(*network, in_chans=in_chans, drop_path_rate=drop_path_rate)
            self.drop_rate = parts.drop if drop_rate is None else drop_rate
            self.widths, self._hidden, self._head_std = parts.widths, parts.hidden, parts.head_std
            self.num_features = self.head_hidden_size = parts.widths[-1] + parts.widths[-2]
            self.published = (*parts.published, *_published())
            self.latent = nn.Parameter(torch.empty(latents.tokens, parts.widths[0]))
            nn.init.trunc_normal_(self.latent, std=0.02)
            self.stem = parts.stem
            self.stages = nn.ModuleList(parts.stages)
            self.exchanges = nn.ModuleList(self._exchange(i) for i in range(len(parts.stages)))
            self.last_write = Writer(parts.widths[-1], parts.widths[-2]) if latents.last_z2x else None
            self.reset_classifier(num_classes)
        self.to(dtype=dtype)

    def _exchange(self, i: int) -> Exchange:
        latents, widths = self.latents, self.widths
        return Exchange(
            widths[i],
            latents.tokens // 2**i,
            (latents.tokens // 2 ** (i - 1), widths[i - 1]) if i else None,
            depth=math.ceil(_DEPTHS[i] * latents.depth_factor[i]),
            num_heads=latents.num_heads[i],
            mlp_ratio=latents.mlp_ratio,
            pool=latents.pool,
            dwc=latents.dwc,
            x2z=latents.x2z or i == 0,
            z2x=latents.z2x,
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers at all exits; with 0 classes the features that they would get come out."""
        if global_pool not in (None, "avg"):
            raise LinsightError(f"global_pool='{global_pool}': the exits read means, leave it out")
        check_whole(0, num_classes=num_classes)
        self.num_classes = num_classes
        *_, early, late, out = self.widths
        fed = late if num_classes and self.latents.isc else 0
        factory: dict[str, Any] = {"device": self.latent.device, "dtype": self.latent.dtype}
        self.head_early = _linear(early, num_classes, **factory)
        self.head_att = _linear(late + fed, num_classes, **factory)
        self.head_cnn = self._network_head(out, **factory)
        self.head_merge: nn.Module = nn.Identity()
        if num_classes:
            width = out + late + fed
            head = self._network_head(width, **factory)
            parts = head if isinstance(head, nn.Sequential) else (head,)
            self.head_merge = nn.Sequential(FeatureNorm(width, **factory), *parts)
        self.feedback_att = _feedback(num_classes, fed, **factory)
        self.feedback_merge = _feedback(num_classes, fed, **factory)
        if self._head_std is not None:
            for module in self.head_cnn.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=self._head_std)
                    nn.init.zeros_(module.bias)

    def _network_head(self, width: int, **factory: Any) -> nn.Module:
        """A linear classifier, or one with the hidden layer of MobileNetV3."""
        if not (self._hidden and self.num_classes):
            return _linear(width, self.num_classes, **factory)
        first = nn.Linear(width, self._hidden, **factory)
        last = nn.Linear(self._hidden, self.num_classes, **factory)
        return nn.Sequential(first, nn.Hardswish(), nn.Dropout(self.drop_rate), last)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The classifiers of the four exits."""
        return self.head_early, self.head_att, self.head_cnn, self.head_merge

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside stages and exchanges: less memory for one more forward."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Note the size of images that the model is for; it takes any."""
        if img_size is not None:
            self.img_size = whole_size(img_size)
            update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The latents, and the embeddings of their keys."""
        paths = (path for path, module in self.named_modules() if isinstance(module, CrossAttention))
        keys = {f"{path}.key_embed" for path in paths if self.get_submodule(path).key_embed is not None}
        return {"latent", *keys}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay: by stage, each after its exchange unless `coarse`."""
        blocks = [(r"^exchanges\.(\d+)", (0,)), (r"^stages\.(\d+)", (1,))]
        return {"stem": r"^stem|^latent", "blocks": r"^(?:exchanges|stages)\.(\d+)" if coarse else blocks}

    def forward(self, images: Tensor) -> Tensor | ExitLogits:
        """`(B, C, H, W)` to the last exit's logits `(B, classes)`; in training to those of all exits."""
        if not self.training:
            return self.start(images, to=LAST).logits
        return ExitLogits(*(found.logits for found in self.exits(images)))

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """`(B, C, H, W)` to map and latents at the last exit, and the logits that feed it, if some do."""
        state = self._begin(images)
        for number in range(1, LAST):
            state = self._pass(state, number, wanted=False)[1]
        x, z = self._advance(state.x, state.z, LAST)
        return (x, z) if state.logits is None else (x, z, state.logits)

    def forward_head(self, features: tuple[Tensor, ...], pre_logits: bool = False) -> Tensor:
        """The last exit's logits, of the output of `forward_features`; or the means of map and latents."""
        x, z, *fed = features
        if pre_logits:
            return torch.cat([x.mean((2, 3)), z.mean(1)], 1)
        return self._classify(x, z, fed[0] if fed else None, LAST)

    def exits(self, images: Tensor, numbers: Sequence[int] = range(1, LAST + 1)) -> Iterator[Exit]:
        """Pass the exits `numbers`, one after the other; what comes after the last one taken is not computed."""
        found = None
        for number in numbers:
            found = self.start(images, to=number) if found is None else self.resume(found.state, to=number)
            yield found

    def start(self, images: Tensor, to: int = 1) -> Exit:
        """Go to the exit numbered `to`, and no further."""
        return self.resume(self._begin(images), to)

    def resume(self, state: State, to: int | None = None) -> Exit:
        """Go on to the next exit, or to the one numbered `to`; those between are passed by.

        Raises:
            LinsightError: there is no such exit ahead.
        """
        to = state.passed + 1 if to is None else to
        if not state.passed < to <= LAST:
            raise LinsightError(f"exit {to} is not ahead of exit {state.passed}: there are {LAST} in all")
        for number in range(state.passed + 1, to):
            state = self._pass(state, number, wanted=False)[1]
        logits, state = self._pass(state, to, wanted=True)
        return Exit(to, logits, state)

    def _begin(self, images: Tensor) -> State:
        if is_proxy(images):
            refuse_fx("a network of several exits")
        check_images(self, images)
        # a copy: PyTorch's counter of operations cannot follow a view of a parameter
        return State(0, images, torch.stack([self.latent]))

    def _pass(self, state: State, number: int, *, wanted: bool) -> tuple[Any, State]:
        """Logits of an exit (None if nobody needs them), and the state after it."""
        x, z = self._advance(state.x, state.z, number)
        fed, feeds = state.logits, number <= 2 and self.feedback_att is not None
        logits = self._classify(x, z, fed, number) if wanted or feeds else None
        return logits, State(number, x, z, logits if feeds else fed)

    def _advance(self, x: Tensor, z: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Map and latents at the exit `number`, of those at the exit before."""
        if number == 1:
            x = self.stem(x)
            for exchange, stage in zip(self.exchanges[:2], self.stages[:2], strict=True):
                x, z = self._run(exchange, x, z)
                x = self._run(stage, x)
            return self._run(self.exchanges[2], x, z)
        if number == 2:
            return self._run(self.exchanges[3], self._run(self.stages[2], x), z)
        if number == 3:
            return self._run(self.stages[3], x), z
        return (x if self.last_write is None else self._run(self.last_write, x, z)), z

    def _run(self, module: nn.Module, *tensors: Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *tensors)
        return module(*tensors)

    def _classify(self, x: Tensor, z: Tensor, fed: Tensor | None, number: int) -> Tensor:
        """Logits of exit `number`; fed: those of the latents' exit before."""
        if number == 1:
            return self.head_early(z.mean(1))
        pooled = [x.mean((2, 3))] if number > 2 else []
        if number == 3:
            drop = 0.0 if self._hidden else self.drop_rate
            return self.head_cnn(F.dropout(pooled[0], drop, self.training))
        feedback, head = (self.feedback_att, self.head_att) if number == 2 else (self.feedback_merge, self.head_merge)
        parts = [*pooled, z.mean(1)]
        if feedback is not None:
            parts.append(feedback(fed))
        return head(torch.cat(parts, 1))

    def predict(self, images: Tensor, thresholds: Sequence[float]) -> Decision:
        """Let each image leave at the first exit that is sure enough; only the others go on.

        thresholds: for each exit but the last, the probability of the likeliest class from which an image
            leaves; `math.inf` passes an exit by.
        """
        if len(thresholds) != LAST - 1:
            raise LinsightError(f"there are {LAST - 1} exits before the last one, not {len(thresholds)}")
        left, state = torch.arange(len(images), device=images.device), self._begin(images)
        gone = []
        for number, least in enumerate((*thresholds, -math.inf), 1):
            if least < math.inf and len(left):
                found = self.resume(state, to=number)
                unsure = found.logits.float().softmax(1).amax(1) < least
                done = left[~unsure]
                gone.append((done, found.logits[~unsure], torch.full_like(done, number)))
                left, state = left[unsure], found.state[unsure]
        places, logits, exits = (torch.cat(parts) for parts in zip(*gone, strict=True))
        order = places.argsort()
        return Decision(logits[order], exits[order])

    def exit_costs(
        self, img_size: int | tuple[int, int] | None = None, numbers: Sequence[int] = range(1, LAST + 1)
    ) -> tuple[int, ...]:
        """Multiply-adds (of matrix products and convolutions) that one image takes to each of the exits `numbers`.

        Counted on the meta device, by running to one exit after the other, the rest being passed by.
        """
        twin = copy.deepcopy(self).to("meta").eval()
        height, width = to_2tuple(self.img_size if img_size is None else img_size)
        images = torch.empty(1, self.in_chans, height, width, device="meta", dtype=self.latent.dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            return tuple(int(counter.get_total_flops()) // 2 for _ in twin.exits(images, numbers))

    def training_loss(
        self, outputs: ExitLogits, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The loss of what `forward` gives in training.

        L = CE(cnn) + CE(merge) + (CE(att) + CE(early)) / 2 + 1/2 sum_k KL(p_merge || p_k), k = early, att, cnn;
        no gradient through p_merge. criterion: CE, of logits and targets, soft ones under mixup too.
        """
        wide = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in outputs]
        loss = torch.stack([w * criterion(y, targets) for w, y in zip(_WEIGHTS, wide, strict=True)]).sum()
        *pupils, teacher = (y / _TEMPERATURE for y in wide)
        target = teacher.detach().softmax(1)
        for y in pupils:
            kl = F.kl_div(y.log_softmax(1), target, reduction="batchmean")
            loss = loss + _TEACHING * _TEMPERATURE**2 * kl
        return loss


def _linear(width: int, num_classes: int, **factory: Any) -> nn.Module:
    return nn.Linear(width, num_classes, **factory) if num_classes else nn.Identity()


def _feedback(num_classes: int, width: int, **factory: Any) -> nn.Module | None:
    """From the logits of an exit to features of the next one; None where they are not used."""
    if not width:
        return None
    return nn.Sequential(nn.Linear(num_classes, width, **factory), FeatureNorm(width, **factory), nn.ReLU())


def _published() -> Iterator[Rename]:
    """The names in published checkpoints of all but the network."""
    for i in range(4):
        s, ours = i + 1, f"exchanges.{i}"
        yield Rename(f"dwc{s}_x2z.", f"{ours}.dwc.")
        yield Rename(f"cross_att{s}_x2z.", f"{ours}.read.")
        yield Rename(f"self_att{s}.", f"{ours}.layers.")
        if i:
            yield Rename(f"cross_att{s}_z2x.", f"{ours}.write.")
            yield Rename(f"token_mixer.{i - 1}.", f"{ours}.mix.")
            yield Rename(f"token_expander.{i - 1}.", f"{ours}.widen.")
    yield Rename("last_cross_att_z2x.", "last_write.")
    yield Rename("early_classifier3.", "head_early.")
    yield Rename("isc3.", "feedback_att.")
    yield Rename("isc4.", "feedback_merge.")
    for exit in EXITS[1:]:
        yield Rename(f"classifier_{exit}.", f"head_{exit}.")
