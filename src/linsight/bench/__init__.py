"""The cost of mechanisms and models in time and memory, beside what a user would pick instead; and what to pick.

>>> from linsight.bench import Plan, Setting, bench, plan_groups
>>> plan = Plan(plan_groups(["inline", "agent"]), ((14, 14, 1), (56, 56, 1)), Setting(dim=192, heads=6))

`bench(plan)` yields results as they come, in a process of its own: call it below `if __name__ == "__main__"`.
"""

from ._advise import Advice, Choice, Question, advise, can_answer, known_results, shipped_results
from ._curves import Estimate, at, crossings, pays_from
from ._page import page, write_page
from ._shortlist import Accuracies, Pick, Shortlist, check_needs, read_accuracies, shortlist
from ._subjects import TIMM, Group, Subject, build, plan_groups, softmax_beside
from ._worker import TOO_LONG, Worker
from .pareto import draw_pareto, write_pareto
from .plot import draw, write_plot
from .roofline import measure_peaks
from .rounds import Send, Side, Step, alternate
from .rows import COLUMNS, ratios, read_rows, results_folder, spread, table, write_rows
from .run import Done, Plan, Size, bench, check_plan, run_facts
from .runs import run_speed
from .steps import STEPS, Cell, Setting, captured, cost, measure, step_of

__all__ = [
    "COLUMNS",
    "STEPS",
    "TIMM",
    "TOO_LONG",
    "Accuracies",
    "Advice",
    "Cell",
    "Choice",
    "Done",
    "Estimate",
    "Group",
    "Pick",
    "Plan",
    "Question",
    "Send",
    "Setting",
    "Shortlist",
    "Side",
    "Size",
    "Step",
    "Subject",
    "Worker",
    "advise",
    "alternate",
    "at",
    "bench",
    "build",
    "can_answer",
    "captured",
    "check_needs",
    "check_plan",
    "cost",
    "crossings",
    "draw",
    "draw_pareto",
    "known_results",
    "measure",
    "measure_peaks",
    "page",
    "pays_from",
    "plan_groups",
    "ratios",
    "read_accuracies",
    "read_rows",
    "results_folder",
    "run_facts",
    "run_speed",
    "shipped_results",
    "shortlist",
    "softmax_beside",
    "spread",
    "step_of",
    "table",
    "write_page",
    "write_pareto",
    "write_plot",
    "write_rows",
]
