"""Fused forms of operators, in Triton. Nothing here is imported until `ops/_forms.py` chooses it."""
