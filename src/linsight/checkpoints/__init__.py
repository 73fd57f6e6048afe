"""Published checkpoints in and out, read without ever running what is in them."""

from ._load import export_published, load_pretrained, load_published
from .report import LoadReport, Mismatch
from .unwrap import table_grids

__all__ = ["LoadReport", "Mismatch", "export_published", "load_pretrained", "load_published", "table_grids"]
