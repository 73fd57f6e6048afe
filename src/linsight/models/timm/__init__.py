"""Models of timm: their published keys, their steps, and how a mechanism is put in."""
