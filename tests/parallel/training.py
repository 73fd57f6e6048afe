"""Cases of training: beside DDP and FSDP, with dropped paths, with recomputed blocks, under autocast."""

import copy
import functools
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from linsight.parallel import gather, shard_image, split
from streaming.hosts import small

from .hosts import TOLERANCE
from .layers import close, gradients_sum_to, rows

CASES = {}


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


@functools.cache
def plane():
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "rows"))


def batch(classes=5):
    return torch.randn(4, 3, 39, 26, dtype=torch.float64), torch.randint(classes, (4,))


def own_part(images, labels):
    """Half of the images, and of these a band."""
    half = slice(0, 2) if plane()["data"].get_local_rank() == 0 else slice(2, 4)
    return shard_image(images[half], plane()["rows"]), labels[half]


def stepped(model, loss, rate=0.1):
    loss.backward()
    torch.optim.SGD(model.parameters(), rate).step()


def one_step_alone(model, images, labels):
    alone = copy.deepcopy(model)
    stepped(alone, cross_entropy(alone(images), labels))
    return dict(alone.named_parameters())


@case
def data_parallel_over_all_ranks():
    model, (images, labels) = small("vit_tiny", "inline", cpe=True).double().train(), batch()
    expected = one_step_alone(model, images, labels)
    split(model, plane()["rows"])
    parallel = DistributedDataParallel(model)
    band, own = own_part(images, labels)
    stepped(model, cross_entropy(parallel(band), own))
    for name, parameter in model.named_parameters():
        close(parameter.detach(), expected[name], TOLERANCE)


def sharded(shard):
    model, (images, labels) = small("vit_tiny", "agent", cpe=True).double().train(), batch()
    expected = one_step_alone(model, images, labels)
    split(model, plane()["rows"])
    shard(model)
    band, own = own_part(images, labels)
    stepped(model, cross_entropy(model(band), own))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        close(parameter.full_tensor().detach(), expected[name], TOLERANCE)


@case
def sharded_over_all_ranks():
    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=plane())
        fully_shard(model, mesh=plane())

    sharded(shard)


@case
def sharded_along_the_other_dimension():
    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=plane()["data"])
        fully_shard(model, mesh=plane()["data"])
        for parameter in model.parameters():

            def mean_over_rows(parameter):
                dist.all_reduce(parameter.grad.to_local(), group=plane()["rows"].get_group())
                parameter.grad.to_local().div_(plane()["rows"].size())

            parameter.register_post_accumulate_grad_hook(mean_over_rows)

    sharded(shard)


@case
def paths_are_dropped_alike_and_again():
    model = small("swin_tiny", "ttt", drop_path_rate=0.6).double().train()
    model.set_grad_checkpointing()
    alone, image = copy.deepcopy(model), torch.randn(3, 3, 130, 20, dtype=torch.float64)
    torch.manual_seed(0)
    torch.manual_seed(int(torch.randint(2**62, (1,))))  # what the first rank draws for all
    expected = alone(image)
    torch.manual_seed(dist.get_rank())  # that of the first rank counts
    found = split(model, rows())(shard_image(image, rows()))
    close(found, expected, TOLERANCE)
    weight = torch.ones_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients_sum_to(model, alone, dist.get_world_size(), TOLERANCE)


@case
def a_loss_of_the_map():
    """The losses of bands add up to that of the whole map, and so do gradients, down to the pixels."""
    model, image = small("pvt_tiny", "focused", global_pool="avg").double(), torch.randn(1, 3, 130, 20).double()
    alone = copy.deepcopy(model)
    whole = image.clone().requires_grad_()
    expected = alone.forward_features(whole).permute(0, 2, 3, 1)
    expected.square().sum().backward()
    band = shard_image(image, rows()).clone().requires_grad_()
    found = split(model, rows())(band, output="map")
    close(gather(found, rows()), expected, TOLERANCE)
    found.square().sum().backward()
    close(band.grad, shard_image(whole.grad, rows()), TOLERANCE)
    gradients_sum_to(model, alone, tolerance=TOLERANCE)
    features = alone.forward_head(alone.forward_features(image), pre_logits=True)
    close(model(shard_image(image, rows()), output="features"), features, TOLERANCE)


@case
def every_parameter_has_a_gradient_on_every_rank():
    model = split(small("vit_tiny", "inline", cpe=True), rows())
    for output in ("map", "logits"):
        model.zero_grad()
        model(shard_image(torch.randn(2, 3, 39, 26), rows()), output=output).sum().backward()
        missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert missing == ({"head.weight", "head.bias"} if output == "map" else set())


@case
def one_rank_alone():
    alone = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data", "rows"))["rows"]
    model, image = small("pvt_v2_b0", "agent"), torch.randn(1, 3, 70, 40)
    expected = model(image)
    found = split(model, alone)(image)
    close(found, expected, 1e-5)
    found.sum().backward()


@case
def what_the_documentation_shows():
    text = (Path(__file__).parents[2] / "docs" / "split.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(code.replace('"cuda", (2, 4)', '"cpu", (2, 2)'), names := {"images": torch.randn(2, 3, 64, 48)})
        assert "mesh" in names


@case
def a_gathered_map():
    x = torch.arange(2 * 7 * 3, dtype=torch.float64).view(2, 7, 3)
    band = shard_image(x, rows()).clone().requires_grad_()
    whole = gather(band, rows())
    assert torch.equal(whole, x)
    (whole * x * (1 + dist.get_rank())).sum().backward()
    close(band.grad, shard_image(x, rows()) * sum(range(1, 1 + dist.get_world_size())))


@case
def autocast():
    model, image = small("vit_tiny", "inline", cpe=True), torch.randn(2, 3, 39, 26)
    alone = copy.deepcopy(model)
    exact = alone(image)
    split(model, rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = alone(image), model(shard_image(image, rows()))
    assert found.dtype == expected.dtype
    error, usual = ((x.float() - exact).abs().max() for x in (found, expected))
    assert error <= 2 * usual + 1e-3 * exact.abs().max(), (error, usual)
    found.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@case
def half_precision():
    model, image = small("vit_tiny", "agent", cpe=True).bfloat16(), torch.randn(2, 3, 39, 26).bfloat16()
    expected = model(image)
    found = split(model, rows())(shard_image(image, rows()))
    assert found.dtype == torch.bfloat16
    close(found.float(), expected.float(), 5e-2)


@case
def a_copy_is_split_too():
    model, image = small("vit_tiny", "inline"), torch.randn(2, 3, 39, 26)
    split(model, rows())
    copied = copy.deepcopy(model)
    expected = model(shard_image(image, rows()))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(shard_image(image, rows())), expected)
