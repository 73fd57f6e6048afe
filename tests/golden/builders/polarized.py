"""Polarized self-attention on a map, in both forms."""

from typing import Any

import linsight
from golden.spec import Run, on_map


def psa(spec: dict[str, Any]) -> Run:
    """The layer; the name of the case tells the form."""
    spec = {**spec, "input_shape": spec["inputs"]["input"]["shape"]}
    form = "sequential" if spec["name"].startswith("psa_s") else "parallel"
    layer = linsight.create_attention("polarized", spec["input_shape"][1], 1, form=form)
    return Run(layer, on_map(layer, spec))


BUILDERS = {"psa_p": psa, "psa_s": psa}
