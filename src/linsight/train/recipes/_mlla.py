"""MLLA (arXiv 2405.16605), with MESA, and Circulant Attention (arXiv 2512.21542)."""

from ._table import AVERAGED, CENTRE, Row, published

MLLA = published(
    {
        "mlla_tiny": Row({"mesa": 1.0}, 128, 0.2, "83.5"),
        "mlla_small": Row({"mesa": 1.5}, 64, 0.3, "84.4"),
        "mlla_base": Row({"mesa": 2.0}, 64, 0.5, "85.3"),
    },
    **AVERAGED,
    **CENTRE,
)

CIRCULANT = published(
    {
        "ca_deit_tiny": Row({}, 128, 0.0, "75.0"),
        "ca_deit_small": Row({}, 128, 0.1, "81.0"),
        "ca_deit_base": Row({}, 128, 0.4, "82.3"),
    },
    **CENTRE,
)
