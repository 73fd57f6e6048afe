"""StepsNet (arXiv 2511.14329).

Of Steps-ResNet the steps are published. Of Steps-DeiT and Steps-Swin only the number of blocks and the budgets
are: the widths here are ours, multiples of the width of a head (64 in DeiT, 32 in Swin) with as many blocks,
parameters and multiply-adds. No published figure is claimed for them.
"""

from linsight.attention import Paper

from ..hosts.steps_resnet import StepsResNet
from ..parts.stepsnet import Steps
from ..registry import add_architectures, add_variants
from ..rows import Architecture, Variant, figures, trained

_PAPER = Paper("Step by Step Network", "2511.14329")
_RESNET_CFG = {"first_conv": "conv1", "classifier": "fc", "pool_size": (7, 7)}
_DEEP = (
    [(64, 2)],
    [(128, 3)],
    [(64, 6), (90, 3), (128, 3), (181, 3), (256, 2)],
    [(64, 2), (90, 1), (128, 1), (181, 1), (256, 1), (362, 1), (512, 1)],
)
_SHALLOW = (
    [(64, 1)],
    [(128, 1)],
    [(64, 2), (90, 1), (128, 1), (181, 1), (256, 0)],
    [(64, 2), (90, 1), (128, 1), (181, 1), (256, 1), (362, 1), (512, 0)],
)

add_architectures(
    *(
        Architecture(
            f"steps_resnet{layers}",
            StepsResNet,
            {"block": block, "stages": stages},
            _RESNET_CFG,
            figures(top1, params, gmacs),
            feature_cfg={"out_indices": (0, 1, 2, 3, 4)},
            training=(trained("imagenet", 128, 0.0, note="recipe not published, so that of Swin, unverified"),),
        )
        for layers, block, stages, top1, params, gmacs in (
            (18, "basic", _SHALLOW, 71.6, 11.689, 1.814),
            (34, "basic", _DEEP, 76.0, 21.796, 3.663),
            (50, "bottleneck", _DEEP, 79.9, 25.567, 4.088),
        )
    ),
    paper=_PAPER,
)

_HOST = "recipe not published, so that of its host, unverified"

# The sum of width^2 over the blocks is that of DeiT's 12, all of the whole width.
_DEIT = {
    "tiny": [(64, 11), (128, 4), (192, 9)],
    "small": [(128, 7), (192, 4), (256, 5), (384, 8)],
    "base": [(256, 7), (384, 4), (512, 5), (768, 8)],
}
add_variants(
    *(
        Variant(
            f"steps_deit_{size}",
            f"vit_{size}",
            "softmax",
            {"steps": steps},
            training=(trained("deit", 128, 0.1, note=_HOST),),
        )
        for size, steps in _DEIT.items()
    ),
    paper=_PAPER,
)


def _swin(
    size: str, drop_path: float, width: int, third: tuple[int, ...], deepest: int, fourth: tuple[int, ...]
) -> Variant:
    """As in Steps-ResNet-34, the last two stages are split, from a quarter and an eighth of their width on."""
    steps: list[Steps] = [
        [(width, 2)],
        [(2 * width, 2)],
        list(zip(third, (4, 2, 2, 2, deepest), strict=True)),
        list(zip(fourth, (2, 1, 1, 1, 1, 1, 1), strict=True)),
    ]
    training = trained("imagenet", 128, drop_path, note=_HOST)
    return Variant(f"steps_swin_{size}", f"swin_{size}", "softmax", {"steps": steps}, training=(training,))


add_variants(
    _swin("tiny", 0.2, 96, (96, 128, 192, 256, 384), 4, (96, 128, 192, 256, 384, 544, 768)),
    _swin("small", 0.3, 96, (96, 128, 192, 256, 384), 16, (96, 128, 192, 256, 384, 544, 768)),
    _swin("base", 0.5, 128, (128, 192, 256, 352, 512), 16, (128, 192, 256, 352, 512, 704, 1024)),
    paper=_PAPER,
)
