"""Models of transformers whose attention becomes a mechanism: by small random ones of each class."""

import ast
import copy
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import linsight
from linsight.convert import (
    Recovery,
    converted_layers,
    distil,
    distil_layers,
    layer_errors,
    linearize,
    load_linearized,
    new_parameters,
    save_linearized,
)
from linsight.convert.conversion import attentions, mixings
from linsight.convert.place import Place
from linsight.errors import CapabilityError, LinsightError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore:attention dropout")
transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("linsight.convert.seams.functional")

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
CUT = {"image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 50, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISTIL = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48}
VISION = {  # and the prefix of each
    "ViT": 1,
    "DeiT": 2,
    "Dinov2": 1,
    "Dinov2WithRegisters": 5,
    "DINOv3ViT": 5,
    "CLIPVision": 1,
    "SiglipVision": 0,
}
TEXT = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "DistilBert": DISTIL,
    "Electra": SIZES | {"embedding_size": 16},
    "Albert": SIZES | {"embedding_size": 16},
    "SiglipText": SIZES,
}
LENGTHS = (9, 5, 3)


def build(name, **options):
    made = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(made).eval()
    with torch.no_grad():  # as those of trained models, scores differ
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def vision(name):
    registers = {"num_register_tokens": 4} if VISION[name] == 5 else {}
    return build(name, **SIZES, **CUT, **registers)


def text(name, **options):
    return build(name, **TEXT.get(name, SIZES), **WORDS, **options)


def pixels():
    return torch.randn(2, 3, 32, 32)


def padded(left=False):
    """Sequences of `LENGTHS` in one batch."""
    longest = max(LENGTHS)
    ids = torch.randint(5, 50, (len(LENGTHS), longest))
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def states(model, **inputs):
    return model(**inputs).last_hidden_state


def place(model):
    return next(
        hook.place
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(getattr(hook, "place", None), Place)
    )


# ---- what is inherited


@pytest.mark.parametrize("name", VISION)
def test_softmax_is_that_of_a_model_of_images(name):
    model, x = vision(name), pixels()
    ours = linearize(model, "softmax")
    assert list(mixings(ours)) == list(attentions(model))
    torch.testing.assert_close(states(ours, pixel_values=x), states(model, pixel_values=x), rtol=1e-5, atol=1e-5)
    assert (place(ours).grid, place(ours).prefix) == ((4, 4), VISION[name])


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT)
def test_softmax_is_that_of_a_model_of_text(name, kind):
    model, batch = text(name, attn_implementation=kind), padded()
    ours, seen = linearize(model, "softmax"), batch["attention_mask"].bool()
    expected = states(model, **batch)
    torch.testing.assert_close(states(ours, **batch)[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == kind  # of the source
    other = linearize(model, "hedgehog")
    assert (states(other, **batch) - expected)[seen].abs().max() > 1e-3


def test_a_mask_of_four_axes_is_that_of_softmax():
    model, batch = text("Bert"), padded()
    pairs = torch.rand(3, 1, 9, 9) < 0.7
    pairs |= torch.eye(9, dtype=torch.bool)
    batch["attention_mask"] = pairs
    ours = linearize(model, "softmax")
    torch.testing.assert_close(states(ours, **batch), states(model, **batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(CapabilityError, match=r"'inline' does not support a mask of pairs.*these do: .*softmax"):
        states(linearize(model, "inline"), **batch)


def test_a_bias_by_position_is_that_of_softmax():
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 50}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    ours, batch = linearize(model, "softmax"), padded()
    torch.testing.assert_close(states(ours, **batch), states(model, **batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(CapabilityError, match=r"'linear' does not support numbers to add to the scores"):
        states(linearize(model, "linear"), **batch)


def test_one_map_makes_all_three():
    model, batch = text("ModernBert", cls_token_id=1, sep_token_id=2), padded()
    ours, seen = linearize(model, "softmax"), batch["attention_mask"].bool()
    torch.testing.assert_close(states(ours, **batch)[seen], states(model, **batch)[seen], rtol=1e-5, atol=1e-5)
    drawn = linearize(model, "linear", layers=0, inherit={"k": "skip"})
    before, after = (one.layers[0].attn.Wqkv.weight for one in (model, drawn))
    assert torch.equal(before[:32], after[:32]) and torch.equal(before[64:], after[64:])
    assert (before[32:64] - after[32:64]).abs().min() > 0


def test_output_projections_may_be_held_or_drawn_anew():
    model = text("Bert")
    held = linearize(model, "linear", layers=0, inherit={"out": "freeze", "q": "freeze"})
    kept = {name for name, parameter in held.named_parameters() if not parameter.requires_grad}
    layer = "encoder.layer.0.attention"
    expected = {f"{layer}.{part}.{tensor}" for part in ("self.query", "output.dense") for tensor in ("weight", "bias")}
    assert kept == expected
    drawn = linearize(vision("ViT"), "linear", layers=-1, inherit={"out": "skip"})
    assert 0.01 < drawn.layers[1].attention.o_proj.weight.std() < 0.03


# ---- padding


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["hedgehog", "inline", "linear", "mean", "softmax"])
@pytest.mark.parametrize("name", ["Bert", "DistilBert", "Electra"])
def test_padding_is_never_seen(name, attention, left):
    ours, batch = linearize(text(name), attention, neutral=False), padded(left)
    seen, out = batch["attention_mask"].bool(), states(ours, **batch)
    other = batch | {"input_ids": torch.where(seen, batch["input_ids"], 7)}
    torch.testing.assert_close(states(ours, **other)[seen], out[seen], rtol=0, atol=0)
    if not left:  # positions are those of the row alone
        for row, length in enumerate(LENGTHS):
            alone = states(ours, input_ids=batch["input_ids"][row : row + 1, :length])
            torch.testing.assert_close(out[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)


def test_padding_gets_no_gradient():
    ours, batch = linearize(text("Bert"), "hedgehog"), padded()
    embedded, seen = torch.randn(3, 9, 32, requires_grad=True), batch["attention_mask"].bool()
    states(ours, inputs_embeds=embedded, attention_mask=batch["attention_mask"])[seen].square().sum().backward()
    assert not embedded.grad[~seen].any() and embedded.grad[seen].all()
    assert all(p.grad.isfinite().all() for p in new_parameters(ours).values())


def test_a_mask_stays_of_the_size_of_the_keys():
    ours = linearize(text("Bert"), "linear")
    found = []
    hook = ours.encoder.layer[0].register_forward_pre_hook(lambda module, args: found.append(args[1]))
    states(ours, **padded())
    hook.remove()
    assert found[0].shape == (3, 1, 1, 9)


# ---- both ways


@pytest.mark.parametrize("attention", ["hedgehog", "inline", "rala", "agent"])
@pytest.mark.parametrize("name", ["ViT", "Dinov2WithRegisters", "SiglipVision"])
def test_images_go_forward_and_back(name, attention):
    model = vision(name).train()
    ours = linearize(model, attention, neutral=False)
    states(ours, pixel_values=pixels()).square().mean().backward()
    for key, parameter in ours.named_parameters():
        if ".mixing." in key:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    wider = {"interpolate_pos_encoding": True} if name in ("ViT", "SiglipVision") else {}
    assert states(ours, pixel_values=torch.randn(1, 3, 48, 32), **wider).isfinite().all()
    assert place(ours).grid == (6, 4)


def test_gradient_checkpointing_gives_the_same_gradients():
    ours, batch = linearize(text("Bert"), "inline", neutral=False), padded()
    ours.config.hidden_dropout_prob = 0.0
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for kept in (True, False):
        ours.train().zero_grad()
        if not kept:
            ours.activation_checkpointing_enable()
        states(ours, **batch).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


def test_threads_do_not_mix_their_inputs():
    ours = linearize(vision("ViT"), "inline", neutral=False)
    inputs = [pixels() for _ in range(8)]
    with torch.no_grad():
        expected = [states(ours, pixel_values=x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda x: states(ours, pixel_values=x), inputs * 4))
    for out, wanted in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(out, wanted)


def test_a_graph_gives_the_same():
    ours, batch = linearize(text("Bert"), "hedgehog"), padded()
    graph = torch.export.export(ours, (), batch)
    torch.testing.assert_close(graph.module()(**batch).last_hidden_state, states(ours, **batch))


# ---- parts of a model


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_other_layers_keep_their_softmax(kind):
    model, batch = text("Bert", attn_implementation=kind), padded()
    ours, seen = linearize(model, "hedgehog", layers=1), batch["attention_mask"].bool()
    assert list(converted_layers(ours)) == ["encoder.layer.1.attention.self"]
    theirs, mine = (one(**batch, output_hidden_states=True).hidden_states for one in (model, ours))
    torch.testing.assert_close(mine[1][seen], theirs[1][seen], rtol=1e-5, atol=1e-5)
    assert (mine[2] - theirs[2])[seen].abs().max() > 1e-3


def clip():
    made = transformers.CLIPConfig(text_config=SIZES | WORDS, vision_config=SIZES | CUT)
    return transformers.CLIPModel(made).eval()


def test_the_two_towers_of_clip():
    model, batch = clip(), padded() | {"pixel_values": pixels()}
    with pytest.raises(CapabilityError, match=r"text_model.*this attention is causal: leave it out by layers="):
        linearize(model)
    with pytest.raises(CapabilityError, match=r"text_model.*'inline' does not support a causal attention"):
        linearize(model, "inline")
    with pytest.raises(LinsightError, match=r"vision_model.*would hide later tokens"):
        linearize(model, "softmax", layers="vision_model.*", causal=True)
    ours = linearize(model, "softmax", layers="vision_model.*")
    linearize(ours, "softmax", layers="text_model.*", causal=True, in_place=True)
    assert len(mixings(ours)) == 4
    theirs, mine = model(**batch), ours(**batch)
    torch.testing.assert_close(mine.logits_per_image, theirs.logits_per_image, rtol=1e-5, atol=1e-5)
    one = linearize(model, "inline", layers="vision_model.*")(**batch)
    torch.testing.assert_close(one.text_embeds, theirs.text_embeds, rtol=1e-5, atol=1e-5)
    assert (one.image_embeds - theirs.image_embeds).abs().max() > 1e-4


def test_a_causal_tower_sees_neither_later_tokens_nor_padding():
    ours, batch = linearize(text("CLIPText"), "hedgehog", causal=True, feature_map="softmax_parts"), padded()
    seen, out = batch["attention_mask"].bool(), states(ours, **batch)
    other = batch | {"input_ids": torch.where(seen, batch["input_ids"], 7)}
    torch.testing.assert_close(states(ours, **other)[seen], out[seen])
    later = batch["input_ids"].clone()
    later[:, 2:] = 9
    torch.testing.assert_close(states(ours, **batch | {"input_ids": later})[:, :2], out[:, :2])
    assert (states(ours, **batch | {"input_ids": later})[:, 2] - out[:, 2]).abs().max() > 1e-4


# ---- copies and files


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_on_their_own(way):
    ours, x = linearize(vision("ViT"), "inline", neutral=False), pixels()
    expected = states(ours, pixel_values=x)
    other = way(ours)
    assert place(other) is not place(ours)
    torch.testing.assert_close(states(other, pixel_values=x), expected)
    states(other, pixel_values=torch.randn(1, 3, 64, 32), interpolate_pos_encoding=True)
    assert (place(ours).grid, place(other).grid) == ((4, 4), (8, 4))


def test_a_pickled_model_brings_its_function():
    stored = pickle.dumps(linearize(text("Bert"), "hedgehog"))
    assert functional.__name__.encode() in stored  # whoever reads it imports that, which registers the function
    assert transformers.AttentionInterface()[functional.NAME] is functional.attend


def test_weights_are_saved_and_loaded(tmp_path):
    model, batch = text("Bert"), padded()
    ours = linearize(model, "hedgehog", layers="*.1.*")
    with torch.no_grad():
        for parameter in new_parameters(ours).values():
            parameter.add_(torch.randn_like(parameter))
    ours.save_pretrained(tmp_path)
    again = linearize(text("Bert"), "hedgehog", layers="*.1.*")
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(states(again, **batch), states(ours, **batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ViT", "DistilBert", "CLIPText"])
def test_a_folder_tells_how_its_model_is_built(name, tmp_path):
    model = vision(name) if name in VISION else text(name)
    batch = {"pixel_values": pixels()} if name in VISION else padded()
    causal = {"causal": True} if name == "CLIPText" else {}
    ours = linearize(model, "linear", layers=1, **causal)
    save_linearized(ours, tmp_path)
    again = load_linearized(tmp_path)
    assert type(again) is type(model) and converted_layers(again) == converted_layers(ours)
    torch.testing.assert_close(states(again, **batch), states(ours, **batch), rtol=0, atol=0)


def test_a_folder_keeps_the_dtype(tmp_path):
    ours = linearize(vision("ViT").to(torch.bfloat16), "linear")
    save_linearized(ours, tmp_path)
    assert {p.dtype for p in load_linearized(tmp_path).parameters()} == {torch.bfloat16}


def test_a_folder_of_an_unknown_class_is_refused(tmp_path):
    save_linearized(linearize(vision("ViT"), "linear"), tmp_path)
    table = tmp_path / "linearized.json"
    table.write_text(table.read_text().replace('"ViTModel"', '"Trainer"'))
    with pytest.raises(LinsightError, match=r"transformers has no model Trainer"):
        load_linearized(tmp_path)


# ---- learning


def test_layers_learn_what_the_old_ones_gave():
    teacher, batch = text("Bert"), padded()
    ours = linearize(teacher, "hedgehog")
    before = layer_errors(teacher, ours, [batch])
    distil_layers(teacher, ours, [batch], steps=30)
    after = layer_errors(teacher, ours, [batch])
    assert list(after) == [f"encoder.layer.{place}.attention.self" for place in range(2)]
    assert all(after[name] < 0.7 * before[name] for name in after)


def test_a_model_of_images_learns_as_a_whole():
    teacher, batches = vision("Dinov2WithRegisters"), [{"pixel_values": pixels()}]
    ours, found = linearize(teacher, "inline"), []
    distil(
        teacher,
        ours,
        batches,
        steps=20,
        recovery=Recovery(distance="mse", lr=1e-3),
        report=lambda *now: found.append(now[1]),
    )
    assert found[-1]["hidden"] < 0.7 * found[0]["hidden"]


# ---- bad input


def test_unknown_layers_are_told():
    with pytest.raises(UnknownNameError, match=r"attention layer 'encoder.layer.7.*did you mean 'encoder.layer"):
        linearize(text("Bert"), layers="encoder.layer.7.attention.self")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("MPNet", {}, "MPNetSelfAttention computes its softmax itself"),
        ("Llama", {"num_key_value_heads": 2}, r"of \[32, 16, 16\] channels: heads share keys"),
        ("Llama", {}, "this attention is causal"),
        ("Bert", {"is_decoder": True}, "this attention is causal"),
        ("VideoMAE", CUT, "VideoMAEModel does not tell where its tokens lie"),
    ],
)
def test_attentions_that_cannot_be_replaced_say_why(name, options, reason):
    words = WORDS if name != "VideoMAE" else {}
    model = build(name, **SIZES, **words, **options)
    before = model.state_dict().keys()
    with pytest.raises(LinsightError, match=reason) as told:
        linearize(model, in_place=True)
    assert "\n" not in str(told.value) and model.state_dict().keys() == before
    assert model.config._attn_implementation == "sdpa" or name == "MPNet"


def test_cross_attention_is_no_self_attention():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = build("Bart", **sizes, **heads, **WORDS)
    ours = linearize(model, "softmax", layers="encoder.*")
    batch = padded()
    torch.testing.assert_close(states(ours, **batch), states(model, **batch), rtol=1e-5, atol=1e-5)
    wrong = linearize(model, "softmax", layers="decoder.layers.0.encoder_attn")
    with pytest.raises(CapabilityError, match=r"cross-attention"):
        states(wrong, **batch)


def test_a_cache_has_no_linear_form():
    model = text("Bert", is_decoder=True)
    ours, ids = linearize(model, "linear", causal=True), padded()["input_ids"]
    first = ours(input_ids=ids[:, :4], use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    with pytest.raises(LinsightError, match=r"1 queries and 5 keys came: with a cache .* use_cache=False"):
        ours(input_ids=ids[:, 4:5], cache=cache)


def test_images_that_do_not_fit_say_so():
    ours = linearize(vision("CLIPVision"), "inline")
    with pytest.raises(LinsightError, match="7x32 pixels are smaller than a patch"):
        ours(pixel_values=torch.randn(1, 3, 7, 32))


def test_forward_alone_is_refused():
    ours, x = linearize(vision("ViT"), "inline"), torch.randn(1, 17, 32)
    with pytest.raises(LinsightError, match="call the ViTAttention itself"):
        ours.layers[0].attention.forward(x)


def test_dropout_that_is_gone_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(vision("ViT"))  # none
    with pytest.warns(UserWarning, match=r"attention dropout \(0.1\) is gone"):
        linearize(text("Bert"))


def test_transformers_is_imported_only_for_its_models():
    ours, found = r"from \.+(seams)? import functional|from \.\S*functional", []
    pattern = re.compile(rf"(from|import) transformers\b|{ours}")
    for path in Path(linsight.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not inside functions
            if isinstance(node, ast.Import | ast.ImportFrom) and pattern.match(ast.unparse(node)):
                found.append(path.stem)
    assert set(found) == {"functional"}
