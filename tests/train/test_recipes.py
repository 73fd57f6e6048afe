import json

import pytest
from small import colours, truncate

from linsight.errors import LinsightError, UnknownNameError
from linsight.models import ARCHITECTURES, VARIANTS
from linsight.tasks import ClassifyRecipe, read_recipe
from linsight.train import RECIPES, resolve, suggest
from linsight.train.learner import ema_decay
from linsight.train.model import build


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_resolves_says_what_to_expect_and_survives_json(name):
    recipe = resolve(name)
    assert f"linsight train{'' if name == 'digits' else f' --recipe {name}'}" in RECIPES[name].about
    kept = json.loads(json.dumps(recipe.values()))
    assert read_recipe(kept) == recipe


PUBLISHED = [name for name, shipped in RECIPES.items() if shipped.published and shipped.recipe.task == "classify"]


def test_every_published_model_has_its_recipe():
    variants = {n for n, v in VARIANTS.items() if not v.dense and v.published} - {"videomamba_base"}  # which tells none
    architectures = {name for name in ARCHITECTURES if not name.endswith("_cifar")}  # our own
    assert variants | architectures <= set(PUBLISHED)
    for name in PUBLISHED:
        assert RECIPES[name].recipe.model == name.removesuffix("_mesa")
        tuned = name.endswith("_384") or RECIPES[name].recipe.init_partial
        assert ("--init" in RECIPES[name].about) == (tuned or "weights of ImageNet-22K" in RECIPES[name].about)


def test_a_recipe_evaluates_as_its_model_does():
    seen = {name: (RECIPES[name].recipe.crop_pct, RECIPES[name].recipe.eval_crop) for name in PUBLISHED}
    assert seen["inline_swin_tiny"] == (0.875, "squash") and seen["inline_swin_base_384"] == (1.0, "squash")
    assert seen["vittt_tiny"] == seen["h_vittt_tiny_mesa"] == seen["dynp_resnet18_t128"] == (0.875, "center")


def test_a_recipe_tells_the_accuracy_of_its_model():
    assert "about 83.45 % top-1, 300 epochs" in RECIPES["focused_pvt_large"].about
    assert ": top-1 not published, no recipe published, so that of B4, " in RECIPES["focused_pvt_v2_b5"].about
    assert (
        ": 83.5 % top-1, " in RECIPES["h_vittt_tiny"].about and ": 84.0 % top-1, " in RECIPES["h_vittt_tiny_mesa"].about
    )
    assert ": top-1 not published, " in RECIPES["h_vittt_small"].about


# One of each kind, as the tables of the papers' repositories have it: rate, at the start and end of its course, epochs,
# warm-up and cool-down, decay, clipping, images of a step, stochastic depth, averaging at that batch, weight of MESA.
_ROWS = """
inline_deit_tiny       5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.1 0 0
inline_pvt_small       5e-4 1e-6 1e-5 300  5 10 0.05 0 1024 0.1 0 0
inline_pvt_large       5e-4 1e-6 1e-5 300  5 10 0.05 1  512 0.3 0 0
inline_swin_base_384   2e-5 2e-8 2e-7  30  5  0 1e-8 5  256 0.5 0 0
inline_cswin_tiny      5e-4 1e-6 1e-5 300 20 10 0.05 0 1024 0.2 0.9999 0
inline_cswin_base_384  5e-6 5e-6 5e-7  20  0 10 1e-8 0  256 0.7 0.999975 0
focused_cswin_base     5e-4 1e-6 1e-5 300 20 10 0.1  0  512 0.5 0.99982 0
agent_swin_small_288   5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.3 0 0
mlla_small             5e-4 5e-7 5e-6 300 20  0 0.05 5  512 0.3 0.99995 1.5
h_vittt_base_mesa      5e-4 5e-7 5e-6 300 20  0 0.05 5 4096 0.6 0.9996 2
siamese_deit_small     5e-4 5e-7 5e-6 300  5  0 0.05 0 1024 0.1 0 0
t5_tiny                2e-5 5e-9 5e-8  30  5  0 0.05 0 2048 0.0 0 0
dynp_reg400m_t128      1e-3 0    1e-6 300 20  0 0.05 0 1024 0.0 0.9999 0
dynp_resnet50_0375_t128 6e-4 0   1e-6 300 20  0 0.05 0 1024 0.2 0.9999 0
dynp_mobilenetv3_0x75_t128 1e-3 0 1e-6 600 20 0 0.05 0 1024 0.0 0.9999 0
"""


@pytest.mark.parametrize("row", _ROWS.strip().splitlines(), ids=lambda row: row.split()[0])
def test_models_are_trained_as_published(row):
    name, *numbers = row.split()
    recipe = resolve(name)
    rates = (recipe.lr, recipe.warmup_lr, recipe.min_lr)
    times = (recipe.epochs, recipe.warmup_epochs, recipe.cooldown_epochs)
    rest = (recipe.weight_decay, recipe.clip_grad, recipe.batch_size, recipe.drop_path)
    averages = (ema_decay(recipe), recipe.mesa)
    assert (*rates, *times, *rest) == pytest.approx(tuple(map(float, numbers[:-2])), abs=1e-12, rel=1e-7)
    assert averages == pytest.approx(tuple(map(float, numbers[-2:])), abs=1e-7)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-3", 1e-3),
        ("ema_warmup", "yes", True),
        ("workers", "none", None),
        ("cache", True, "memory"),
        ("cache", "false", "off"),
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
    parsed = ClassifyRecipe.parse(field, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epochs": "many"}, "epochs='many' is not a whole number"),
        ({"epochs": "1.5"}, "epochs='1.5' is not a whole number"),
        ({"epochs": "0"}, "epochs=0 is out of range: it must be 1 or more"),
        ({"lr": "-1"}, "lr=-1 is out of range"),
        ({"lr": "nan"}, "lr=nan is out of range"),
        ({"hflip": "2"}, "hflip=2 is out of range: it must be between 0 and 1"),
        ({"cache": "perhaps"}, "unknown cache 'perhaps': known: disk, memory, off"),
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
        ({"mesa": "1", "ema": "0.9", "mesa_start": "2"}, "mesa_start=2 is out of range: it must be between 0 and 1"),
        ({"aug_repeats": "0"}, "aug_repeats=0 is out of range: it must be 1 or more"),
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
    with pytest.raises(LinsightError, match=r"unknown argument of 'vit_tiny' 'wings'"):
        build(resolve("digits", {"model": "vit_tiny", "model_args": "wings=2"}), 10)
    with pytest.raises(UnknownNameError, match="did you mean 'vit_tiny'"):
        build(resolve("digits", {"model": "vit_tyny"}), 10)
    with pytest.raises(LinsightError, match="'num_classes', which is a field of its own"):
        build(resolve("digits", {"model_args": "num_classes=2"}), 10)


def test_every_field_is_explained():
    groups = ClassifyRecipe.groups()
    assert all(ClassifyRecipe.help(name) and (groups[name] or name == "task") for name in ClassifyRecipe.model_fields)


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


@pytest.mark.parametrize("deep", [[], {}])
def test_options_are_not_nested_without_an_end(deep):
    for _ in range(300):
        deep = [deep]
    with pytest.raises(LinsightError, match=r"opt_args=.* is nested too deeply") as error:
        ClassifyRecipe(opt_args={"betas": deep})
    assert "\n" not in str(error.value)
    assert ClassifyRecipe(opt_args={"betas": [[0.9], [0.95]]}).opt_args == {"betas": ((0.9,), (0.95,))}


def test_a_name_with_line_breaks_is_told_in_one_line():
    assert str(UnknownNameError("model", "a\nb", ["c"])) == "unknown model 'a\\nb': known: c"


@pytest.mark.parametrize(
    ("name", "first", "peak", "last"),
    [
        ("videomamba_tiny", 1e-6, 4e-3, 1e-5),
        ("videomamba_middle", 1e-6, 1e-3, 5e-6),
        ("overlock_t", 1e-6, 2e-3, 1e-5),
    ],
)
def test_rates_of_warm_up_and_end_are_the_published_ones(name, first, peak, last):
    recipe = RECIPES[name].recipe
    scale = recipe.batch_size / recipe.lr_base_batch
    found = [rate * scale for rate in (recipe.warmup_lr, recipe.lr, recipe.min_lr)]
    assert found == pytest.approx([first, peak, last])


def test_models_at_384_pixels_are_evaluated_whole_and_warm_up_shortly():
    assert RECIPES["litv2_base_384"].recipe.crop_pct == 1.0 and RECIPES["litv2_base"].recipe.crop_pct == 0.875
    assert RECIPES["dinat_large_384"].recipe.warmup_epochs == 5
    tiny = RECIPES["videomamba_tiny"].recipe
    assert (tiny.aug_repeats, tiny.auto_augment) == (1, "v0")
