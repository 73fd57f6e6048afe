"""Random features and hashes that training makes anew: when, from which seed, in the averaged weights, in vain."""

import pytest
import torch
from small import TINY

from linsight.data.images import Batch
from linsight.errors import LinsightError
from linsight.tasks import task_of
from linsight.train import load_trained, resolve, train
from linsight.train.learner import Learner
from linsight.train.model import build
from linsight.train.progress import Silent

CPU = torch.device("cpu")


def learner(attention, **overrides):
    recipe = resolve("digits", {**TINY, "attention": attention, "redraw_every": 2, **overrides})
    torch.manual_seed(0)
    task = task_of(recipe, {"classes": tuple("0123456789")})
    new = ["head.weight", "head.bias"] if recipe.init else None
    return Learner(task, build(recipe, 10), CPU, None, updates=5, new=new)


def drawn(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".core." in name}


def renew(ours, done, seed=1):
    images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    (part,) = ours.parts(Batch(images, torch.zeros(4, dtype=torch.long), []))
    ours.renew(part, done // 5, done % 5, done)
    return drawn(ours.model)


def same(a, b):
    assert a and a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a if "projection_matrix" not in name or a[name].any())


@pytest.mark.parametrize("attention", ["performer", "yoso", "ecoformer"])
def test_every_second_update(attention):
    ours = learner(attention, ema=0.5)
    start = drawn(ours.model)
    first = renew(ours, 0)
    assert not same(first, start)
    assert same(renew(ours, 0, seed=2), first)  # a second part of the update
    assert same(renew(ours, 1), first)
    second = renew(ours, 2)
    assert not same(second, first)
    assert same(drawn(ours.ema.module), second)
    again = learner(attention)
    assert same(renew(again, 2), second)  # a run that goes on there
    assert not same(renew(learner(attention, seed=1), 2), second)


def test_as_published_or_never():
    for attention, every in (("performer", 1000), ("yoso", 1), ("ecoformer", 300)):
        ours = learner(attention, redraw_every=None)
        first = renew(ours, 0)
        assert same(renew(ours, every + 1), first) == (every > 1)
        assert not same(renew(ours, 2 * every), first)
        never = learner(attention, redraw_every=0)
        start = drawn(never.model)
        assert same(renew(never, 0), start) and same(renew(never, every), start)


def test_what_weights_were_started_from_is_kept_at_first():
    ours = learner("performer", init="weights.safetensors")
    start = drawn(ours.model)
    assert same(renew(ours, 0), start)
    assert not same(renew(ours, 2), start)
    of_another = learner("performer", init="weights.safetensors", init_partial=True)
    assert not same(renew(of_another, 0), start)


def test_a_hash_is_of_the_tokens_and_nothing_else_changes():
    ours = learner("ecoformer")
    weights = {name: weight.clone() for name, weight in ours.model.named_parameters()}
    renew(ours, 0)
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.model.named_parameters())
    for core in ours.renewal.cores.values():
        seen = []
        handle = core.register_forward_pre_hook(lambda core, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
            ours.model.eval()(ours.task.inputs(images[:1]))
        handle.remove()
        tokens = torch.nn.functional.normalize(seen[0].q[0], dim=-1)  # (N, H, D)
        nearest = torch.cdist(core.anchor[0], tokens.transpose(0, 1)).amin(dim=-1)
        assert nearest.max() < 1e-5


def test_layers_that_are_not_trained_keep_theirs():
    ours = learner("performer", freeze_layers=2, init="weights.safetensors")
    start = drawn(ours.model)
    after = renew(ours, 2)
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)
    assert not learner("performer", freeze=True, init="weights.safetensors").renewal.cores


def test_a_core_that_is_used_twice_is_fitted_to_what_it_sees_first():
    ours, other = learner("ecoformer"), learner("ecoformer")
    ours.model.blocks[1] = ours.model.blocks[0]
    ours.renewal = type(ours.renewal)(ours.recipe, ours.model, None, ours.spread.processes)
    core = "blocks.0.attn.core.anchor"
    assert torch.equal(renew(ours, 0)[core], renew(other, 0)[core])


def test_a_core_that_sees_no_tokens_is_told():
    ours = learner("ecoformer")
    core = next(iter(ours.renewal.cores.values()))
    with pytest.raises(LinsightError, match="redraw_every"):
        ours.renewal.before(0, 0, 0, lambda: None)
    assert not core._forward_pre_hooks
    learner("ecoformer", redraw_every=None).renewal.before(0, 0, 0, lambda: None)  # nobody asked for it


def test_a_run_draws_and_says_where_there_is_nothing_to_draw(tmp_path):
    class Notes(Silent):
        def __init__(self):
            self.lines = []

        def note(self, line):
            self.lines.append(line)

    runs, notes = {}, Notes()
    for every in (0, 1):
        given = {**TINY, "attention": "performer", "redraw_every": every}
        train(resolve("digits", given), out=tmp_path / str(every), report=notes)
        runs[every] = drawn(load_trained(tmp_path / str(every)).model)
    assert not same(runs[0], runs[1])
    assert not any("redraw_every" in line for line in notes.lines)
    train(resolve("digits", {**TINY, "attention": "linear", "redraw_every": 3}), out=tmp_path / "none", report=notes)
    assert any("redraw_every=3 has no effect" in line for line in notes.lines)
