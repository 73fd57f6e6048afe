"""Dynamic Perceiver (arXiv 2306.11248): three families, each with a recipe for all of its sizes."""

from ._table import CENTRE, Row, published

Counts = dict[str, tuple[int, ...]]
# Networks, and the numbers of latents that come with them.
_REGNET: Counts = {f"reg{size}": (32, 64, 128, 256, 512) for size in ("400m", "800m", "1x6g", "3x2g")}
_RESNET: Counts = {f"resnet50_{width}": (64, 128, 256) for width in ("0375", "050", "075", "100")}
_RESNET |= {"resnet50_0625": (64, 128, 160, 192, 256), "resnet18": (128,), "resnet34": (128,)}
_MOBILENET: Counts = {f"mobilenetv3_{width}": (128, 256, 512) for width in ("0x5", "0x75", "1x0", "1x25", "1x5", "2x0")}
# Of the last exit.
_TOP1 = {"dynp_reg800m_t128": "79.86", "dynp_resnet50_0375_t128": "77.70", "dynp_mobilenetv3_0x75_t128": "74.59"}


def _rows(networks: Counts, drop_path: float = 0.0, **change: float) -> dict[str, Row]:
    names = (f"dynp_{network}_t{count}" for network, counts in networks.items() for count in counts)
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
