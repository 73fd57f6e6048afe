import dataclasses
import json
import re

import pytest
from small import colours, truncate

from linsight.errors import LinsightError, UnknownNameError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS
from linsight.models._registry import DEFAULT_CFG
from linsight.train import RECIPES, Recipe, resolve, suggest
from linsight.train._recipe import FIELDS, parse
from linsight.train.learner import ema_decay
from linsight.train.model import build


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_resolves_says_what_to_expect_and_survives_json(name):
    recipe = resolve(name)
    assert f"linsight train{'' if name == 'digits' else f' --recipe {name}'}" in RECIPES[name].about
    kept = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert Recipe(**{field: parse(field, value) for field, value in kept.items()}) == recipe


PUBLISHED = [name for name, shipped in RECIPES.items() if shipped.published]


def test_every_published_model_has_its_recipe():
    variants = {n for n, v in VARIANTS.items() if not v.dense and "compact" not in v.host}
    architectures = {name for name in ARCHITECTURES if not name.endswith("_cifar")}  # our own
    assert variants | architectures <= set(PUBLISHED)
    for name in PUBLISHED:
        assert RECIPES[name].recipe.model == name.removesuffix("_mesa")
        tuned = name.endswith("_384") or RECIPES[name].recipe.init_partial
        assert ("--init" in RECIPES[name].about) == tuned


@pytest.mark.parametrize("name", [name for name in PUBLISHED if RECIPES[name].recipe.model in VARIANTS | ARCHITECTURES])
def test_recipes_agree_with_their_models(name):
    """What both tables say: the published accuracy, and how images are evaluated."""
    recipe = RECIPES[name].recipe
    variant = (VARIANTS | ARCHITECTURES)[recipe.model]
    host_cfg = HOSTS[variant.host].cfg if recipe.model in VARIANTS else {}
    abouts = " ".join(shipped.about for shipped in RECIPES.values() if shipped.recipe.model == recipe.model)
    told = {float(number) for number in re.findall(r"([\d.]+) % top-1", abouts)}
    assert variant.published.get("top1") in (told or {None})
    config = {**DEFAULT_CFG, **host_cfg, **variant.cfg}
    assert (config["crop_pct"], config["crop_mode"]) == (recipe.crop_pct, recipe.eval_crop)
    assert (config["interpolation"], config["num_classes"]) == (recipe.interpolation, 1000)


# Of the repositories whose evaluation squashes images to a square; others take the centre of the image.
SQUASHED = ("inline", "focused", "agent", "vca", "steps")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_share_augmentation_and_optimiser(name):
    recipe = resolve(name)
    assert (recipe.opt, recipe.opt_args, recipe.sched) == ("adamw", {}, "cosine")
    assert (recipe.auto_augment, recipe.interpolation) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert (recipe.re_prob, recipe.re_mode, recipe.smoothing) == (0.25, "pixel", 0.1)
    assert (recipe.mixup, recipe.cutmix, recipe.mixup_prob, recipe.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert recipe.crop_pct == (1.0 if re.search("_swin_(base_384|small_288)$", name) else 0.875)
    assert recipe.eval_crop == ("squash" if name.startswith(SQUASHED) else "center")
    assert recipe.amp == ("off" if name.startswith(("focused", "agent", "dynp")) or name == "wfm_base" else "auto")
    like_deit = name.startswith(("siamese", "vca", "t5", "steps_deit"))
    assert (recipe.aug_repeats, recipe.color_jitter) == ((3, 0.3) if like_deit else (1, 0.4))
    assert recipe.lr_base_batch == (1024 if name.startswith("dynp") else 512)
    assert not recipe.ema or any(family in name for family in ("cswin", "mlla", "h_vittt", "dynp"))
    assert not recipe.mesa or recipe.mesa_start == 0.25


# The tables of the papers' repositories: rate, at the start and end of its course, epochs, warm-up and cool-down,
# decay, clipping, images of a step, stochastic depth, averaging at that batch, weight of MESA, and top-1.
_ROWS = """
inline_deit_tiny       5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.1 0 0  74.5 %
inline_deit_small      5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.1 0 0  80.2 %
inline_deit_base       5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.1 0 0  82.3 %
inline_pvt_small       5e-4 1e-6 1e-5 300  5 10 0.05 0 1024 0.1 0 0  82.0 %
inline_pvt_medium      5e-4 1e-6 1e-5 300  5 10 0.05 1 1024 0.3 0 0  83.2 %
inline_pvt_large       5e-4 1e-6 1e-5 300  5 10 0.05 1  512 0.3 0 0  83.6 %
inline_swin_tiny       5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.2 0 0  82.4 %
inline_swin_base       5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.5 0 0  84.1 %
inline_swin_base_384   2e-5 2e-8 2e-7  30  5  0 1e-8 5  256 0.5 0 0  top-1 not published
inline_cswin_tiny      5e-4 1e-6 1e-5 300 20 10 0.05 0 1024 0.2 0.9999 0  83.2 %
inline_cswin_base      5e-4 1e-6 1e-5 300 20 10 0.1  0  512 0.5 0.99995 0  84.5 %
inline_cswin_base_384  5e-6 5e-6 5e-7  20  0 10 1e-8 0  256 0.7 0.999975 0  85.7 %
focused_pvt_tiny       5e-4 1e-6 1e-5 300  5 10 0.05 0 1024 0.1 0 0  77.8 %
focused_pvt_small      5e-4 1e-6 1e-5 300  5 10 0.05 0  512 0.1 0 0  81.7 %
focused_pvt_large      5e-4 1e-6 1e-5 300  5 10 0.05 1  256 0.3 0 0  about 83.45 %
focused_pvt_v2_b0      5e-4 1e-6 1e-5 300  5 10 0.05 0 1024 0.1 0 0  71.1 %
focused_pvt_v2_b4      5e-4 1e-6 1e-5 300  5 10 0.05 1  512 0.3 0 0  about 84.0 %
focused_swin_small     5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.3 0 0  83.5 %
focused_swin_base_384  2e-5 2e-8 2e-7  30  5  0 1e-8 5  256 0.5 0 0  85.0 %
focused_cswin_tiny     5e-4 1e-6 1e-5 300 20 10 0.05 0 2048 0.2 0.99984 0  83.1 %
focused_cswin_small    5e-4 1e-6 1e-5 300 20 10 0.05 0 1024 0.4 0.99984 0  83.8 %
focused_cswin_base     5e-4 1e-6 1e-5 300 20 10 0.1  0  512 0.5 0.99982 0  84.5 %
focused_cswin_base_384 5e-6 5e-6 5e-7  20  0 10 1e-8 0  256 0.7 0.99982 0  85.5 %
agent_deit_tiny        5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.0 0 0        74.9 %
agent_deit_small       5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.1 0 0        80.5 %
agent_deit_small_448   5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.1 0 0        83.1 %
agent_deit_base        5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.3 0 0        82.0 %
agent_pvt_tiny         5e-4 1e-6 1e-5 300  5 10 0.05 0 1024 0.1 0 0        78.4 %
agent_pvt_medium_256   5e-4 1e-6 1e-5 300  5 10 0.05 1  512 0.3 0 0        83.8 %
agent_pvt_large        5e-4 1e-6 1e-5 300  5 10 0.05 1  512 0.3 0 0        83.7 %
agent_swin_small       5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.3 0 0        83.7 %
agent_swin_small_288   5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.3 0 0        84.1 %
agent_swin_base_384    2e-5 2e-8 2e-7  30  5  0 1e-8 5  256 0.5 0 0        84.9 %
agent_cswin_tiny       5e-4 1e-6 1e-5 300 20 10 0.05 0 1024 0.2 0.99984 0  83.1 %
agent_cswin_base       5e-4 1e-6 1e-5 300 20 10 0.1  0  512 0.5 0.99992 0  84.7 %
agent_cswin_base_384   5e-6 5e-6 5e-7  20  0 10 1e-8 0  256 0.7 0.9998 0   85.8 %
mlla_tiny              5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.2 0.9999 1   83.5 %
mlla_small             5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.3 0.99995 1.5 84.4 %
mlla_base              5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.5 0.99995 2  85.3 %
ca_deit_tiny           5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.0 0 0        75.0 %
ca_deit_base           5e-4 5e-7 5e-6 300 20  0 0.05 5 1024 0.4 0 0        82.3 %
vittt_small            5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.1 0 0        81.6 %
h_vittt_tiny           5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.2 0.9996 0   83.5 %
h_vittt_small          5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.4 0.9996 0   top-1 not published
h_vittt_base_mesa      5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.6 0.9996 2   85.5 %
wfm_small              5e-4 5e-7 5e-6 300 20  0 0.05 5 2048 0.2 0 0        about 81.3 %
vca_deit_tiny          5e-4 5e-7 5e-6 300  5  0 0.05 0 1024 0.1 0 0        75.6 %
siamese_deit_small     5e-4 5e-7 5e-6 300  5  0 0.05 0 1024 0.1 0 0        81.3 %
t5_tiny                2e-5 5e-9 5e-8  30  5  0 0.05 0 2048 0.0 0 0        71.19 %
dynp_reg400m_t128      1e-3 0    1e-6 300 20  0 0.05 0 1024 0.0 0.9999 0   top-1 not published
dynp_resnet50_0375_t128 6e-4 0   1e-6 300 20  0 0.05 0 1024 0.2 0.9999 0   77.70 %
dynp_mobilenetv3_0x75_t128 1e-3 0 1e-6 600 20 0 0.05 0 1024 0.0 0.9999 0   74.59 %
"""


@pytest.mark.parametrize("row", _ROWS.strip().splitlines(), ids=lambda row: row.split()[0])
def test_models_are_trained_as_published(row):
    name, *numbers, result = row.split(maxsplit=13)
    recipe = resolve(name)
    rates = (recipe.lr, recipe.warmup_lr, recipe.min_lr)
    times = (recipe.epochs, recipe.warmup_epochs, recipe.cooldown_epochs)
    rest = (recipe.weight_decay, recipe.clip_grad, recipe.batch_size, recipe.drop_path)
    averages = (ema_decay(recipe), recipe.mesa)
    assert (*rates, *times, *rest) == pytest.approx(tuple(map(float, numbers[:-2])), abs=1e-12, rel=1e-7)
    assert averages == pytest.approx(tuple(map(float, numbers[-2:])), abs=1e-7)
    assert f": {result} " in RECIPES[name].about or f": {result}, " in RECIPES[name].about


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
        ({"mesa": "1"}, "mesa=1 learns from averaged weights: set their decay, as in ema=0.9999"),
        ({"mesa": "1", "ema": "0.9", "mesa_start": "2"}, "mesa_start=2.0 is out of range: it must be between 0 and 1"),
        ({"aug_repeats": "0"}, "aug_repeats=0 is out of range: it must be positive"),
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
