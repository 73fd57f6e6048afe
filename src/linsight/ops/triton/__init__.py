"""Fused forms of operators, in Triton. Nothing here is imported until `ops/dispatch.py` chooses it."""
