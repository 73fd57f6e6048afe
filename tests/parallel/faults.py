"""Cases of what is refused, on all ranks alike, and of ranks that die."""

import functools
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from linsight import Grid, Layout, create_attention
from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.parallel import gather, shard_image, split
from streaming.hosts import small

from .layers import rows

IMAGE = torch.zeros(1, 3, 39, 26)
CASES = {}


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


def one_line(kind, words, function, *arguments, **more):
    """The error that is raised says this in one line, and leaves the ranks able to go on."""
    try:
        function(*arguments, **more)
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"no {kind.__name__} that says {words}")
    assert "\n" not in message
    for word in words:
        assert word in message, message


def layer(name="inline", **options):
    return split(create_attention(name, 16, 2, **options), rows())


@case
def who_cannot_is_told_who_can():
    for module, words in (
        (create_attention("softmax", 16, 2), ["inline"]),
        (create_attention("linear", 16, 2, causal=True), ["causal"]),
        (create_attention("linear", 16, 2, reduction=2), ["reduction=1"]),
        (small("vit_tiny", "softmax"), ["inline"]),
        (small("swin_tiny", "inline", attention_window=3), ["windows"]),
        (nn.Conv2d(3, 3, 3), ["vit", "mlla"]),
    ):
        one_line(CapabilityError, words, split, module, rows())
        assert all("forward" not in vars(part) for part in module.modules())
    model = split(small("vit_tiny", "inline", global_pool="max", class_token=False), rows())
    one_line(CapabilityError, ["output='map'"], model, shard_image(IMAGE, rows()))


@case
def what_a_layer_is_not_asked_for():
    x, grid = torch.zeros(1, 6, 16), Grid(2, 3)
    for more in ({"keep": torch.ones(1, 6, dtype=torch.bool)}, {"context": x, "context_layout": grid}):
        one_line(CapabilityError, ["split", next(iter(more))], layer("efficient"), x, grid, **more)
    one_line(CapabilityError, ["split"], layer(), x, Layout(grid, sizes=torch.tensor([[2, 2]])))
    one_line(LinsightError, ["(1, 6, 16)"], layer(), x, Grid(2, 2))


@case
def bad_calls():
    model = split(small("vit_tiny", "inline"), rows())
    one_line(LinsightError, ["split already"], split, model, rows())
    one_line(LinsightError, ["split already"], split, model.blocks[0].attn, rows())
    one_line(LinsightError, ["call what was given"], model.forward_features, IMAGE)
    one_line(UnknownNameError, ["output", "map"], model, IMAGE, output="mop")
    one_line(LinsightError, ["(3, 39, 26)"], model, IMAGE[0])
    flat = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "rows"))
    one_line(LinsightError, ["mesh['rows']"], split, small("vit_tiny", "inline"), flat)


@case
def bands_that_do_not_fit():
    model, rank = split(small("vit_tiny", "inline"), rows()), dist.get_rank()
    one_line(LinsightError, ["differ in width", "26"], model, torch.zeros(1, 3, 8, 26 + 4 * rank))
    one_line(LinsightError, ["differ in batch", "1, 2"], model, torch.zeros(1 + rank, 3, 8, 26))
    one_line(
        LinsightError, ["differ in dtype"], model, torch.zeros(1, 3, 8, 26, dtype=(torch.half, torch.float)[rank % 2])
    )
    one_line(LinsightError, ["a row or more", "0"], model, torch.zeros(1, 3, 8 * (rank > 0), 26))
    one_line(LinsightError, ["1 rows", "at most 1"], model, torch.zeros(1, 3, 1, 26))
    one_line(LinsightError, ["3 rows", "at most 3"], shard_image, IMAGE[..., :3, :], rows())
    one_line(LinsightError, ["axis 2", "5, 6"], gather, torch.zeros(1, 2, 5 + rank), rows())


@case
def what_cannot_be_random_alike():
    for host, words, more in (
        ("h_vit_tiny", ["batch norm", ".eval()"], {}),
        ("vit_tiny", ["dropout", "drop_path_rate"], {"drop_rate": 0.1}),
    ):
        model = split(small(host, "inline", **more), rows())
        one_line(CapabilityError, words, model.train(), shard_image(IMAGE, rows()))


def dying(backward):
    """Rank 2 ends in the middle; the others say so at once, or at the latest when the group's timeout is over."""
    model, rank = split(small("vit_tiny", "inline"), rows()), dist.get_rank()

    def end(*_):
        if rank == 2:
            os._exit(1)

    block = model.blocks[1 - backward]
    (block.register_full_backward_hook if backward else block.register_forward_pre_hook)(end)
    started, found = time.monotonic(), []

    def run():
        found.append(model(shard_image(IMAGE, rows())))
        found.pop().sum().backward()

    one_line(LinsightError, ["rank", "'rows'", "lost the others"], run)
    assert not found
    assert time.monotonic() - started < 30


DYING = {"in a forward pass": functools.partial(dying, False)}
DYING_LATER = {"in a backward pass": functools.partial(dying, True)}
