"""Agent Attention (arXiv 2312.08874)."""

from ._table import CSWIN, CSWIN_384, CSWIN_BASE, DEIT, PVT, PVT_DEEP, SWIN, SWIN_384, Row, published

_EMA = {"ema": 0.99984}

AGENT = published(
    {
        "agent_deit_tiny": Row(DEIT, 512, 0.0, "74.9"),
        "agent_deit_small": Row(DEIT, 128, 0.1, "80.5"),
        "agent_deit_small_448": Row(DEIT, 64, 0.1, "83.1"),
        "agent_deit_base": Row(DEIT, 128, 0.3, "82.0"),
        "agent_pvt_tiny": Row(PVT, 128, 0.1, "78.4"),
        "agent_pvt_small": Row(PVT, 128, 0.1, "82.2"),
        "agent_pvt_medium": Row(PVT_DEEP, 128, 0.3, "83.4"),
        "agent_pvt_medium_256": Row(PVT_DEEP, 64, 0.3, "83.8"),
        "agent_pvt_large": Row(PVT_DEEP, 64, 0.3, "83.7"),
        "agent_swin_tiny": Row(SWIN, 128, 0.2, "82.6"),
        "agent_swin_small": Row(SWIN, 128, 0.3, "83.7"),
        "agent_swin_small_288": Row(SWIN | {"crop_pct": 1.0}, 64, 0.3, "84.1"),
        "agent_swin_base": Row(SWIN, 64, 0.5, "84.0"),
        "agent_swin_base_384": Row(SWIN_384, 32, 0.5, "84.9", start="the weights of agent_swin_base, at 384 pixels"),
        "agent_cswin_tiny": Row(CSWIN | _EMA, 128, 0.2, "83.1"),
        "agent_cswin_small": Row(CSWIN | _EMA, 128, 0.4, "83.9"),
        "agent_cswin_base": Row(CSWIN_BASE | {"ema": 0.99992}, 64, 0.5, "84.7"),
        "agent_cswin_base_384": Row(
            CSWIN_384 | {"ema": 0.9998}, 32, 0.7, "85.8", start="the weights of agent_cswin_base, at 384 pixels"
        ),
    },
    amp="off",  # mixed precision was not used
)
