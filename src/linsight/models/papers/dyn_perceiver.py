"""Dynamic Perceiver (arXiv 2306.11248): three families of networks, each with a recipe for all of its sizes.

Names: the network, its width, and the number of latents, as in `dynp_mobilenetv3_0x5_t128`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from linsight.attention import Paper

from ..hosts.dyn_perceiver import DynamicPerceiver, Latents, Network
from ..registry import add_architectures
from ..rows import Architecture, Training, figures, trained

_CODE = "LeapLabTHU/Dynamic_Perceiver"

_HEADS = ("head_early", "head_att", "head_cnn", "head_merge", "feedback_att", "feedback_merge")
PAPER = Paper("Dynamic Perceiver for Efficient Visual Recognition", "2306.11248", "ICCV 2023")
CFG: Mapping[str, Any] = {"classifier": _HEADS, "first_conv": "stem.0", "crop_mode": "center"}
_CFG_MOBILENET = {**CFG, "first_conv": "stem.0.0"}


class _Row(NamedTuple):
    """latents: how many tokens, a model for each.  params: in millions, with 128.

    macs: G multiply-adds at the four exits, or at the last one, by the published code's own counter (ResNets, which
    it does not count: measured); top1: where weights are published, at the four exits. Both with 128 latents.
    """

    name: str
    network: Network
    latents: Sequence[int]
    params: float
    macs: tuple[float, ...] = ()
    top1: tuple[float, ...] = ()
    depth_factor: tuple[float, ...] = (1, 1, 1, 1)


_MANY, _SOME, _MOBILE = (32, 64, 128, 256, 512), (64, 128, 256), (128, 256, 512)
_REG, _MOB = (1, 1, 1, 2), (1, 1, 1, 3)
_MOBILENET = "mobilenet_v3_large"

_ROWS = (
    _Row("reg400m", Network("regnet_y_400mf"), _MANY, 11.61, (0.262, 0.475, 0.611, 0.634), (), _REG),
    _Row(
        "reg800m",
        Network("regnet_y_800mf"),
        _MANY,
        21.80,
        (0.459, 1.065, 1.228, 1.298),
        (68.62, 78.32, 79.15, 79.86),
        _REG,
    ),
    _Row("reg1x6g", Network("regnet_y_1_6gf"), _MANY, 27.16, (0.541, 1.758, 1.966, 2.056), (), _REG),
    _Row("reg3x2g", Network("regnet_y_3_2gf"), _MANY, 62.74, (1.134, 3.796, 4.138, 4.396), (), _REG),
    _Row("resnet18", Network("resnet18"), (128,), 19.83),
    _Row("resnet34", Network("resnet34"), (128,), 29.93),
    _Row("resnet50_0375", Network("resnet50", 0.375), _SOME, 20.28, (1.19,), (72.93, 77.52, 74.32, 77.70)),
    _Row("resnet50_050", Network("resnet50", 0.5), _SOME, 34.19, (2.07,)),
    _Row("resnet50_0625", Network("resnet50", 0.625), (64, 128, 160, 192, 256), 51.67),
    _Row("resnet50_075", Network("resnet50", 0.75), _SOME, 72.72),
    _Row("resnet50_100", Network("resnet50"), _SOME, 125.5),
    _Row("mobilenetv3_0x5", Network(_MOBILENET, 0.5), _MOBILE, 4.70, (0.048, 0.086, 0.097, 0.124), (), _MOB),
    _Row(
        "mobilenetv3_0x75",
        Network(_MOBILENET, 0.75),
        _MOBILE,
        9.30,
        (0.098, 0.182, 0.207, 0.266),
        (53.13, 71.65, 71.89, 74.59),
        _MOB,
    ),
    _Row("mobilenetv3_1x0", Network(_MOBILENET), _MOBILE, 15.16, (0.133, 0.277, 0.320, 0.425), (), _MOB),
    _Row("mobilenetv3_1x25", Network(_MOBILENET, 1.25), _MOBILE, 22.73, (0.668,), (), _MOB),
    _Row("mobilenetv3_1x5", Network(_MOBILENET, 1.5), _MOBILE, 31.56, (0.944,), (), _MOB),
    _Row("mobilenetv3_2x0", Network(_MOBILENET, 2.0), _MOBILE, 53.65, (1.618,), (), _MOB),
)


def _training(network: str) -> Training:
    family: dict[str, Any] = {"drop_path": 0.0}
    if network == _MOBILENET:
        family = {"drop_path": 0.0, "epochs": 600}
    elif network.startswith("resnet"):
        family = {"drop_path": 0.2, "lr": 6e-4}
    return trained("dyn_perceiver", 128, **family)


def _models(row: _Row) -> Iterator[Architecture]:
    for tokens in row.latents:
        known = tokens == 128
        yield Architecture(
            f"dynp_{row.name}_t{tokens}",
            DynamicPerceiver,
            {"network": row.network, "latents": Latents(tokens, row.depth_factor)},
            _CFG_MOBILENET if row.network.name == _MOBILENET else CFG,
            {**(_figures(row) if known else {}), "ema": True},  # which the authors evaluate
            training=(_training(row.network.name),),
            weights=f"the repository {_CODE}" if known and row.top1 else "",
        )


def _figures(row: _Row) -> dict[str, Any]:
    known: dict[str, Any] = {"params": round(row.params * 1e6)}
    if row.macs:
        known = figures(row.top1[-1] if row.top1 else None, row.params, row.macs[-1])
    if len(row.macs) > 1:
        known["exit_gmacs"] = row.macs
    if row.top1:
        known["exit_top1"] = row.top1
    return known


add_architectures(*(model for row in _ROWS for model in _models(row)), code=_CODE, paper=PAPER)
