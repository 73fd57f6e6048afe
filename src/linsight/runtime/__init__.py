"""The machine as every room sees it: devices, memory, signals, and files that are never half written."""
