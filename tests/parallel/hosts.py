"""Cases of hosts on bands of rows."""

import copy
import functools
import itertools

import torch
import torch.distributed as dist

from linsight.parallel import shard_image, split
from streaming.hosts import SMALL, small

from .layers import close, gradients_sum_to, rows

CASES = {}
TOLERANCE = 1e-6  # timm resamples position tables in float32
# Mechanisms of one round and of two, with and without tables, a gate and a halo of their own, in turn.
_OF_HOST = dict(zip(SMALL, itertools.cycle(["inline", "agent", "mlla", "focused", "ttt"]), strict=False))


def share(image, heights):
    """This rank's rows, of `heights` or as even as can be."""
    if heights is None:
        return shard_image(image, rows())
    bounds = [0, *itertools.accumulate(heights)]
    return image[..., bounds[dist.get_rank()] : bounds[dist.get_rank() + 1], :]


def model_as_one(model, image, heights=None):
    """Logits, equal on every rank, and the mean of the ranks' gradients."""
    model, image = model.double(), image.double()
    alone, world = copy.deepcopy(model), dist.get_world_size()
    expected = alone(image)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    found = split(model, rows())(share(image, heights))
    close(found, expected, TOLERANCE)
    same = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(same, found.detach())
    assert all(torch.equal(other, found) for other in same)
    (found * weight).sum().backward()
    gradients_sum_to(model, alone, world, TOLERANCE)
    with torch.inference_mode():  # where other forms of the same run
        close(model(share(image, heights)), expected, TOLERANCE)


_SMALL_IMAGES = ((39, 26), {2: (9, 30), 4: (3, 20, 1, 15)})
_IMAGES = ((131, 29), {2: (50, 81), 4: (3, 40, 1, 87)})


def host(name, attention, even, arguments):
    size, heights = _SMALL_IMAGES if name in ("vit_tiny", "compact_pico") else _IMAGES
    model = small(name, attention, **arguments)
    model_as_one(model, torch.randn(2, 3, *size), None if even else heights[dist.get_world_size()])


for _i, _name in enumerate(SMALL):
    CASES[f"host {_name}"] = functools.partial(host, _name, _OF_HOST[_name], _i % 2 == 0, {})
for _words, _arguments in {
    "siamese": {"norm": "siamese", "cpe": True},
    "steps": {"steps": [(8, 1), (16, 1)]},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "pre_norm": True, "cpe": True},
    "patches": {"patch_size": (4, 6), "global_pool": "avg"},
    "border": {"border": 1, "global_pool": "avg"},
}.items():
    CASES[f"vit {_words}"] = functools.partial(host, "vit_tiny", "inline", False, _arguments)
CASES["pvt class token"] = functools.partial(host, "pvt_tiny", "inline", False, {"global_pool": "token"})
