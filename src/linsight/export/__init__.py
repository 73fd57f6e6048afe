"""Models that leave the house: ONNX, torch.export and AOTInductor files, checked before they are called done.

>>> from linsight.export import export_onnx, open_exported
>>> done = export_onnx(model, "model.onnx")
>>> logits = open_exported("model.onnx").model(images)
"""

from .dense import ServedMasks, ServedObjects
from .facts import Facts
from .files import Opened, open_exported
from .hub import push_to_hub, save_for_hub
from .onnx import export_onnx
from .program import export_aoti, export_program
from .served import Served
from .trained import load_exported
from .triton import write_triton
from .verify import Checked, Exported

__all__ = [
    "Checked",
    "Exported",
    "Facts",
    "Opened",
    "Served",
    "ServedMasks",
    "ServedObjects",
    "export_aoti",
    "export_onnx",
    "export_program",
    "load_exported",
    "open_exported",
    "push_to_hub",
    "save_for_hub",
    "write_triton",
]
