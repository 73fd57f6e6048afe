"""Files of converted attention alone: LinFusion's folders, CLEAR's tensors that differ; and T5 in a model of timm's."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import linsight
from golden import cases
from golden.builders.clear import TRAINED, rotary
from golden.spec import tensor
from linsight.convert import converted_layers, linearize, load_converted, new_parameters
from linsight.convert.conversion import mixings
from linsight.convert.mixing import Mixing
from linsight.convert.place import Place
from linsight.convert.seams.diffusers_processors import Flux
from linsight.errors import CapabilityError, CheckpointError, LinsightError, UnknownNameError
from linsight.ops import Grid
from small_diffusion import answer, batch, close, made

flux_of = pytest.importorskip("diffusers.models.transformers.transformer_flux")

SELF = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "mid_block.attentions.0"]
SELF = [f"{name}.transformer_blocks.0.attn1" for name in SELF]


def linfusion(mid_dim=0):
    """The layers, tensors and table of a published LinFusion of the small U-Net, with maps that matter."""
    unet = made("sd15")
    layers, tensors, table = {}, {}, []
    for number, name in enumerate(reversed(SELF)):  # numbered as the file likes
        width, heads = unet.get_submodule(name).query_dim, unet.get_submodule(name).heads
        inside = width // 4 if mid_dim is None else mid_dim  # of each layer its own
        layer = linsight.create_attention("linfusion", width, heads, mid_dim=inside, qkv_bias=False)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        layers[name] = layer.eval()
        tensors |= {f"{number}.{key}": tensor for key, tensor in linsight.export_published(layer).items()}
        table.append({"module_name": name, "dim_n": width, "heads": heads, "projection_mid_dim": inside or None})
    return unet, layers, tensors, table


def folder(path, tensors, table):
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path / "diffusion_pytorch_model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": table}))
    return path


# ---- LinFusion


@pytest.mark.parametrize("mid_dim", [0, None, -1])
def test_a_folder_of_linfusion_says_how_it_is_converted(mid_dim, tmp_path):
    """Each attention then answers as the published layer: in the U-Net, with its grid and number of heads."""
    unet, layers, tensors, table = linfusion(mid_dim)
    converted = load_converted(unet, folder(tmp_path, tensors, table))
    assert not mixings(unet) and {row.attention for row in converted_layers(converted).values()} == {"linfusion"}
    seen = {}
    for name in SELF:
        module = converted.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    answer(converted, batch("sd15", 10, 12))
    for name, layer in layers.items():
        x, out = seen[name]
        with torch.no_grad():
            close(out, layer(x, Grid(1, x.shape[1])))


def test_a_state_dict_of_linfusion_comes_with_its_table(tmp_path):
    unet, _, tensors, table = linfusion()
    given = batch("sd15")
    expected = answer(load_converted(unet, folder(tmp_path, tensors, table)), given)
    close(answer(load_converted(unet, tensors, modules=table), given), expected, 0)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    close(answer(load_converted(unet, file), given), expected, 0)
    converted = linearize(unet, "linfusion")
    assert load_converted(converted, file, in_place=True) is converted
    close(answer(converted, given), expected, 0)
    with pytest.raises(CheckpointError, match="has numbered attentions: pass modules="):
        load_converted(unet, tensors)


def test_a_converted_unet_starts_without_the_maps():
    """Until they are trained, a new LinFusion is the bare formula on what it inherits; the maps learn."""
    converted, given = linearize(made("sd15"), "linfusion"), batch("sd15")
    bare = linearize(made("sd15"), "linfusion")
    for mixing in mixings(bare).values():
        mixing.map_q = mixing.map_k = None
    close(answer(converted, given), answer(bare, given), 0)
    converted(**given).sample.square().mean().backward()
    learnt = new_parameters(converted)
    assert all(any(key.endswith(f"{part}.3.weight") for key in learnt) for part in ("map_q", "map_k"))
    assert all(learnt[key].grad.abs().max() > 0 for key in learnt if key.endswith("3.weight"))


def test_where_tokens_cannot_be_mapped_first_it_is_refused():
    for model in (made("flux"), made("sd3"), timm.create_model("vit_tiny_patch16_224", depth=1)):
        with pytest.raises(CapabilityError, match="'linfusion' maps tokens before queries and keys are projected"):
            linearize(model, "linfusion")


def broken(tensors, table, what):
    if what == "strange":
        tensors["0.gate.weight"] = torch.ones(1)
    elif what == "lacks":
        del tensors["1.to_k_.3.bias"]
    elif what == "lacks more":
        del tensors["1.to_q.weight"]
    elif what == "shape":
        tensors["2.to_v.weight"] = torch.ones(8, 9)
    elif what == "mid_dim":
        table[0]["projection_mid_dim"] = 3
    elif what == "heads":
        table[1]["heads"] = 8
    elif what == "rows":
        del table[3]
    elif what == "mixed":
        tensors["to_q.weight"] = torch.ones(1)
    elif what == "table":
        table[0] = {"module_name": 3}
    elif what == "inside":
        table[2]["projection_mid_dim"] = "all"
    elif what == "name":
        table[0]["module_name"] += "x"


@pytest.mark.parametrize(
    ("what", "kind", "match"),
    [
        ("strange", CheckpointError, r"has 1 tensors \(.*gate.weight\) that the model has no place for"),
        ("lacks", CheckpointError, r"lacks 1 tensors \(.*map_k.3.bias\), which the converted model has"),
        ("lacks more", CheckpointError, r"lacks 1 tensors \(.*attn1.to_q.weight\)"),
        ("shape", CheckpointError, r"1 tensors \(.*to_v.weight\) have other shapes, \(8, 9\) and here \(8, 8\)"),
        ("mid_dim", CheckpointError, "is of another model: .* have other shapes"),
        ("heads", CheckpointError, "has 8 heads, in the model 2"),
        ("rows", CheckpointError, "has an attention 3, but its table has 3 rows"),
        ("mixed", CheckpointError, "has numbered attentions, and beside them 'to_q.weight'"),
        ("table", CheckpointError, "pass modules="),
        ("inside", CheckpointError, "pass modules="),
        ("name", UnknownNameError, "attention layer '.*attn1x'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(what, kind, match):
    unet, _, tensors, table = linfusion()
    broken(tensors, table, what)
    old = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with pytest.raises(kind, match=match) as caught:
        load_converted(unet, tensors, modules=table)
    assert "\n" not in str(caught.value)
    assert not mixings(unet) and all(torch.equal(tensor, old[key]) for key, tensor in unet.state_dict().items())


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_converted(made("sd15"), tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_converted(made("sd15"), tmp_path / "nothing.safetensors")


# ---- CLEAR


def changed(flux):
    """The tensors of a converted FLUX that a published file holds, with other values."""
    state = linsight.export_published(flux)
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    kept = {key for key in state if any(f".{end}." in key for end in ends) or key.endswith("spatial_weight")}
    return {key: state[key] + 0.1 * torch.randn_like(state[key]) for key in sorted(kept)}


@pytest.mark.parametrize("options", [{}, {"down_factor": 2}], ids=str)
def test_clear_holds_what_differs_from_flux(options, tmp_path):
    flux, given = linearize(made("flux"), "clear", radius=2, **options), batch("flux", 4, 6)
    tensors = changed(flux)
    names = {key.rpartition("attn.")[2] for key in tensors}
    assert ("processor.spatial_weight" in names) == bool(options) and "to_out.0.bias" in names
    save_file(tensors, tmp_path / "clear.safetensors")
    loaded = load_converted(flux, tmp_path / "clear.safetensors")
    assert not torch.allclose(answer(loaded, given), answer(flux, given), atol=1e-4)
    exported = linsight.export_published(loaded)
    old = linsight.export_published(flux)
    assert all(torch.equal(tensor, tensors.get(key, old[key])) for key, tensor in exported.items())


def test_clear_of_another_conversion_is_refused():
    flux, pooled = made("flux"), linearize(made("flux"), "clear", down_factor=2)
    tensors = changed(pooled)
    with pytest.raises(LinsightError, match="does not tell how its model was converted: do so first"):
        load_converted(flux, tensors)
    with pytest.raises(CheckpointError, match=r"has 3 tensors \(.*spatial_weight.*no place for: .*down_factor="):
        load_converted(linearize(flux, "clear"), tensors)
    plain = {key: tensor for key, tensor in tensors.items() if "spatial_weight" not in key}
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors \(.*core.spatial_weight"):
        load_converted(pooled, plain)
    with pytest.raises(CheckpointError, match=r"tensors \(single.*\) outside of the attentions that were converted"):
        load_converted(linearize(flux, "clear", layers=[0]), plain)
    few = {key: tensor for key, tensor in plain.items() if key.startswith("transformer_blocks")}
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors \(single_transformer_blocks.0.attn"):
        load_converted(linearize(flux, "clear"), few)


@pytest.mark.parametrize("name", [name for name in cases.names(models=False) if name.startswith("clear/")])
def test_published_numbers_of_clear_in_the_attention_of_diffusers(name):
    """The golden cases, by the class of diffusers, its rotary embedding and our processor."""
    spec, recorded = cases.load(name)
    config, inputs = spec["config"], {entry["name"]: tensor(entry["shape"], entry["name"]) for entry in spec["inputs"]}
    dim, heads, grid = config["dim"], config["heads"], (config["height"], config["width"])
    double = {"added_kv_proj_dim": dim, "context_pre_only": False} if config["double_stream"] else {"pre_only": True}
    attn = flux_of.FluxAttention(dim, heads, dim // heads, bias=True, out_dim=dim, eps=1e-6, **double)
    proportional = TRAINED if config["proportional_attention"] else 0
    options = {"radius": config["window_size"], "down_factor": config["down_factor"], "proportional": proportional}
    attn.set_processor(Flux(Mixing("clear", dim, heads, **options), Place(grid)))
    state = {key.partition(".")[2]: value for key, value in cases.published_state(spec).items() if key[:5] == "attn."}
    state |= {f"processor.{key[5:]}": value for key, value in cases.published_state(spec).items() if key[:5] == "proc."}
    linsight.load_published(attn, state)
    rope = config["rope"]
    places = rope and rotary(*grid, config["text_length"], rope["theta"], rope["axes_dim"])
    with torch.no_grad():
        out = attn(inputs["input"], inputs.get("text"), image_rotary_emb=places)
    found = zip(("image", "text"), out, strict=True) if config["double_stream"] else [("output", out)]
    for key, value in found:
        close(value, recorded[key], cases.TOLERANCE)


# ---- T5


def test_a_published_t5_loads_into_a_converted_vit():
    """By `load_published` as it is: names of the mechanism stand among those of the attention, there and here."""
    ours = linsight.create_model("t5_tiny", img_size=32, num_classes=5).eval()
    state = linsight.export_published(ours)
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, num_classes=5, class_token=False, global_pool="avg", fc_norm=False
    )
    converted = linearize(vit.eval(), "t5")
    assert "blocks.3.attn.w1" in state
    report = linsight.load_published(converted, state)
    assert "blocks.3.attn.mixing.core.w1" in report.loaded
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(converted(images), ours(images))
    assert linsight.export_published(converted).keys() == state.keys()
