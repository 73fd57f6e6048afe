"""Updates whose loss or gradient is no number: they end the run, or are left out, as the recipe says."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .learner import Learner
from .origin import bad_gradient, origin

MOST = 20  # in a row that are left out


class BadUpdates:
    """The updates of an epoch that were left out.

    counts: in this epoch, and in a row until now.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.skips = learner.recipe.on_bad_loss == "skip"
        self.counts = [0, 0]
        self.where = ""  # the last one began, as far as that was looked at
        norms = [module for module in learner.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Keep what a forward pass changes, where it may have to be undone."""
        if self.skips:
            self._before = [buffer.clone() for buffer in self._statistics]

    def looks(self, loss: Tensor) -> bool:
        """True where a loss is read at once: on the CPU, or to leave its update out; a GPU has to be waited for."""
        return self.skips or loss.device.type == "cpu"

    def gradient(self, loss: Tensor) -> str:
        """Where the gradient is no number, "" where it is none; not looked at on a GPU, unless updates are left out.

        The scaler of float16 looks itself, and leaves updates out until its scale fits.
        """
        return bad_gradient(self.learner) if self.looks(loss) and not self.learner.scaler.is_enabled() else ""

    def leave_out(self, where: str) -> bool:
        """Undo an update that has begun; False where that is not to be done, or was done too often."""
        self.where = where
        if not self.skips or self.counts[1] >= MOST:
            return False
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(before)
        self.learner.optimiser.zero_grad(set_to_none=True)
        self.counts = [self.counts[0] + 1, self.counts[1] + 1]
        return True

    def done(self) -> None:
        """Count an update that was made."""
        self.counts[1] = 0

    def row(self) -> dict[str, Any]:
        """Count what was left out, for the metrics of an epoch; the next epoch begins."""
        count, self.counts[0] = self.counts[0], 0
        return {"bad_updates": count} if self.skips else {}

    def words(self, where: str) -> str:
        """How to go on after values that are no numbers, which begin `where`."""
        began = f"it began {where}; " if where else ""
        if self.counts[1]:
            began = f"{self.counts[1]} updates in a row were left out; {began}"
        return f"{began}lower lr, or set clip_grad or amp=off"

    def origin(self, again: Callable[[], Any] | None) -> str:
        """Where a loss began to be no number: see `linsight.train.origin`."""
        return origin(self.learner, again)
