"""Rounds and pieces that several mechanisms share."""
