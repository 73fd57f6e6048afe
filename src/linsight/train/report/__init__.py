"""The page of a run, report.html: what it reached, how, on which machine, and what it takes for what.

A task hands over what it found (`Findings`); nothing else here knows classes.
"""

from .findings import findings_of
from .look import Outcome, look, numbered
from .page import Findings, Section
from .run import PAGE, Kept, read_kept, write_page
from .seen import Watch, seen
from .write import write_report

__all__ = [
    "PAGE",
    "Findings",
    "Kept",
    "Outcome",
    "Section",
    "Watch",
    "findings_of",
    "look",
    "numbered",
    "read_kept",
    "seen",
    "write_page",
    "write_report",
]
