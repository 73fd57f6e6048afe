"""Models of diffusers, small and random: softmax of ours is theirs, and grids, texts and masks arrive."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import linsight
from linsight import Grid
from linsight.convert import (
    converted_layers,
    distil_layers,
    layer_errors,
    linearize,
    load_linearized,
    new_parameters,
    save_linearized,
)
from linsight.convert.conversion import attentions, mixings
from linsight.errors import CapabilityError, LinsightError
from small_diffusion import MODELS, TEXT, answer, batch, close, diffusers, made, places, sd15

theirs = pytest.importorskip("diffusers.models.attention_processor")
flux_of = pytest.importorskip("diffusers.models.transformers.transformer_flux")

SIZES = {"dit": [(8, 8)], "ddpm": [(8, 8), (6, 20)]}  # DiT's outputs are square, and levels of this U-Net even
CASES = [(name, *size) for name in MODELS for size in SIZES.get(name, [(8, 8), (10, 6), (9, 13)])]


def seen_grids(model, given):
    """The grid that each mechanism is given, by the name of its attention."""
    found, handles = {}, []
    for name, mixing in mixings(model).items():

        def hook(module, args, kwargs, out, name=name):
            found[name] = args[4]

        handles.append(mixing.register_forward_hook(hook, with_kwargs=True))
    answer(model, given)
    for handle in handles:
        handle.remove()
    return found


def processors(model):
    """Those of all attentions, by the name of these."""
    found = {name: getattr(module, "processor", None) for name, module in model.named_modules()}
    return {name: processor for name, processor in found.items() if processor is not None}


def adjust(model, given):
    model(**given).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- the same function


@pytest.mark.parametrize(("name", "height", "width"), CASES)
def test_with_softmax_a_model_is_the_old_one(name, height, width):
    """Outputs and gradients, of latents that are square, not square, and odd."""
    model, given = made(name), batch(name, height, width)
    converted = linearize(model, "softmax")
    close(answer(converted, given), answer(model, given))
    ours, old = adjust(converted, given), adjust(model, given)
    assert ours.keys() == old.keys()
    for key, gradient in old.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_self_attention_is_what_is_converted(name):
    model = made(name)
    found = list(attentions(model))
    converted = linearize(model, "hedgehog")
    assert list(mixings(converted)) == found and list(converted_layers(converted)) == found
    assert not mixings(model)
    old, new = processors(model), processors(converted)
    others = {name for name, processor in new.items() if not isinstance(processor, nn.Module)}
    assert others == old.keys() - set(found)
    assert all(name.endswith("attn2") for name in others)
    assert bool(others) == (name in ("pixart", "sd15", "sdxl"))


@pytest.mark.parametrize("name", MODELS)
def test_a_mechanism_runs_learns_and_is_kept(name):
    """Forward, backward, a deep copy, and the state dict in another conversion of the same model."""
    model, given = made(name), batch(name)
    converted = linearize(model, "hedgehog")
    for parameter in new_parameters(converted).values():
        nn.init.normal_(parameter, std=0.3)
    out = answer(converted, given)
    assert not torch.allclose(out, answer(model, given), atol=1e-4)
    gradients = adjust(converted, given)
    learnt = new_parameters(converted)
    assert learnt and all(key.partition(".processor.mixing.core.")[2] for key in learnt)
    assert all(gradients[key].isfinite().all() and gradients[key].abs().max() > 0 for key in learnt)
    twin = copy.deepcopy(converted)
    answer(twin, batch(name, *((8, 8) if name == "dit" else (4, 12))))  # has a place of its own
    close(answer(converted, given), out, 0)
    other = linearize(MODELS[name]().eval(), "hedgehog")
    other.load_state_dict(converted.state_dict())
    close(answer(other, given), out, 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_tells_how_its_model_is_built(name, tmp_path):
    converted, given = linearize(made(name), "hedgehog"), batch(name)
    save_linearized(converted, tmp_path)
    loaded = load_linearized(tmp_path)
    assert type(loaded) is type(converted) and converted_layers(loaded) == converted_layers(converted)
    close(answer(loaded, given), answer(converted, given), 0)


def test_a_folder_of_no_model_of_diffusers(tmp_path):
    save_linearized(linearize(made("dit"), "linear"), tmp_path)
    table = tmp_path / "linearized.json"
    table.write_text(table.read_text().replace("DiTTransformer2DModel", "DiffusionPipeline"))
    with pytest.raises(LinsightError, match="has no model 'DiffusionPipeline'"):
        load_linearized(tmp_path)


def test_processors_are_set_as_ever():
    """A dict of all of them goes back in; one of diffusers' own in the place of ours brings softmax back."""
    model, given = made("sd15"), batch("sd15")
    converted = linearize(model, "inline")
    out = answer(converted, given)
    ours = dict(converted.attn_processors)
    assert {f"{name}.processor" for name in mixings(converted)} <= ours.keys()
    converted.set_attn_processor(theirs.AttnProcessor2_0())
    assert not mixings(converted)
    close(answer(converted, given), answer(model, given))
    converted.set_attn_processor(ours)
    close(answer(converted, given), out, 0)


@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("name", ["sd15", "ddpm"])
def test_other_softmax_processors_are_taken_over(name, processor):
    """These have the scale of the module, which `scale_qk=False` makes 1."""
    model, given = made(name), batch(name)
    for module in model.modules():
        if isinstance(module, theirs.Attention):
            kind = getattr(theirs, processor)
            module.set_processor(kind(2) if "Sliced" in processor else kind())
            module.scale = 1.0
    expected = answer(model, given)
    close(answer(linearize(model, "softmax"), given), expected)


def test_attention_of_an_autoencoder():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model, image = diffusers.AutoencoderKL(**sizes, **blocks).eval(), torch.randn(1, 3, 12, 20)
    converted = linearize(model, "softmax")
    assert list(mixings(converted)) == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]
    with torch.no_grad():
        close(converted(image).sample, model(image).sample)


# ---- where tokens lie


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_the_grid_is_that_of_the_latents_and_the_text_is_in_front(name):
    """For each call anew; image tokens of SD3 that attend among themselves have no text."""
    converted = linearize(made(name), "linear")
    for height, width in ((8, 12), (6, 4), (9, 13)):
        grid = (height, width) if name == "flux" else (height // 2, width // 2)
        prefix = 0 if name == "pixart" else TEXT
        for layer, seen in seen_grids(converted, batch(name, height, width)).items():
            assert seen == Grid(*grid, 0 if layer.endswith("attn2") else prefix)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ddpm"])
def test_the_grid_is_that_of_the_level(name):
    fine, coarse = (Grid(10, 12), Grid(5, 6))
    for layer, seen in seen_grids(linearize(made(name), "linear"), batch(name, 10, 12)).items():
        at = fine if name == "sd15" and not layer.startswith("mid") else coarse
        assert seen == at, layer
    odd = {"sd15": (9, 13), "sdxl": (9, 13), "ddpm": (10, 14)}[name]  # strided convolutions round up
    assert Grid(5, 7) in seen_grids(linearize(made(name), "linear"), batch(name, *odd)).values()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_text_and_image_see_each_other(name):
    """By a linear mechanism, too; the last block of SD3 has no further use for the text."""
    converted = linearize(made(name), "linear")
    given = batch(name)
    out = answer(converted, given)
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1}
    assert not torch.allclose(answer(converted, other), out, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_a_mechanism_reads_beside_queries_lies_as_they_do(name):
    """The layer's input of text and image, by which gates are made, has the text in front, as q, k and v have it."""
    converted, seen = linearize(made(name), "linear"), {}
    attn = converted.transformer_blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    attn.processor.mixing.register_forward_hook(lambda module, args, out: seen.update(x=args[3], v=args[2]))
    answer(converted, batch(name))
    text, image = seen["encoder_hidden_states"], seen["hidden_states"]
    assert torch.equal(seen["x"], torch.cat([text, image], dim=1))
    with torch.no_grad():
        v = torch.cat([attn.add_v_proj(text), attn.to_v(image)], dim=1)
    close(seen["v"].flatten(2), v)


def test_the_grid_can_be_said():
    """For places that are no grid, as of a reference image behind the picture, tokens may be a sequence."""
    model, given = made("flux"), batch("flux", 4, 6)
    given["img_ids"] = torch.cat([places(4, 4), places(2, 4)])
    with pytest.raises(LinsightError, match="img_ids: these 24 places are not those of one grid") as caught:
        answer(linearize(model, "linear"), given)
    assert "\n" not in str(caught.value)
    close(answer(linearize(model, "softmax", grid="1d", prefix=TEXT), given), answer(model, given))
    said = linearize(model, "linear", grid=(3, 8))
    assert set(seen_grids(said, given).values()) == {Grid(3, 8, TEXT)}
    sequence = linearize(model, "linear", grid="1d", prefix=TEXT)
    assert set(seen_grids(sequence, given).values()) == {Grid(1, 24, TEXT)}


def test_places_may_be_of_a_batch_or_between_pixels():
    converted, given = linearize(made("flux"), "linear"), batch("flux", 4, 6)
    given["img_ids"] = given["img_ids"] / 2 + 0.25
    assert set(seen_grids(converted, given).values()) == {Grid(4, 6, TEXT)}


# ---- masks


@pytest.mark.parametrize("attention", ["softmax", "linear", "inline"])
def test_padded_tokens_are_not_seen(attention):
    """PixArt's mask of keys: what dropped tokens hold changes nothing in the others."""
    converted, given = linearize(made("pixart"), attention), batch("pixart")
    mask = torch.ones(2, 16)
    mask[1, 12:] = 0  # the last row of patches
    given["attention_mask"] = mask
    out = answer(converted, given)
    given["hidden_states"] = given["hidden_states"].clone()
    given["hidden_states"][1, :, 6:] += 3
    changed = answer(converted, given)
    close(changed[0], out[0], 0)
    close(changed[1, :, :6], out[1, :, :6])
    assert not torch.allclose(changed[1, :, 6:], out[1, :, 6:], atol=1e-3)


@pytest.mark.parametrize("mask", ["keys", "pairs", "numbers"])
def test_softmax_takes_every_mask_that_the_model_takes(mask):
    model, given = made("pixart"), batch("pixart")
    kept = (torch.rand(2, 16) > 0.3).float()
    bias = torch.where(torch.rand(2, 16, 16) > 0.3, 0.0, -10000.0)
    given["attention_mask"] = {"keys": kept, "pairs": bias, "numbers": torch.randn(2, 1, 16)}[mask]
    expected = answer(model, given)
    close(answer(linearize(model, "softmax"), given), expected)
    if mask != "keys":
        what = "a mask of pairs of tokens" if mask == "pairs" else "numbers to add to the scores"
        with pytest.raises(CapabilityError, match=f"'linear' does not support {what}"):
            answer(linearize(model, "linear"), given)


def test_a_mask_of_flux_is_of_all_its_tokens():
    model, given = made("flux"), batch("flux", 4, 6)
    mask = torch.ones(2, TEXT + 24, dtype=torch.bool)
    mask[1, 1:TEXT] = False
    given["joint_attention_kwargs"] = {"attention_mask": mask}
    close(answer(linearize(model, "softmax"), given), answer(model, given))
    converted = linearize(model, "linear")
    out = answer(converted, given)
    given["encoder_hidden_states"][1, 1:TEXT] += 3  # padding of the text
    close(answer(converted, given), out)


def test_masks_that_have_no_meaning_are_refused():
    given = {**batch("sd3"), "joint_attention_kwargs": {"attention_mask": torch.ones(2, 19)}}
    with pytest.raises(LinsightError, match="attention_mask: the attention of SD3 sees none"):
        answer(linearize(made("sd3"), "linear"), given)
    with pytest.raises(LinsightError, match="attention_mask has 9 keys, but there are 16 tokens"):
        answer(linearize(made("pixart"), "linear"), {**batch("pixart"), "attention_mask": torch.ones(2, 9)})


# ---- refusals


def refused(model, match, **options):
    with pytest.raises(LinsightError, match=match) as caught:
        linearize(model, "linear", **options)
    assert "\n" not in str(caught.value)


def test_fused_projections_are_refused():
    for name in ("sd15", "pixart", "sd3", "flux"):
        model = made(name)
        model.fuse_qkv_projections()
        refused(model, "attn1?: .*projections are fused: call unfuse_qkv_projections")
        model.unfuse_qkv_projections()
        linearize(model, "linear")
    converted = linearize(made("flux"), "linear")
    converted.fuse_qkv_projections()
    with pytest.raises(LinsightError, match="fused_projections: a converted FLUX has them apart"):
        answer(converted, batch("flux"))


class Other:
    """A processor that somebody wrote."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_processors_that_compute_something_else_are_refused():
    model = made("sd15")
    name = list(attentions(model))[1]
    model.get_submodule(name).set_processor(Other())
    refused(model, f"{name}: its processor is Other: it may compute anything")
    assert len(mixings(linearize(model, "linear", layers=[0, 2, 3]))) == 3
    model = made("flux")
    adapter = flux_of.FluxIPAdapterAttnProcessor(16, 12)
    model.transformer_blocks[0].attn.set_processor(adapter)
    refused(model, "FluxIPAdapterAttnProcessor: an IP-adapter adds to it")
    linearize(model, "linear", layers="single_*")
    sana = diffusers.SanaTransformer2DModel(num_layers=1, cross_attention_dim=16, caption_channels=12, sample_size=8)
    refused(sana, "it is linear attention already")


def test_an_adapter_comes_before_the_conversion():
    """diffusers makes the processors of self-attention anew then, by their class: ours say what is wrong."""
    converted = linearize(made("sd15"), "linear")
    processor = converted.attn_processors[f"{next(iter(mixings(converted)))}.processor"]
    with pytest.raises(LinsightError, match="load an adapter first, and then convert"):
        type(processor)()


def test_other_refusals():
    refused_for_text = pytest.raises(CapabilityError, match=r"attn: 'nat' does not support prefix tokens")
    for name in ("sd3", "flux"):
        with refused_for_text:
            linearize(made(name), "nat", kernel_size=3)
    linearize(made("sd3"), "nat", kernel_size=3, layers="*.attn2")  # image tokens alone
    refused(made("sd15"), r"attention layer '\*.attn2'", layers="*.attn2")
    converted = linearize(made("sd15"), "linear")
    attn = converted.get_submodule(next(iter(mixings(converted))))
    with pytest.raises(LinsightError, match="encoder_hidden_states: this attention was converted as one of tokens"):
        attn(torch.randn(2, 64, 8), encoder_hidden_states=torch.randn(2, 3, 8))
    gligen = diffusers.UNet2DConditionModel(**{**dict(sd15().config), "attention_type": "gated"})
    refused(gligen, "objects of GLIGEN are mixed with the image")
    assert all(name.endswith("attn1") for name in mixings(linearize(gligen, "linear", layers="*.attn1")))
    with pytest.raises(LinsightError, match=r"hidden_states of shape \(2, 16, 16\) tell no height"):
        linearize(made("pixart"), "linear")(torch.randn(2, 16, 16))


# ---- inheritance and distillation


@pytest.mark.parametrize("name", ["sd3", "flux", "ddpm"])
def test_parts_are_inherited_by_their_role(name):
    model = made(name)
    converted = linearize(model, "linear", inherit={"q": "freeze", "out": "skip"})
    old = dict(model.named_parameters())
    for key, parameter in converted.named_parameters():
        if key not in old or ".attn" not in key:
            continue
        assert parameter.requires_grad == (".to_q." not in key and ".add_q_proj." not in key)
        kept = ".to_out." not in key and ".to_add_out." not in key
        assert torch.equal(parameter, old[key]) == kept or old[key].ndim == 1, key


@pytest.mark.parametrize("name", MODELS)
def test_layers_learn_from_the_model_that_they_were_made_of(name):
    """The places that the teacher is told arrive; of an image and a text both are learnt."""
    teacher, given = made(name), [batch(name), batch(name, *((8, 8) if name == "dit" else (12, 8)))]
    student = linearize(teacher, "hedgehog")
    before = layer_errors(teacher, student, given)
    assert list(before) and before.keys() == mixings(student).keys()
    seen = []
    distil_layers(teacher, student, given, steps=2, report=lambda step, losses: seen.append(losses))
    assert len(seen) == 2 and all(losses.keys() == before.keys() for losses in seen)
    after = layer_errors(teacher, student, given)
    assert sum(after.values()) < sum(before.values())
    assert max(layer_errors(teacher, linearize(teacher, "softmax"), given).values()) < 1e-6


def test_importing_linsight_does_not_import_diffusers():
    for path in Path(linsight.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "diffusers" for name in named), path
