"""Models of bags: sets of feature vectors, as those of the tiles of a slide, to one label."""

from .acmil import Acmil, BagLoss, BagOutput, bag_loss

__all__ = ["Acmil", "BagLoss", "BagOutput", "bag_loss"]
