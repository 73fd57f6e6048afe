import dataclasses
import json

import pytest
from small import colours, truncate

from linsight.errors import LinsightError, UnknownNameError
from linsight.train import RECIPES, Recipe, resolve, suggest
from linsight.train._model import build
from linsight.train._recipe import FIELDS, parse


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_resolves_says_what_to_expect_and_survives_json(name):
    recipe = resolve(name)
    assert f"linsight train{'' if name == 'digits' else f' --recipe {name}'}" in RECIPES[name].about
    kept = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert Recipe(**{field: parse(field, value) for field, value in kept.items()}) == recipe


@pytest.mark.parametrize(("size", "batch", "top1"), [("tiny", 4096, 74.5), ("small", 1024, 80.2), ("base", 512, 82.3)])
def test_inline_deit_is_trained_as_published(size, batch, top1):
    recipe = resolve(f"inline_deit_{size}")
    assert (recipe.batch_size, recipe.epochs, recipe.warmup_epochs, recipe.cooldown_epochs) == (batch, 300, 20, 0)
    assert (recipe.lr, recipe.lr_base_batch, recipe.warmup_lr, recipe.min_lr) == (5e-4, 512, 5e-7, 5e-6)
    assert (recipe.opt, recipe.weight_decay, recipe.clip_grad, recipe.drop_path) == ("adamw", 0.05, 5.0, 0.1)
    assert (recipe.auto_augment, recipe.color_jitter, recipe.re_prob) == ("rand-m9-mstd0.5-inc1", 0.4, 0.25)
    assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.ema) == (0.8, 1.0, 0.1, 0.0)
    assert f"{top1} %" in RECIPES[f"inline_deit_{size}"].about


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-3", 1e-3),
        ("ema_warmup", "yes", True),
        ("workers", "none", None),
        ("attention", "inline:2/softmax", "inline:2/softmax"),
        ("img_size", "32", (32,)),
        ("img_size", "160x352", (160, 352)),
        ("scale", "0.5, 1", (0.5, 1.0)),
        ("mean", [0.5], (0.5,)),
        (
            "model_args",
            "depth=6, depths=(2,2),pool=avg,bias=false",
            {"depth": 6, "depths": (2, 2), "pool": "avg", "bias": False},
        ),
        ("model_args", "depths=2,2,width=64", {"depths": (2, 2), "width": 64}),
        ("opt_args", {"betas": [0.9, 0.95]}, {"betas": (0.9, 0.95)}),
    ],
)
def test_fields_are_read_from_text_and_json(field, text, value):
    parsed = parse(field, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epochs": "many"}, "epochs='many' is not a whole number"),
        ({"epochs": "1.5"}, "epochs='1.5' is not a whole number"),
        ({"epochs": "0"}, "epochs=0 is out of range: it must be positive"),
        ({"lr": "-1"}, "lr=-1.0 is out of range"),
        ({"lr": "nan"}, "lr=nan is out of range"),
        ({"hflip": "2"}, "hflip=2.0 is out of range: it must be between 0 and 1"),
        ({"cache": "perhaps"}, "cache='perhaps' is not true or false"),
        ({"scale": "1"}, "scale takes 2 numbers, not 1"),
        ({"mean": "0.1,0.2,0.3"}, "mean takes 1 numbers, not 3"),
        ({"model_args": "depth"}, "write name=value,name=value"),
        ({"epoch": "3"}, "unknown recipe field 'epoch': did you mean 'epochs'?"),
        ({"sched": "cosin"}, "did you mean 'cosine'?"),
        ({"opt": "adamv"}, "unknown optimiser (opt) 'adamv'"),
        ({"in_chans": "2"}, "unknown in_chans '2'"),
        ({"on_bad_image": "skp"}, "did you mean 'skip'?"),
        ({"mixup": "0.8", "batch_size": "33"}, "batch_size=33 must be even"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(overrides, message):
    with pytest.raises(LinsightError) as raised:
        resolve("digits", overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        resolve("cifar")


def test_options_go_with_what_they_belong_to():
    base = resolve("digits", {"model_args": "depth=3", "attention_options": "phi=relu"})
    assert dict(base.model_args) == {"depth": 3}
    assert not resolve("digits", {"model": "vit_tiny"}).model_args


def test_a_model_that_cannot_be_built_is_one_line():
    with pytest.raises(LinsightError, match=r"model_args do not fit 'vit_tiny'.*'wings'"):
        build(resolve("digits", {"model": "vit_tiny", "model_args": "wings=2"}), 10)
    with pytest.raises(UnknownNameError, match="did you mean 'vit_tiny'"):
        build(resolve("digits", {"model": "vit_tyny"}), 10)
    with pytest.raises(LinsightError, match="'num_classes', which is a field of its own"):
        build(resolve("digits", {"model_args": "num_classes=2"}), 10)


def test_every_field_is_explained():
    assert all(field.metadata["help"] and field.metadata["group"] for field in FIELDS.values())


def test_a_run_that_names_no_recipe_gets_one_for_its_images(tmp_path):
    small = colours(tmp_path / "small", {"a": 3, "b": 3}, size=(32, 32))
    large = colours(tmp_path / "large", {"a": 3, "b": 3}, size=(96, 70))
    truncate(large / "a" / "0.png")
    assert suggest({}) == "digits"
    assert suggest({"model": "inline_deit_tiny"}) == "digits"  # no data: those that come with it
    assert suggest({"data": str(small), "epochs": "3"}) == "cifar10"
    assert suggest({"data": str(large)}) == "photos"
    assert suggest({"data": str(small), "model": "inline_deit_tiny"}) == "photos"
    with pytest.raises(LinsightError, match="no such data folder"):
        suggest({"data": str(tmp_path / "none")})
    with pytest.raises(UnknownNameError, match="inline_deit_tiny"):
        suggest({"data": str(small), "model": "inline_diet_tiny"})
