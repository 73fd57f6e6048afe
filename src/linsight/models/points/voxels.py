"""Swin3D's attention: softmax among the occupied voxels of a window, with learnt places and colours of each pair.

Yang et al., "Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding", 2023 (arXiv 2304.06906). A
voxel has signals: where it lies in its window, in voxels, its colour in [-1, 1]^3, and a normal. For each component a
of a signal, a pair has the bin

    r_a(i, j) = clamp(floor(z x_ia - z x_ja + L), 0, 2L - 1)

    place     z = quant_size,     L = window_size quant_size
    others    z = 2 quant_size,   L = 4 quant_size

of tables T^q, T^k, T^v with vectors for each component, bin and head. With t_ij the sum of T[r_a(i, j)] over all a

    score   s q_i . k_j + s q_i . t^q_ij + k_j . t^k_ij,   s = d^(-1/2)
    o_i     sum_j softmax_j (v_j + t^v_ij)

Here queries and keys are multiplied with whole tables first, and weights are summed in bins, so that no pair has a
vector: the cost is O(n^2 H) for a window of n voxels, beside O(n L d). Windows of like sizes are computed together.

Not here: the U-Net around it, as sparse convolutions are in no library that this one needs, and the depths of its two
sizes are not in the published repository.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from linsight.attention import held
from linsight.errors import LinsightError
from linsight.ops import accumulator, full_precision, traced

from ..doors import check_whole
from ..parts.sets import check_members, check_same_place

SIGNALS = ("xyz", "rgb", "norm")
_OF = ("query", "key", "value")


def voxel_windows(cells: Tensor, window_size: int, *, shift: int = 0, image: Tensor | None = None) -> Tensor:
    """The number of the window of each voxel `(N,)`, from 0.

    Args:
        cells: `(N, 3)`, whole numbers.
        window_size: its side in voxels.
        shift: added to the cells before they are cut; every second block has half of the side.
        image: `(N,)`, whose voxel it is, in a batch.

    Raises:
        LinsightError: the cells, or their images, are of another shape or kind.
    """
    check_whole(window_size=window_size)
    if cells.ndim != 2 or cells.shape[1] != 3 or cells.is_floating_point():
        raise LinsightError(f"cells of shape {tuple(cells.shape)} and {cells.dtype}: give (N, 3) of whole numbers")
    if image is not None and (image.shape != cells.shape[:1] or image.is_floating_point()):
        raise LinsightError(
            f"image is {image.dtype} of shape {tuple(image.shape)}: give a whole number for each of {len(cells)} voxels"
        )
    corner = torch.div(cells + shift, window_size, rounding_mode="floor")
    rows = corner if image is None else torch.cat([image[:, None].to(corner), corner], dim=1)
    return rows.unique(dim=0, return_inverse=True)[1]


class VoxelAttention(nn.Module):
    """Attention in windows of voxels: see the module. Its state dict has the published keys.

    Args:
        dim, num_heads: channels and heads.
        window_size: side of a window in voxels.
        quant_size: bins of a voxel.
        signals: some of `SIGNALS`, "xyz" first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 5,
        quant_size: int = 4,
        signals: tuple[str, ...] = ("xyz", "rgb"),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_whole(dim=dim, num_heads=num_heads, window_size=window_size, quant_size=quant_size)
        if dim % num_heads:
            raise LinsightError(f"num_heads={num_heads} does not divide dim={dim}: choose a divisor of {dim}")
        if not signals or tuple(signals) != SIGNALS[: len(signals)]:
            raise LinsightError(f"signals={signals!r}: give the first of {', '.join(SIGNALS)}, in this order")
        self.num_heads, self.signals, self.scale = num_heads, tuple(signals), (dim // num_heads) ** -0.5
        self.steps = tuple(quant_size if name == "xyz" else 2 * quant_size for name in signals)
        self.reach = tuple(window_size * quant_size if name == "xyz" else 4 * quant_size for name in signals)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)
        for name, reach in zip(signals, self.reach, strict=True):
            for of in _OF:
                table = nn.Parameter(torch.empty(3, 2 * reach, num_heads, dim // num_heads, **factory))
                nn.init.trunc_normal_(table, std=0.02)
                self.register_parameter(f"{of}_{name}_table", table)

    def forward(self, x: Tensor, signals: Tensor, windows: Tensor) -> Tensor:
        """Voxels `(N, C)` to `(N, C)`.

        Args:
            x: `(N, C)`.
            signals: `(N, 3 s)`: the place in the window, in voxels, then the others.
            windows: `(N,)`, whole numbers: voxels with the same one see each other; as of `voxel_windows`.

        Raises:
            LinsightError: shapes that do not fit, or numbers of another kind.
        """
        if not traced(x):
            check_members(x, self.proj.in_features, held(self.proj), name="features", of="voxels", axes=2)
            check_same_place(x, signals=signals, windows=windows)
            if windows.is_floating_point():
                raise LinsightError(f"windows are {windows.dtype}: give whole numbers, as of voxel_windows")
        wanted = (len(x), 3 * len(self.signals))
        if tuple(signals.shape) != wanted or tuple(windows.shape) != wanted[:1]:
            raise LinsightError(
                f"signals are of shape {tuple(signals.shape)}, windows of {tuple(windows.shape)}: {len(x)} voxels with "
                f"{', '.join(self.signals)} have {wanted} and {wanted[:1]}"
            )
        dtype = accumulator(x.dtype)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).to(dtype).unbind(1)  # (N, H, d)
        out, signals = torch.zeros_like(v), signals.to(dtype)
        with full_precision(v):
            for voxels, there in _groups(windows):  # (w, n) each
                found = self._attend((q * self.scale)[voxels], k[voxels], v[voxels], signals[voxels], there)
                out = out.index_copy(0, voxels[there], found[there])
        return self.proj(out.flatten(1).to(x.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, signals: Tensor, there: Tensor) -> Tensor:
        """Outputs `(w, n, H, d)` of windows of n places, which are taken where `there` `(w, n)`."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (w, H, n, d)
        scores = q @ k.transpose(-1, -2)
        bins = []
        for name, step, reach, x in zip(self.signals, self.steps, self.reach, signals.split(3, -1), strict=True):
            scaled = step * x
            found = (scaled[:, :, None] - scaled[:, None] + reach).floor().long().clamp(0, 2 * reach - 1)  # w, n, n, 3
            bins.append([one[:, None].expand_as(scores) for one in found.unbind(-1)])
            for axis, at in enumerate(bins[-1]):
                ours, theirs = (self._table(of, name, axis, q) for of in ("query", "key"))  # (H, d, 2L)
                scores = scores + (q @ ours).gather(-1, at)
                scores = scores + (k @ theirs).gather(-1, at.transpose(-1, -2)).transpose(-1, -2)
        scores = scores.masked_fill(~there[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        out = weights @ v
        for name, reach, placed in zip(self.signals, self.reach, bins, strict=True):
            for axis, at in enumerate(placed):
                summed = weights.new_zeros(*weights.shape[:-1], 2 * reach).scatter_add(-1, at, weights)
                out = out + summed @ self._table("value", name, axis, q).transpose(-1, -2)
        return out.transpose(1, 2)

    def _table(self, of: str, name: str, axis: int, like: Tensor) -> Tensor:
        table: Tensor = getattr(self, f"{of}_{name}_table")
        return table[axis].permute(1, 2, 0).to(like.dtype)


class VoxelBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x).

    Args:
        dim, num_heads, options: as of `VoxelAttention`.
        mlp_ratio: width of the MLP over that of x.
        drop_path: rate of stochastic depth, of single voxels as published.
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.attn = VoxelAttention(dim, num_heads, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, signals: Tensor, windows: Tensor) -> Tensor:
        """See `VoxelAttention`."""
        if not traced(x):  # before the norm
            check_members(x, self.attn.proj.in_features, held(self.attn.proj), name="features", of="voxels", axes=2)
        x = x + self.drop_path(self.attn(self.norm1(x), signals, windows))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _groups(windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Windows of like sizes: their voxels `(w, n)`, and which of them are there; the others repeat the first."""
    order = windows.argsort(stable=True)
    counts = windows.unique(return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    kinds = counts.double().log2().ceil()  # up to twice as many places
    groups = []
    for kind in kinds.unique().tolist():
        mine = kinds == kind
        place = torch.arange(int(counts[mine].max()), device=windows.device)
        there = place < counts[mine][:, None]
        groups.append((order[starts[mine][:, None] + place.where(there, 0)], there))
    return groups
