"""ACMIL on bags, and its training loss."""

from typing import Any

import torch
from torch import Tensor

from golden.spec import Run, tensor
from linsight.models.bags import Acmil, bag_loss


def acmil(spec: dict[str, Any]) -> Run:
    """The model; its outputs are those of the one bag."""
    config = spec["config"]
    kind = {"D": config.get("D")} if "D" in config else {}
    model = Acmil(
        config["D_feat"],
        config["n_class"],
        kind="gated" if kind else "multihead",
        branches=config["n_token"],
        inner_dim=config["D_inner"],
        hidden_dim=config.get("D", 128),
        num_heads=config.get("heads", 8),
    )
    bag = tensor(spec["inputs"]["input"]["shape"])

    def call() -> dict[str, Tensor]:
        out = model(bag)
        return {"output": out.branches[0], "slide": out.logits, "attention": out.scores[0]}

    def loss() -> dict[str, Tensor]:
        terms = bag_loss(model(bag), torch.tensor([config["label"]]))
        named = {"output": terms.total, "branch_loss": terms.branch, "slide_loss": terms.slide}
        return {name: term[None] for name, term in {**named, "diversity_loss": terms.diversity}.items()}

    if "label" in config:
        return Run(model, loss, inputs={"input": bag.requires_grad_()})
    return Run(model, call)


BUILDERS = {"acmil_": acmil}
