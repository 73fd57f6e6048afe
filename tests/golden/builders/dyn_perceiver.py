"""Dynamic Perceiver: its layers, and models with parts left out, which have no name here."""

from typing import Any

from torch import nn

from golden.spec import Run, tensor
from linsight.models import ARCHITECTURES
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver
from linsight.models.hosts.dyn_perceiver.parts import CrossLayer, SelfLayer
from linsight.models.hosts.dyn_perceiver.types import Latents

OUTPUTS = ("y_early3", "y_att", "y_cnn", "y_merge")


def inputs(spec: dict[str, Any]) -> list[Any]:
    """Those of a case, in order."""
    return [tensor(entry["shape"], name) for name, entry in spec["inputs"].items()]


def cross(spec: dict[str, Any]) -> Run:
    """Latents that read a map, with an embedding for each cell; or a map that reads latents."""
    config = spec["config"]
    assert config["qk"] == config["v"] and config["num_heads"] == 1
    keys = config["feat_w"] * config["feat_h"] if config["rpb"] else 0
    layer = CrossLayer(config["q"], config["kv"], config["qk"], keys=keys, mlp_ratio=config["widening"])
    x, context = inputs(spec)
    return Run(layer, lambda: layer(x, context))


def selfatt(spec: dict[str, Any]) -> Run:
    """The latents' own layers."""
    config, (z,) = spec["config"], inputs(spec)
    sizes = config["dim"], config["num_heads"], config["widening"]
    layers = nn.Sequential(*(SelfLayer(*sizes) for _ in range(config["num_layers"])))
    return Run(layers, lambda: layers(z))


def model(spec: dict[str, Any]) -> Run:
    """All four exits."""
    config, (images,) = spec["config"], inputs(spec)
    network = config["model"].partition("_perceiver")[0].lower()
    latents = Latents(
        config["num_latents"],
        config["depth_factor"],
        config["num_SA_heads"],
        config["SA_widening_factor"],
        isc=config["with_isc"],
        last_z2x=config["with_last_CA"],
        dwc=config["with_dwc"],
        x2z=config["with_x2z"],
        z2x=config["with_z2x"],
    )
    whole = DynamicPerceiver(ARCHITECTURES[f"dynp_{network}_t128"].args["network"], latents).eval()

    def call() -> dict[str, Any]:
        logits = dict(zip(OUTPUTS, (found.logits for found in whole.exits(images)), strict=True))
        return {**logits, "output": whole(images)}

    return Run(whole, call)


BUILDERS = {"dynp_": model, "dynp_x2z": cross, "dynp_z2x": cross, "dynp_selfatt": selfatt}
