"""Detectors on the backbones."""

from .detector import METHODS, Detector, create_detector

__all__ = ["METHODS", "Detector", "create_detector"]
