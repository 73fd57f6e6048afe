"""`OnGrid`: modules with tables on a grid, whose state dict says on which one, since a count of rows does not."""

from typing import Any

GRIDS = "grids"  # the entry in the metadata that torch keeps of each module in a state dict


class OnGrid:
    """A mixin, in front of a module's class, where tables have a row for each place of a grid: 32 may be 4x8 or 8x4.

    Its state dict tells the grids, in the metadata that `torch.save` keeps. Loading rows of another grid raises.
    """

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """Height and width of the grid, or the window, that each table lies on, by the name of its parameter."""
        return {}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if about is not None:
            about[GRIDS] = self.table_grids()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        told = local_metadata.get(GRIDS) or {}
        for name, own in self.table_grids().items():
            old, table = told.get(name), state_dict.get(prefix + name)
            if old and table is not None and tuple(old) != own and table.shape == getattr(self, name).shape:
                there, here = ("x".join(map(str, grid)) for grid in (old, own))
                errors.append(f"{prefix}{name} lies on {there}, here on {here}: linsight.load_published resamples it")
        load = super()._load_from_state_dict  # type: ignore[misc]
        load(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
