"""Sides for a benchmark's worker, in a module that its process is quick to import."""

import functools
import os

import torch

from linsight.bench import alternate


def spin():
    while True:
        pass


def measure(cell, sides, send):
    """Sides that work, never end, or end the process."""
    acts = {"works": lambda: None, "spins": spin, "dies": functools.partial(os._exit, 9)}
    alternate(sides, lambda name: ({}, acts[name]), send, torch.device("cpu"), 0)
