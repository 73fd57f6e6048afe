"""Pieces that several hosts are made of."""
