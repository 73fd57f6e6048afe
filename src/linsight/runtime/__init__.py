"""What every room asks of the machine: devices, memory, signals, and files that are never half written."""
