"""Published conversions, as data: what each puts in the place of softmax, what it inherits, its stages, its figures.

>>> method = preset("hedgehog")
>>> student = linsight.linearize(teacher, **method.conversion())
>>> distil_layers(teacher, student, batches, **method.stages[0].keywords())
>>> distil(teacher, student, batches, **method.stages[1].keywords())

Losses, of layers that are fed what the teacher's are, or of the model on inputs of its own:

    outputs       mean square of the difference of outputs    weights       cross entropy of attention weights
    matrix        Frobenius norm of the difference of those   block         distance of the outputs of whole blocks
    hidden        distance of hidden states                   logits        distance of predictions
    task          the task's own                              selection     of learned shares, see `hybrid`
    similarity    of tokens to each other                     masked        features where tokens are hidden
    distribution  matching along a path of sampling
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from linsight.attention import Paper
from linsight.errors import LinsightError, UnknownNameError

from .hybrid import Hybrid
from .recovery import Recovery

LOSSES = {
    "layers": ("outputs", "weights", "matrix", "block"),
    "model": ("task", "logits", "hidden", "outputs", "selection", "similarity", "masked", "distribution"),
}
HERE = {"layers": ("outputs", "weights"), "model": ("task", "logits", "hidden")}  # those of `distil_layers`, `distil`
READ = {
    "paper": "in the paper",
    "abstract": "in its abstract or readme",
    "notes": "in notes on it, or in tables of another",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of training, as published.

    Args:
        of: "layers", each fed as the teacher's is, or the "model" as a whole.
        losses: their weights; none are told, if empty.
        trains: "new" parameters, "all", those of the "attention", or "lora": new ones, and low-rank changes.
        lr: None where it is not told.
        new_lr_scale: the factor on it for new parameters.
        length: in the words of the paper.
        rank: of "lora", whose alpha is twice that in all of these.
        distance: of predictions.
    """

    of: Literal["layers", "model"]
    losses: Mapping[str, float]
    trains: Literal["new", "all", "attention", "lora"] = "all"
    lr: float | None = None
    length: str = ""
    new_lr_scale: float = 1.0
    rank: int = 8
    distance: Literal["kl", "mse"] = "kl"

    @property
    def unmet(self) -> tuple[str, ...]:
        """Losses that no stage of linsight has."""
        return tuple(name for name in self.losses if name not in HERE[self.of])

    def keywords(self) -> dict[str, Any]:
        """The arguments of `distil_layers`, or of `distil`, for the losses that those have.

        Where the "attention" alone is trained, first set `requires_grad` of all else to False.

        Raises:
            LinsightError: they have none of them.
        """
        here = {name: weight for name, weight in self.losses.items() if name in HERE[self.of]}
        if not here:
            raise LinsightError(f"a stage by {', '.join(self.losses) or 'losses that are not told'} is not in linsight")
        how: dict[str, Any] = {} if self.lr is None else {"lr": self.lr}
        if self.of == "layers":
            return {"loss": next(iter(here)), **how}
        how |= {name: here.get(name, 0.0) for name in HERE["model"]}
        how |= {"train": "all" if self.trains == "attention" else self.trains, "rank": self.rank}
        return {"recovery": Recovery(**how, distance=self.distance, new_lr_scale=self.new_lr_scale)}

    def __str__(self) -> str:
        weights = [name if weight == 1 else f"{weight:g} {name}" for name, weight in self.losses.items()]
        trained = {"new": "new parameters", "all": "all", "attention": "attentions", "lora": f"LoRA {self.rank}"}
        rate = "" if self.lr is None else f"lr {self.lr:g}"
        scale = "" if self.new_lr_scale == 1 else f"{self.new_lr_scale:g} times that for new ones"
        parts = [" + ".join(weights) or "loss not told", trained[self.trains], rate, scale, self.length]
        return f"{self.of}: {', '.join(filter(None, parts))}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published figure of the softmax model, and of the converted one.

    read: where, of `READ`.
    """

    what: str
    before: str
    after: str
    read: str = "notes"

    def __str__(self) -> str:
        return f"{self.what} {self.before} → {self.after}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published conversion.

    Args:
        models: those that were converted.
        layers: which attentions.
        attention, options: what is nearest to its mechanism here; "" where nothing is.
        new: parameters that it brings.
        inherits: of q, k, v and out, those whose weights are copied.
        beside: what else of the model is.
        gaps: what of it is not here.
    """

    name: str
    paper: Paper
    models: str
    layers: str
    attention: str
    new: str
    stages: tuple[Stage, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inherits: tuple[str, ...] = ("q", "k", "v", "out")
    beside: str = "all else"
    hybrid: Hybrid | None = None
    figures: tuple[Figure, ...] = ()
    gaps: tuple[str, ...] = ()

    def conversion(self) -> dict[str, Any]:
        """The arguments of `linearize`, without layers.

        Raises:
            LinsightError: its mechanism is not here, nor one like it.
        """
        if not self.attention:
            raise LinsightError(
                f"nothing here is like the mechanism of '{self.name}' ({self.new}): name one, "
                f"linearize(model, 'hedgehog')"
            )
        skipped = {role: "skip" for role in ("q", "k", "v", "out") if role not in self.inherits}
        given: dict[str, Any] = {"attention": self.attention, **self.options}
        return given | ({"inherit": skipped} if skipped else {}) | ({"hybrid": self.hybrid} if self.hybrid else {})


def preset(name: str) -> Preset:
    """A published conversion by its name.

    Raises:
        UnknownNameError: there is no such one.
    """
    if name not in PRESETS:
        raise UnknownNameError("published conversion", name, PRESETS)
    return PRESETS[name]


_ALPACA = "2 epochs of 50k samples of Alpaca"
_ROWS = (
    Preset(
        "t5",
        Paper("Linearizing Vision Transformer with Test-Time Training", "2605.02772", "ICML 2026"),
        models="DeiT-T, DeiT-S, DiT, SD 3.5",
        layers="all; of SD 3.5 13 of images alone and the last 5 joint ones",
        attention="t5",
        new="inner weights, 3x3 convolutions of q and k",
        stages=(Stage("model", {"task": 1}, "all", 2e-5, "30 epochs, lr of a batch of 512", new_lr_scale=20),),
        figures=(
            Figure("DeiT-T top-1", "72.05", "71.19"),
            Figure("DeiT-T with a window of 5", "72.05", "72.06"),
            Figure("DeiT-S top-1", "80.24", "79.00"),
            Figure("DiT-XL/2 FID", "2.27", "2.48"),
            Figure("SD 3.5 GenEval", "0.66 (0.70 fine-tuned)", "0.69"),
        ),
        gaps=(
            "its augmentation and averaged weights: those are in `linsight train --recipe t5_tiny`",
            "the window beside it in DiT has a fixed factor of 0.5: the mechanism `dit5` is that, in models without "
            "prefix tokens",
            "the loss and the rates of SD 3.5 are not told",
        ),
    ),
    Preset(
        "hedgehog",
        Paper("The Hedgehog & the Porcupine", "2402.04347", "ICLR 2024"),
        models="ViT-B/16, BERT, GPT-2, Llama-2 7B",
        layers="all",
        attention="hedgehog",
        options={"feature_map": "exp"},
        new="maps of q and of k, from the identity",
        stages=(Stage("layers", {"weights": 1}, "new"), Stage("model", {"task": 1}, "all")),
        figures=(
            Figure("ViT-B/16 top-1", "80.3", "79.5"),
            Figure("BERT CoLA", "58.8", "59.2"),
            Figure("BERT MNLI", "84.7", "82.6"),
            Figure("GPT-2 perplexity", "15.8", "16.7"),
            Figure("Llama-2 ROUGE-1, both with LoRA", "51.1", "47.4"),
        ),
        gaps=("this map of the paper has no causal form here: 'softmax_parts' and 'exp_parts' have",),
    ),
    Preset(
        "lolcats",
        Paper("LoLCATs", "2410.10254"),
        models="Llama-3, Mistral, 8B to 405B",
        layers="all",
        attention="hedgehog",
        options={"feature_map": "softmax_parts", "features": 64},
        new="maps of each head, the share of the window",
        hybrid=Hybrid(window=64),
        stages=(
            Stage("layers", {"outputs": 1000}, "new", 1e-2, f"{_ALPACA}, packed to 1024 tokens"),
            Stage("model", {"task": 1}, "lora", 1e-4, "the same data; together 0.04 B tokens"),
        ),
        figures=(
            Figure("Llama-3-8B MMLU", "66.6", "52.8"),
            Figure("Mistral-7B MMLU", "62.4", "51.4"),
            Figure("Llama-3-8B, mean of five others", "73.1", "74.2"),
        ),
        gaps=(
            "window and map have one denominator there, and the window is the own block of 64 and the one before: "
            "here each is normalised by itself, and added",
            "the weight of 1000 makes up for small outputs: here losses are relative to their variance",
            "the rate falls where the loss stays, not by a cosine",
            "causal models take causal=True besides",
        ),
    ),
    Preset(
        "linfusion",
        Paper("LinFusion: 1 GPU, 1 Minute, 16K Image", "2409.02097"),
        models="SD 1.5, 2.1, XL",
        layers="all self-attention of the U-Net",
        attention="linear",
        new="an MLP in front of the maps to q and to k",
        stages=(Stage("model", {"task": 1, "logits": 0.5, "outputs": 0.5}, "attention", 1e-4, distance="mse"),),
        gaps=(
            "the MLPs in front of the projections: `linearize` has no place for the mechanism `linfusion`, and "
            "`linear` is that without them",
            "its published code draws the projections anew, though the paper speaks of those of SD: here they are "
            "copied",
            "outputs of the student on inputs of its own: `hidden` compares those of whole blocks",
            "FID and CLIP scores, and the number of steps, were not found",
        ),
    ),
    Preset(
        "clear",
        Paper("CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", "2412.16112"),
        models="FLUX.1-dev",
        layers="all 57",
        attention="clear",
        options={"radius": 8},
        new="none; weights of pooled keys with down_factor",
        stages=(
            Stage(
                "model",
                {"task": 1, "logits": 0.5, "outputs": 0.5},
                "attention",
                length="10k steps on 10k images of its own, Prodigy",
                distance="mse",
            ),
        ),
        figures=(Figure("time of an image of 8K", "1", "1/6.3", "abstract"),),
        gaps=(
            "the optimiser Prodigy",
            "outputs are of each fourth single-stream layer, on the student's own inputs: `hidden` compares blocks",
            "tables of FID, LPIPS and CLIP scores were not found",
        ),
    ),
    Preset(
        "supra",
        Paper("SUPRA", "2405.06640"),
        models="Mistral-7B",
        layers="all",
        attention="linear",
        options={"feature_map": "relu"},
        new="one linear map with ReLU for q and k, GroupNorm of each head",
        stages=(Stage("model", {"task": 1}, "all", 3e-5, "20 to 100 B tokens, down to 1e-5"),),
        figures=(Figure("Mistral-7B MMLU", "62.4", "34.2"), Figure("Mistral-7B, mean of five others", "74.4", "69.9")),
        gaps=(
            "its learned map, the fixed decay of each head, and GroupNorm in the place of the denominator",
            "rotation of features, not of queries and keys",
        ),
    ),
    Preset(
        "lizard",
        Paper("Lizard", "2507.09025", "ACL 2026"),
        models="Llama-3-8B, Mistral-7B",
        layers="all; or half",
        attention="hedgehog",
        options={"feature_map": "exp"},
        new="maps, a gate of each token in the place of rotary, the factor of the window, 4 sinks",
        hybrid=Hybrid(window=128),
        stages=(
            Stage("layers", {"outputs": 1}, "new", 1e-3, f"{_ALPACA}, 20M tokens"),
            Stage("model", {"task": 1}, "lora", 5e-4, "the same data"),
        ),
        figures=(
            Figure("Llama-3-8B MMLU", "66.6", "61.2", "paper"),
            Figure("Llama-3-8B MMLU, half of the layers kept", "66.6", "65.1", "paper"),
            Figure("Mistral-7B MMLU", "62.4", "60.8", "paper"),
        ),
        gaps=("the gate, and the sinks in the window's denominator", "rotary stays, where the gate has its place"),
    ),
    Preset(
        "xatl",
        Paper("XATL", "2404.02684"),
        models="language models to RetNet and striped Mamba",
        layers="all",
        attention="",
        new="RetNet, Mamba",
        inherits=("out",),
        beside="embeddings, norms, MLPs",
        stages=(Stage("model", {"task": 1}, "all", length="copied parts are held until the loss stops to fall"),),
        figures=(Figure("training to the same loss", "1", "1/2.5", "abstract"),),
        gaps=(
            'the architectures; for other mechanisms it is inherit={"q": "skip", "k": "skip", "v": "skip"}',
            "to let parts go while training: `held` of a `Recovery` holds them all the time, or `freeze` of inherit",
        ),
    ),
    Preset(
        "mohawk",
        Paper("MOHAWK", "2408.10189"),
        models="Phi-1.5 to Mamba-2",
        layers="all; or some, as a hybrid",
        attention="",
        new="Mamba-2; its C from q, B from k, x from v",
        stages=(
            Stage("layers", {"matrix": 1}, "new"),
            Stage("layers", {"block": 1}, "new"),
            Stage("model", {"logits": 1}, "all", length="3 B tokens in all"),
        ),
        figures=(Figure("Phi-1.5, mean, hybrid", "67.2", "66.0"),),
        gaps=("Mamba-2, and the first two losses; `outputs` of layers is the nearest to them",),
    ),
    Preset(
        "vit_linearizer",
        Paper("ViT-Linearizer", "2504.00037", "ICCV 2025"),
        models="CLIP ViT-B/16 to Mamba-2",
        layers="the whole network",
        attention="",
        new="all of Adventurer, a Mamba-2",
        inherits=(),
        beside="nothing",
        stages=(Stage("model", {"similarity": 1, "masked": 1}, "all"),),
        figures=(
            Figure("ImageNet top-1", "84.7", "84.3"),
            Figure("ADE20K mIoU", "51.0", "51.3"),
            Figure("Cityscapes mIoU", "81.8", "82.0"),
        ),
        gaps=("both losses; `linsight train --task distil` trains another architecture by logits",),
    ),
    Preset(
        "linvideo",
        Paper("LinVideo", "2510.08318", "CVPR 2026"),
        models="Wan 1.3B and 14B",
        layers="16 of 30, 22 of 40, which are learned",
        attention="hedgehog",
        new="maps, one share of softmax for each layer",
        hybrid=Hybrid(selected=True),
        stages=(Stage("model", {"distribution": 1, "selection": 0.01}, "all", length="3k steps"),),
        figures=(Figure("Wan 1.3B imaging quality", "66.25", "66.07"),),
        gaps=(
            "matching of distributions along the path: with a mean square in its place they report 61.56",
            "the loss of shares is `selection_loss`, to be added in the `task` of `distil`",
            "models of video",
        ),
    ),
    Preset(
        "linmu",
        Paper("LinMU", "2601.01322", "TMLR 2026"),
        models="NVILA-8B, Qwen2.5-VL-7B",
        layers="all of the decoder",
        attention="",
        new="a Mamba-2 in both directions, and windows of space and time, both from the attention's weights",
        stages=(
            Stage("model", {}, "new", length="the Mamba branch alone"),
            Stage("model", {}, "new", length="and the windows"),
            Stage("model", {"hidden": 1, "logits": 1}, "lora", length="weights are not told"),
        ),
        figures=(Figure("throughput", "1", "up to 9.0", "abstract"),),
        gaps=("Mamba-2, and windows of three axes", "weights, rates and tables were not found"),
    ),
)
PRESETS = {row.name: row for row in _ROWS}
