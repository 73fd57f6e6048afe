"""Names that a running `accuracy.py` looks up here when it starts another process; they live in `linsight.bench`."""

from linsight.bench import Worker, alternate, step_of
from linsight.bench._rounds import ROUNDS, SAMPLE, Make, Send, Side
from linsight.bench._worker import serve as _serve

__all__ = ["ROUNDS", "SAMPLE", "Make", "Send", "Side", "Worker", "_serve", "alternate", "step_of"]
