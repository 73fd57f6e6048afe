"""What we know of the models of timm: their published keys, their steps, and how to put a mechanism in."""
