"""Forms of operators for a CPU. Nothing here is imported until `ops/dispatch.py` chooses it."""
