"""ACMIL (arXiv 2311.07125): how wide bags are inside, by the width of the features that its authors took.

384: ViT-S/16, self-supervised. 512: ResNet-18, and the models of the size of CLIP-B. 768: CLIP-L at 336 pixels. 1024:
UNI. 1536: GigaPath. Figures of accuracy are in the paper alone.
"""

from linsight.attention import Paper

CODE = "dazhangyu123/ACMIL"
PAPER = Paper(
    "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", "2311.07125", "ECCV 2024"
)
INNER_DIMS = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}
