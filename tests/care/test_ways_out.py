"""Hosts, and models without one, leave in every way that the table of docs/ways-out.md tells, right at every size.

Mechanisms as layers are in the matrix; here are their options, and what stands around a layer or a model.
"""

import copy
import itertools
from types import MappingProxyType

import pytest
import timm
import torch
from test_timm_ways import SMALL as VARIANTS
from torch import nn

import linsight
from linsight import catalogue
from linsight.attention import WAYS, Core, Paper, check_way, create_attention, list_attentions, register, unregister
from linsight.errors import LinsightError, UnknownNameError
from linsight.export import export_onnx
from linsight.models import ARCHITECTURES, HOSTS
from linsight.ops import Grid
from matrix import Subject, graphs, subjects
from matrix.graphs import BY_WAY, EXAMPLE, UNSEEN, OnImages, compiled, equals, exported, in_onnxruntime, traced
from test_hosts import SMALL, build
from test_matrix import named, unmet

pytestmark = [pytest.mark.timeout(300), *map(pytest.mark.filterwarnings, graphs.WARNINGS)]

# Models that take no mechanism, small.
ALONE = {name: VARIANTS[name] for name in ("steps_resnet18", "dynp_resnet18_025_t32_cifar", "overlock_xt")}
# Batch, height and width of the example, and others: oblong, odd, of one token or window, smaller, both grids prime.
PATCHES = (2, 32, 24), ((1, 40, 24), (3, 33, 17), (2, 8, 9), (1, 24, 24), (2, 56, 104))
PYRAMID = (2, 64, 96), ((1, 160, 96), (3, 67, 149), (2, 33, 30), (1, 64, 64), (2, 116, 212))
full = pytest.mark.full


def sizes(model, way=None):
    """torch.export notes of a table of positions that the example has several places a side, and refuses one alone."""
    if way is exported and model == "vit_tiny":
        return PATCHES[0], tuple(size for size in PATCHES[1] if min(size[1:]) > 8)
    return PATCHES if model in ("vit_tiny", "compact_pico") else PYRAMID


def shallow(host, attention="inline,softmax", **arguments):
    """Two stages, or two blocks, each with its mechanism; in Swin, each stage has a shifted window, too."""
    small = SMALL[host]
    if "stages" in small and host != "compact_pico":
        first, *_, last = small["stages"]
        arguments["stages"] = [(dim, 1, *rest) for dim, _, *rest in (first, last)]
    elif "depths" in small:
        arguments |= {key: small[key][:2] for key in ("num_heads", "embed_dims") if key in small}
        arguments["depths"] = (2, 2) if host.startswith("swin") else (1, 1)
    elif host == "vit_tiny":
        arguments["depth"] = 2
        attention = attention.replace(",", ":1/")
    return build(host, attention, **arguments).eval()


def make(model):
    return shallow(model) if model in SMALL else linsight.create_model(model, num_classes=7, **ALONE[model]).eval()


def kind(model):
    return (HOSTS if model in HOSTS else ARCHITECTURES)[model].model_cls


def leaves(way, model, example, others, channels=3):
    """A graph that was made with an example answers others as the model does."""
    batch, *size = example
    equals(way(model, torch.randn(batch, channels, *size)), model, channels, others)


CELLS = [
    pytest.param(
        model,
        way,
        marks=[
            *([] if way == "trace" and model in SMALL else [full]),  # others take up to a minute each
            *unmet(getattr(kind(model), "unmet", {}).get(way)),
        ],
    )
    for model, way in itertools.product((*SMALL, *ALONE), WAYS)
]


def test_the_table_is_the_list_of_checks():
    assert list(BY_WAY) == list(graphs.CHECKS) == list(WAYS)
    every = {entry.model_cls for entry in (*HOSTS.values(), *ARCHITECTURES.values())}
    assert {kind(model) for model in (*SMALL, *ALONE)} == every
    reasons = [entry.unmet for entry in list_attentions()] + [getattr(one, "unmet", {}) for one in every]
    assert all(way in WAYS for reason in reasons for way in reason)
    assert sum("onnx" in reason for reason in reasons) <= len(reasons) // 20


@pytest.mark.parametrize(("model", "way"), CELLS)
def test_models(model, way):
    leaves(BY_WAY[way], make(model), *sizes(model, BY_WAY[way]))


@full
@pytest.mark.parametrize("attention", ["inline,softmax", "agent,focused"])
@pytest.mark.parametrize("host", SMALL)
def test_forms_for_inference(host, attention):
    leaves(in_onnxruntime, linsight.fuse(shallow(host, attention)), *sizes(host))


@full
@pytest.mark.parametrize("way", (exported, in_onnxruntime), ids=named)
@pytest.mark.parametrize("host", SMALL)
def test_features(host, way):
    """All maps, as separate outputs."""
    leaves(way, shallow(host, features_only=True, out_indices=(0, 1)), *sizes(host, way))


@full
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=unmet(kind(n).unmet["onnx"]) if n == "overlock_xt" else []) for n in VARIANTS]
)
def test_variants(name):
    example, others = PYRAMID if "img_size" not in VARIANTS[name] or VARIANTS[name]["img_size"] > 32 else PATCHES
    leaves(in_onnxruntime, timm.create_model(name, **VARIANTS[name]).eval(), example, others)


OPTIONS = [subject for subject in subjects(variants=True) if subject.options]


@full
@pytest.mark.parametrize("subject", OPTIONS, ids=str)
def test_options(subject):
    leaves(in_onnxruntime, OnImages(subject.layer()).eval(), EXAMPLE, UNSEEN, 16)


CAUSAL = [entry.name for entry in list_attentions(causal=True)]


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=full) for way in (compiled, in_onnxruntime)), traced])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_layers(name, way):
    leaves(way, OnImages(create_attention(name, 16, 2, causal=True)).eval(), EXAMPLE, UNSEEN, 16)


class Beside(nn.Module):
    """A layer and what may be beside its tokens, made of an image: prefix tokens, dropped ones, another sequence."""

    def __init__(self, name, beside):
        super().__init__()
        self.layer, self.beside = Subject(name).layer(), beside

    def forward(self, x):
        grid, tokens = Grid(*x.shape[2:]), x.flatten(2).transpose(1, 2)
        if self.beside == "prefix":
            return self.layer(torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1), grid._replace(prefix=1))
        if self.beside == "keep":
            seen = (tokens[..., 0] > -0.5) | (torch.arange(tokens.shape[1]) == 0)
            return self.layer(tokens, grid, keep=seen)
        other = torch.cat([tokens, 2 * tokens], dim=1)
        return self.layer(tokens, grid, context=other, context_layout=Grid(2 * grid.height, grid.width))


@full
@pytest.mark.parametrize(
    ("name", "beside"),
    [(entry.name, beside) for beside in ("prefix", "keep", "cross") for entry in list_attentions(**{beside: True})],
)
def test_what_is_beside_the_tokens(name, beside):
    leaves(in_onnxruntime, Beside(name, beside).eval(), EXAMPLE, UNSEEN, 16)


# One image is the example of most users.
@pytest.mark.parametrize(
    "subject", [pytest.param(s, marks=[] if s.name == "linear" else [full]) for s in subjects()], ids=str
)
def test_layers_of_one_image(subject):
    leaves(in_onnxruntime, OnImages(subject.layer()).eval(), (1, *EXAMPLE[1:]), UNSEEN, 16)


@full
@pytest.mark.parametrize("host", SMALL)
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (131, 97)])
def test_the_size_of_the_example_does_not_matter(host, size):
    """Several windows or one, one token in the last stage, both sides odd."""
    if host == "pvt_v2_b0" and size == (32, 32):
        pytest.skip("torch takes its one key for a constant: linsight's own exports have larger examples")
    _, others = sizes(host)
    leaves(in_onnxruntime, shallow(host), (1, *size), others)


@pytest.mark.parametrize("host", ["vit_tiny", pytest.param("compact_pico", marks=full)])
def test_named_dimensions(host):
    """With names, the least side is told, from which on there is more than one token."""
    (batch, *size), others = sizes(host)
    dims = {0: torch.export.Dim("batch"), **{i: torch.export.Dim(f"side{i}", min=min(size)) for i in (2, 3)}}
    model = shallow(host)
    program = torch.export.export(model, (torch.randn(batch, 3, *size),), dynamic_shapes=(dims,))
    equals(program.module(), model, 3, [shape for shape in others if shape[0] > 1 and min(shape[1:]) >= min(size)])


HALVES = [pytest.param(subject, marks=[] if subject.name == "linear" else [full]) for subject in subjects()]


@pytest.mark.parametrize("subject", HALVES, ids=str)
def test_half_precision(subject):
    """In onnxruntime a float16 layer is as near to float32 as the layer itself: sums are in float32.

    Where outputs jump, most of them are: projections may be rounded otherwise there.
    """
    largest = torch.median if getattr(subject.entry.factory, "steps", "") else torch.max
    layer = OnImages(subject.layer()).eval().half()
    wide = copy.deepcopy(layer).float()
    run = in_onnxruntime(layer, torch.randn(EXAMPLE[0], 16, *EXAMPLE[1:]).half())
    for batch, *size in UNSEEN:
        x = torch.randn(batch, 16, *size).half()
        with torch.no_grad():
            right, own, found = wide(x.float()), layer(x), run(x)
        errors = [largest((out.float() - right).abs()).item() for out in (found, own)]
        assert found.dtype == torch.float16
        assert errors[0] <= 2 * errors[1] + 1e-3 * right.abs().max().item(), (batch, *size)


@pytest.fixture
def refused():
    """A mechanism that says why it does not leave in one way."""

    @register("toy_refused", formula="v", complexity="O(N d)", paper=Paper("None"))
    class Refused(Core):
        """The values."""

        unmet = MappingProxyType({"onnx": "it has an operator of its own"})

        def __init__(self, dim, num_heads, *, device=None, dtype=None):
            super().__init__()
            self.num_heads = num_heads

        def forward(self, tokens, layout, *, context_layout=None):
            return tokens.v

    yield "toy_refused"
    unregister("toy_refused")


def test_a_reason_is_shown_and_given(refused, tmp_path, linsight):
    row = catalogue.mechanism_info(refused)
    assert row["ways"] == {**dict.fromkeys(WAYS.values(), "yes"), "ONNX": "it has an operator of its own"}
    code, out, _ = linsight("info", refused)
    assert code == 0 and "does not leave by" in out and "ONNX: it has an operator of its own" in out
    shown = next(line for line in linsight("list", "--mechanisms")[1].splitlines() if refused in line)
    assert shown.split()[-1] == "ONNX"
    model = build("vit_tiny", f"{refused}:1/softmax", class_token=False, global_pool="avg").eval()
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    path = tmp_path / "model.onnx"
    with pytest.raises(LinsightError, match=r"no ONNX of this model: it has an operator of its own; it leaves by: "):
        export_onnx(model, path)
    assert not list(tmp_path.iterdir())
    check_way(model, "export")


def test_a_way_that_is_none(refused):
    with pytest.raises(UnknownNameError, match="did you mean 'onnx'"):
        register("toy_typo", formula="v", complexity="O(N d)", paper=Paper("None"))(
            type("Typo", (Core,), {"unmet": {"onx": "no"}})
        )
