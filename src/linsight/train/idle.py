"""Fields of a recipe that have no effect beside its others, to be told to who sets them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from linsight.recipe import Recipe
from linsight.records import shown
from linsight.tasks.files import is_recipe_file, read_values


class Use(NamedTuple):
    """The way to put a field to use.

    beside: the fields that decide it.  how: what to set.  used: True for a recipe in which the field has an effect.
    """

    beside: tuple[str, ...]
    how: str
    used: Callable[[Any], object]


_SCHED = Use(("sched",), "another sched", lambda r: r.sched != "none")
_CURVE = Use(("sched",), "sched=cosine, tanh or poly", lambda r: r.sched in ("cosine", "tanh", "poly"))
_CROP = Use(("crop_mode",), "crop_mode=rrc, rkrc or rkrr", lambda r: r.crop_mode.startswith("r"))
_INIT = Use(("init",), "init", lambda r: r.init)
_EMA = Use(("ema",), "ema", lambda r: r.ema)
_ALL = Use(("freeze",), "freeze=false", lambda r: not r.freeze)

# By field. All ways of a field must be met, in recipes of the tasks that have it.
USES: Mapping[str, tuple[Use, ...]] = {
    "scale": (_CROP,),
    "ratio": (_CROP,),
    "crop_padding": (Use(("crop_mode",), "crop_mode=pad", lambda r: r.crop_mode == "pad"),),
    "color_jitter": (
        Use(
            ("auto_augment",),
            "auto_augment=none, or one of timm's with 3a",
            lambda r: "auto_augment" in r.UNUSED or not r.auto_augment or "3a" in r.auto_augment,
        ),
        Use(("in_chans",), "in_chans=3", lambda r: "auto_augment" not in r.UNUSED or r.in_chans == 3),
    ),
    "re_mode": (Use(("re_prob",), "re_prob", lambda r: r.re_prob),),
    "cache_dir": (Use(("cache",), "cache=disk", lambda r: r.cache == "disk"),),
    "val_fraction": (Use(("val_split",), "val_split=none", lambda r: r.val_split is None),),
    "init_partial": (_INIT,),
    "from_size": (_INIT,),
    "freeze_layers": (_ALL,),
    "freeze_stages": (_ALL,),
    "sched_args": (_SCHED,),
    "warmup_epochs": (_SCHED, Use(("warmup_updates",), "warmup_updates=0", lambda r: not r.warmup_updates)),
    "warmup_updates": (_SCHED,),
    "warmup_lr": (
        _SCHED,
        Use(
            ("warmup_epochs", "warmup_updates"),
            "warmup_epochs or warmup_updates",
            lambda r: r.warmup_epochs or r.warmup_updates,
        ),
    ),
    "min_lr": (_CURVE,),
    "cooldown_epochs": (_CURVE,),
    "ema_warmup": (_EMA,),
    "ema_base_batch": (_EMA,),
    "mixup_prob": (Use(("mixup", "cutmix"), "mixup or cutmix", lambda r: r.mixup or r.cutmix),),
    "mixup_switch_prob": (Use(("mixup", "cutmix"), "both", lambda r: r.mixup and r.cutmix),),
    "mesa_start": (Use(("mesa",), "mesa", lambda r: r.mesa),),
    "distil_temperature": (Use(("distil_kind",), "distil_kind=soft", lambda r: r.distil_kind == "soft"),),
    "distil_distance": (
        Use(("distil_kind",), "distil_kind=features or map", lambda r: r.distil_kind in ("features", "map")),
    ),
    "transfer_lr": (Use(("transfer_steps",), "transfer_steps", lambda r: r.transfer_steps),),
    "eval_stride": (Use(("eval_mode",), "eval_mode=slide", lambda r: r.eval_mode == "slide"),),
    "head_width": (Use(("method",), "a method of two stages or more", lambda r: r.method != "retinanet"),),
}


def told_idle(recipe: Recipe, name: str, overrides: Mapping[str, Any]) -> list[str]:
    """Lines on the fields that somebody set and that do nothing in a recipe, each with what would use it.

    name, overrides: of which `resolve` has made the recipe. Of a file are told those that differ from what they are by
    default: it may list all.
    """
    plain = type(recipe)()
    written = read_values(name)[1] if is_recipe_file(name) else {}
    set_there = [field for field in written if getattr(recipe, field, None) != getattr(plain, field, None)]
    lines = []
    for field in dict.fromkeys((*overrides, *set_there)):
        if field not in type(recipe).model_fields:
            continue
        value = f"{field}={shown(getattr(recipe, field))}"
        if field in recipe.UNUSED:
            lines.append(f"{value} has no effect with task={recipe.task}: {recipe.UNUSED[field]}")
        elif idle := next((use for use in USES.get(field, ()) if not use.used(recipe)), None):
            beside = " and ".join(f"{other}={shown(getattr(recipe, other))}" for other in idle.beside)
            lines.append(f"{value} has no effect with {beside}: set {idle.how}")
    return lines
