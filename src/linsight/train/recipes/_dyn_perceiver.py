"""Dynamic Perceiver (arXiv 2306.11248): three families, each with a recipe for all of its sizes."""

from ._table import CENTRE, Row, published

_REGNET = ("reg400m", "reg800m", "reg1x6g", "reg3x2g")
_RESNET = ("resnet18", "resnet34", *(f"resnet50_{width}" for width in ("0375", "050", "0625", "075", "100")))
_MOBILENET = tuple(f"mobilenetv3_{width}" for width in ("0x5", "0x75", "1x0", "1x25", "1x5", "2x0"))
# Of the last exit.
_TOP1 = {"dynp_reg800m_t128": "79.86", "dynp_resnet50_0375_t128": "77.70", "dynp_mobilenetv3_0x75_t128": "74.59"}


def _rows(backbones: tuple[str, ...], drop_path: float = 0.0, **change: float) -> dict[str, Row]:
    names = (f"dynp_{backbone}_t128" for backbone in backbones)
    return {name: Row(change, 128, drop_path, _TOP1.get(name, "")) for name in names}


DYN_PERCEIVER = published(
    {
        **_rows(_REGNET),
        **_rows(_RESNET, 0.2, lr=6e-4),
        **_rows(_MOBILENET, epochs=600),
    },
    lr=1e-3,
    lr_base_batch=1024,
    warmup_lr=0.0,
    min_lr=1e-6,
    clip_grad=0.0,
    ema=0.9999,
    amp="off",
    **CENTRE,
)
