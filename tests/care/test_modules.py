"""A module that holds parameters is called: hooks, pruning and parametrizations run, in layers and in hosts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map

import linsight
from linsight.convert import MultiheadAttention
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver, Latents, Network
from linsight.models.hosts.steps_resnet import StepsResNet
from linsight.ops import Grid
from matrix import subjects
from test_hosts import SMALL, build

GRID = Grid(4, 6)


class Low(nn.Module):
    """A low-rank addition, as LoRA's."""

    def __init__(self, weight):
        super().__init__()
        flat = weight.detach().flatten(1)
        self.down = nn.Parameter(torch.randn(2, flat.shape[1]) * 0.1)
        self.up = nn.Parameter(torch.randn(flat.shape[0], 2) * 0.1)

    def forward(self, weight):
        return weight + (self.up @ self.down).view(weight.shape)


WAYS = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "lora": lambda module: parametrize.register_parametrization(module, "weight", Low(module.weight)),
}


def layers():
    """Those that have parameters."""
    found = [s for s in subjects() if next(s.layer(device="meta").parameters(), None) is not None]
    return [pytest.param(lambda s=s: s.layer(), id=str(s)) for s in found]


def adapted(attention):
    """Our module in the place of torch's, called as a layer is."""

    class Called(MultiheadAttention):
        def forward(self, x, grid):
            return super().forward(x, x, x, grid=grid)[0]

    return Called(16, 2, attention=attention, grid=(4, 6), batch_first=True)


def others():
    models = {
        "dyn_perceiver": lambda: DynamicPerceiver(Network("resnet18", 0.125), Latents(16, (0.3,) * 4), num_classes=7),
        "steps_resnet": lambda: StepsResNet("basic", [[(8, 1), (16, 1)]] * 4, num_classes=7),
    }
    models |= {f"torch-{name}": lambda name=name: adapted(name) for name in ("softmax", "agent")}
    return [pytest.param(make, id=name) for name, make in models.items()]


def hosts():
    names = [
        *((host, "inline") for host in SMALL),
        ("vit_tiny", "agent"),
        ("pvt_v2_b0", "softmax"),
        ("swin_tiny", "softmax"),
    ]
    return [pytest.param(lambda h=h, a=a: build(h, a), id=f"{h}-{a}") for h, a in names]


MAKES = [*layers(), *hosts(), *others()]
makes = pytest.mark.parametrize("make", MAKES)


def makes_by_turns():
    """Every module pruned, and made in another way by turns; in all ways by `pytest -m full`."""
    for turn, make in enumerate(MAKES):
        for place, way in enumerate(WAYS):
            marks = [] if place in (0, 1 + turn % (len(WAYS) - 1)) else pytest.mark.full
            yield pytest.param(*make.values, way, id=f"{make.id}-{way}", marks=marks)


def run(module, seed=0):
    if hasattr(module, "in_chans"):
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        if isinstance(module, DynamicPerceiver):
            return torch.cat([found.logits for found in module.exits(x)], dim=1)
        return module(x)
    return module(torch.randn(2, GRID.tokens, 16, generator=torch.Generator().manual_seed(seed)), GRID)


def reshaped(module, way, seed):
    """Every weight of two or more axes is made by `way`; and all parameters are other ones."""
    torch.manual_seed(seed)
    for part in list(module.modules()):
        weight = part._parameters.get("weight")
        if weight is not None and weight.ndim > 1:
            with torch.no_grad():
                weight.add_(0.1 * torch.randn_like(weight))
            WAYS[way](part)
    return module


@pytest.mark.parametrize(("make", "way"), [*makes_by_turns()])
def test_weights_that_are_made_in_each_call(make, way):
    """Two steps of training, each of which has an effect; a state dict gives the same outputs in another one."""
    model, other = reshaped(make(), way, 1), reshaped(make(), way, 2)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run(other.eval()), run(model.eval()))


@makes
def test_hooks_fire_and_what_they_give_is_used(make):
    """Of every module with parameters of its own; of a class token, what only other tokens read in the last block."""
    model = make().eval()
    for parameter in model.parameters():  # what starts as zero would hide what goes through it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before = run(model)
        for name, module in model.named_modules():
            if not any(p is not None for p in module._parameters.values()) or module is model:
                continue
            fired = []

            def hook(module, args, out, fired=fired):
                fired.append(module)
                return tree_map(lambda tensor: tensor + torch.randn_like(tensor), out)

            handle = module.register_forward_hook(hook)
            after = run(model)
            handle.remove()
            assert fired, f"{name} is not called"
            unread = getattr(model, "has_class_token", False) or getattr(model, "class_token", False)
            assert not torch.equal(after, before) or unread, f"{name} is not used"


@pytest.mark.parametrize("way", ["pruned", "lora"])
@pytest.mark.parametrize("host", SMALL)
def test_fused_models_have_the_weights_of_now(host, way):
    model = reshaped(build(host, "inline"), way, 1).eval()
    with torch.no_grad():
        wanted = run(model)
        torch.testing.assert_close(run(linsight.fuse(model)), wanted, rtol=1e-4, atol=1e-5)
        for name, tensor in model.state_dict().items():
            if name.endswith(("weight_orig", "original")):
                tensor.mul_(1.5)
        torch.testing.assert_close(run(linsight.fuse(model)), run(copy.deepcopy(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="this torch has it no more")
@makes
def test_linear_layers_in_int8_are_called(make):
    """Those that torch has quantized, whose weight is a method."""
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        wanted = run(module)
        small = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
        found = run(small)
    assert found.isfinite().all() and (found - wanted).norm() <= 0.7 * wanted.norm()  # rounded coarsely
