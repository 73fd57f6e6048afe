"""Models of points in space, as they were published: attention that a group leaves alone, and windows of voxels."""

from .lie import GROUPS, LieAttention, LieBlock, LieTransformer, lift
from .voxels import VoxelAttention, VoxelBlock, voxel_windows

__all__ = [
    "GROUPS",
    "LieAttention",
    "LieBlock",
    "LieTransformer",
    "VoxelAttention",
    "VoxelBlock",
    "lift",
    "voxel_windows",
]
