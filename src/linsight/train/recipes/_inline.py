"""InLine (arXiv 2412.06590) and FLatten (arXiv 2308.00442)."""

from ._table import AVERAGED, CSWIN, CSWIN_384, CSWIN_BASE, DEIT, PVT, PVT_DEEP, SWIN, SWIN_384, Row, published

INLINE = published(
    {
        "inline_deit_tiny": Row(DEIT, 512, 0.1, "74.5"),
        "inline_deit_small": Row(DEIT, 128, 0.1, "80.2"),
        "inline_deit_base": Row(DEIT, 64, 0.1, "82.3"),
        "inline_pvt_tiny": Row(PVT, 128, 0.1, "78.2"),
        "inline_pvt_small": Row(PVT, 128, 0.1, "82.0"),
        "inline_pvt_medium": Row(PVT_DEEP, 128, 0.3, "83.2"),
        "inline_pvt_large": Row(PVT_DEEP, 64, 0.3, "83.6"),
        "inline_swin_tiny": Row(SWIN, 128, 0.2, "82.4"),
        "inline_swin_small": Row(SWIN, 128, 0.3, "83.6"),
        "inline_swin_base": Row(SWIN, 64, 0.5, "84.1"),
        "inline_swin_base_384": Row(SWIN_384, 32, 0.5, start="the weights of inline_swin_base, at 384 pixels"),
        "inline_cswin_tiny": Row(CSWIN | AVERAGED, 128, 0.2, "83.2"),
        "inline_cswin_small": Row(CSWIN | AVERAGED, 128, 0.4, "83.8"),
        "inline_cswin_base": Row(CSWIN_BASE | AVERAGED, 64, 0.5, "84.5"),
        "inline_cswin_base_384": Row(
            CSWIN_384 | AVERAGED, 32, 0.7, "85.7", start="the weights of inline_cswin_base, at 384 pixels"
        ),
    }
)

FLATTEN = published(
    {
        "focused_pvt_tiny": Row(PVT, 128, 0.1, "77.8"),
        "focused_pvt_small": Row(PVT, 64, 0.1, "81.7"),
        "focused_pvt_medium": Row(PVT_DEEP, 64, 0.3, "about 83.0"),
        "focused_pvt_large": Row(PVT_DEEP, 32, 0.3, "about 83.45"),
        "focused_pvt_v2_b0": Row(PVT, 128, 0.1, "71.1"),
        "focused_pvt_v2_b1": Row(PVT, 128, 0.1, "79.5"),
        "focused_pvt_v2_b2": Row(PVT, 128, 0.1, "82.5"),
        "focused_pvt_v2_b3": Row(PVT_DEEP, 128, 0.3, "about 83.7"),
        "focused_pvt_v2_b4": Row(PVT_DEEP, 64, 0.3, "about 84.0"),
        "focused_pvt_v2_b5": Row(PVT_DEEP, 64, 0.3, note="no recipe published, so that of B4"),
        "focused_swin_tiny": Row(SWIN, 128, 0.2, "82.1"),
        "focused_swin_small": Row(SWIN, 128, 0.3, "83.5"),
        "focused_swin_base": Row(SWIN, 64, 0.5, "83.8"),
        "focused_swin_base_384": Row(
            SWIN_384, 32, 0.5, "85.0", start="the weights of focused_swin_base, at 384 pixels"
        ),
        "focused_cswin_tiny": Row(CSWIN | {"ema": 0.99984}, 256, 0.2, "83.1"),
        "focused_cswin_small": Row(CSWIN | {"ema": 0.99984}, 128, 0.4, "83.8"),
        "focused_cswin_base": Row(CSWIN_BASE | {"ema": 0.99982}, 64, 0.5, "84.5"),
        "focused_cswin_base_384": Row(
            CSWIN_384 | {"ema": 0.99982}, 32, 0.7, "85.5", start="the weights of focused_cswin_base, at 384 pixels"
        ),
    },
    amp="off",  # mixed precision was not used
)
