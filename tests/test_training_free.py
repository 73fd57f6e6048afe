"""Token merging and AgentSD: the functions, and what they do to models of diffusers and of latent diffusion."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from golden.builders.agent_sd import OneBlock
from linsight.convert import agent_sd, merge_tokens, remove_merging
from linsight.convert.merging import agent_attention, count_merged, match_tokens, merge_sources, unmerge_sources
from linsight.convert.training_free import Counts, Setting
from linsight.errors import CapabilityError, LinsightError

# ---- merging


def by_loops(x, grid, cell, places, count):
    """Merged tokens of one image `(N, C)`, and for each token the number of the merged one that stands for it."""
    (height, width), (rows, columns) = grid, cell
    destinations = []
    for top in range(0, height - rows + 1, rows):
        for left in range(0, width - columns + 1, columns):
            place = 0 if places is None else int(places[top // rows, left // columns])
            destinations.append((top + place // columns) * width + left + place % columns)
    destinations.sort()
    sources = [i for i in range(height * width) if i not in destinations]
    found = []
    for source in sources:
        likeness = [float(F.cosine_similarity(x[source], x[d], dim=0)) for d in destinations]
        best = max(likeness)
        found.append((-best, source, likeness.index(best)))
    found.sort()
    kept = [source for _, source, _ in found[count:]]
    members = [[x[d]] for d in destinations]
    stands = {source: i for i, source in enumerate(kept)} | {d: len(kept) + i for i, d in enumerate(destinations)}
    for _, source, target in found[:count]:
        members[target].append(x[source])
        stands[source] = len(kept) + target
    tokens = [x[i] for i in kept] + [torch.stack(group).mean(dim=0) for group in members]
    return torch.stack(tokens), [stands[i] for i in range(height * width)]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(
    ("grid", "cell", "ratio"),
    [((4, 4), (2, 2), 0.5), ((5, 7), (2, 3), 0.3), ((1, 11), (1, 4), 0.9), ((6, 3), (3, 1), 0)],
)
def test_tokens_are_merged_as_by_loops(grid, cell, ratio, drawn):
    x = torch.randn(2, math.prod(grid), 6, dtype=torch.float64)
    cells = (grid[0] // cell[0], grid[1] // cell[1])
    places = torch.randint(math.prod(cell), cells) if drawn else None
    count, _ = count_merged(grid, cell, ratio)
    match = match_tokens(x, grid, cell, places)
    tokens = merge_sources(x, match, count)
    back = unmerge_sources(tokens, match, count)
    for b in range(2):
        expected, stands = by_loops(x[b], grid, cell, places, count)
        torch.testing.assert_close(tokens[b], expected)
        torch.testing.assert_close(back[b], expected[stands])


def test_counts_are_those_of_the_paper():
    assert count_merged((64, 64), (4, 4), 0.4, 0.95) == (1638, 3840)
    assert count_merged((64, 64), (2, 2), 0.4, 0.5) == (1638, None)  # agents would not pay
    assert count_merged((64, 64), (2, 2), 1.0) == (3072, None)  # one token a cell stays
    assert count_merged((3, 64), (4, 4), 0.4, 0.95) == (0, None)  # no whole cell
    assert count_merged((8, 8), (1, 1), 0.4, 0.95) == (0, None)  # no source
    assert count_merged((8, 8), (2, 2), 0, 0.5) == (0, None)  # half as many as tokens
    assert count_merged((8, 8), (2, 2), 0, 0.6) == (0, 38)  # agents of tokens that are not merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_of_zeros_and_large_groups_stay_finite(dtype):
    zeros = torch.zeros(1, 64, 8, dtype=dtype)
    match = match_tokens(zeros, (8, 8))
    assert torch.equal(unmerge_sources(merge_sources(zeros, match, 48), match, 48), zeros)
    some = torch.ones(1, 64, 8, dtype=dtype)
    some[:, [9, 27]] = 0  # sources, like nothing
    assert match_tokens(some, (8, 8)).sources[0, -2:].tolist() == [9, 27]
    alike = torch.full((1, 1024, 8), 100.0, dtype=dtype)  # all into one token: their sum is past float16
    match = match_tokens(alike, (32, 32), (32, 32))
    assert torch.equal(merge_sources(alike, match, 1023), alike[:, :1])


def test_images_of_a_batch_do_not_see_each_other():
    x = torch.randn(2, 36, 8)
    both, alone = (merge_sources(y, match_tokens(y, (6, 6)), 10) for y in (x, x[1:]))
    torch.testing.assert_close(both[1:], alone)


def test_merging_passes_gradients():
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    match = match_tokens(x, (3, 3), (3, 3))
    assert torch.autograd.gradcheck(lambda y: unmerge_sources(merge_sources(y, match, 4), match, 4), x)


def test_attention_by_agents_is_the_formula():
    q, k, v = torch.randn(3, 2, 3, 20, 4, dtype=torch.float64)
    agents = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    scale = 4**-0.5
    gathered = (scale * agents @ k.mT).softmax(dim=-1) @ v
    expected = (scale**0.3 * q @ agents.mT).softmax(dim=-1) @ gathered + 0.075 * v
    torch.testing.assert_close(agent_attention(q, k, v, agents), expected)
    many = torch.randn(2, 3, 10, 4, dtype=torch.float64)  # half as many as tokens: they do not pay
    torch.testing.assert_close(agent_attention(q, k, v, many), F.scaled_dot_product_attention(q, k, v))


# ---- blocks of latent diffusion


class Timed(OneBlock):
    """A network that is called with latents, timesteps and text."""

    def __init__(self, **options):
        super().__init__(16, 12, 2, 8, **options)

    def forward(self, x, timesteps=None, context=None):
        return super().forward(x, context)


@pytest.fixture
def host():
    """One that notes how many tokens its self-attention sees, in `seen`."""
    model = Timed().eval()
    model.seen = []
    model.block.attn1.to_k.register_forward_hook(lambda module, args, out: model.seen.append(out.shape[1]))
    return model


LATENT, TEXT = torch.randn(2, 16, 12, 10), torch.randn(2, 7, 12)


@torch.no_grad()
def call(model, time=None, latent=LATENT):
    return model(latent, time, TEXT)


def test_nothing_is_left_behind(host):
    """Neither by removal nor by settings that merge nothing nor by one merging after another."""
    before, kept, plain = dict(vars(host.block.attn1)), host.state_dict(), call(host)
    for settings in ({"ratio": 0}, {"ratio": 0.5, "cell": (13, 2)}):
        merging = merge_tokens(host, **settings)
        assert torch.equal(call(host), plain)
    for _ in range(3):
        merging = merge_tokens(host, 0.5)
    host.seen.clear()
    assert not torch.equal(call(host), plain)
    assert host.seen == [60]  # merged once
    assert host.state_dict().keys() == kept.keys()
    merging.remove()
    merging.remove()
    assert vars(host.block.attn1) == before
    assert not host._forward_pre_hooks and not host._forward_hooks and not host.block._forward_pre_hooks
    assert torch.equal(call(host), plain)


def test_a_forward_of_somebody_else_is_kept(host):
    attn, plain = host.block.attn1, call(host)
    merge_tokens(host, 0.5)
    merged = call(host)
    remove_merging(host)

    own = attn.forward
    attn.forward = theirs = lambda x, context=None: 2 * own(x, context)
    doubled = call(host)
    merging = merge_tokens(host, 0.5)  # over theirs
    assert not torch.equal(call(host), merged)
    merging.remove()
    assert attn.forward is theirs and torch.equal(call(host), doubled)
    del attn.forward

    merging = merge_tokens(host, 0.5)
    ours = attn.forward
    attn.forward = theirs = lambda x, context=None: ours(x, context)  # around ours
    torch.testing.assert_close(call(host), merged)
    merging.remove()
    assert attn.forward is theirs and torch.equal(call(host), plain)


def test_steps_are_counted_by_timesteps(host):
    merging = merge_tokens(host, 0.4, cell=(4, 4), agents=0.95, later={2: Setting(0.5), 4: Setting(0)})
    host.seen.clear()
    times = (981, 961, 961, 941, torch.tensor([921, 921]), 901, 881)  # one twice, as for guidance
    steps = []
    for time in times:
        call(host, time)
        steps.append(merging.step)
    assert steps == [0, 1, 1, 2, 3, 4, 5]
    assert host.seen == [72, 72, 72, 60, 60, 120, 120]
    call(host, 981)  # another image
    assert merging.step == 0 and merging.counts == {"block": Counts(120, 72, 6)}
    merging.step = 3  # an image that begins half-way
    call(host, 500)
    assert merging.step == 3
    call(host, 480)
    assert merging.step == 4 and merging.counts == {"block": Counts(120, 120, 0)}


def test_the_published_schedule(host):
    merging = agent_sd(host, 0.4, steps=50)
    assert merging.schedule == {0: Setting(0.4, (4, 4), 0.95), 20: Setting(0.4, (2, 2), 0.5)}
    assert list(agent_sd(host, steps=2).schedule) == [0, 1] == list(agent_sd(host, steps=4).schedule)


def test_agents_of_tokens_that_are_not_merged(host):
    merging = merge_tokens(host, 0, cell=(4, 4), agents=0.95)
    plain = call(host)
    assert merging.counts == {"block": Counts(120, 120, 6)} and host.seen == [120]
    merging.remove()
    assert not torch.allclose(call(host), plain)


def test_drawn_destinations_hold_for_a_step(host):
    def outputs(seed):
        merge_tokens(host, 0.5, generator=torch.Generator().manual_seed(seed))
        return [call(host, time) for time in (9, 9, 8)]

    first, again, later = outputs(0)
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert all(map(torch.equal, outputs(0), (first, again, later)))
    assert not torch.equal(outputs(1)[0], first)
    merge_tokens(host, 0.5)
    assert torch.equal(call(host, 9), call(host, 8))


def test_text_as_keys_is_read_by_merged_tokens_without_agents():
    host = Timed(disable_self_attn=True).eval()
    merging = merge_tokens(host, 0.4, cell=(4, 4), agents=0.95)
    assert call(host).isfinite().all()
    merging.remove()
    other = merge_tokens(host, 0.4, cell=(4, 4))
    assert torch.equal(call(host), call(host)) and other.counts["block"].attended == 72


def test_the_zero_control_is_the_mean_of_values(host):
    attn = host.block.attn1
    x = torch.randn(2, 120, 16)
    merge_tokens(host, 0, zero_control=True)
    outs = []
    attn.register_forward_hook(lambda module, args, out: outs.append((args[0], out)))
    call(host)
    ((y, out),) = outs
    torch.testing.assert_close(out, attn.to_out(attn.to_v(y).mean(dim=1, keepdim=True)).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full(host, dtype):
    merge_tokens(host, 1.0, cell=(4, 4), agents=1.0)  # which source is most like its destination does not matter
    full = call(host)
    with torch.no_grad():
        half = host.to(dtype)(LATENT.to(dtype), None, TEXT.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)
    zeros = torch.zeros_like(LATENT, dtype=dtype)
    with torch.no_grad():
        assert host(zeros, None, TEXT.to(dtype)).isfinite().all()


def test_copies_are_their_own(host):
    merge_tokens(host, 0.5)
    other = copy.deepcopy(host)
    merged = call(host)
    remove_merging(host)
    plain = call(host)
    assert torch.equal(call(other), merged) and not torch.equal(plain, merged)
    remove_merging(other)
    assert torch.equal(call(other), plain)


def test_weights_load_while_tokens_are_merged(host):
    merge_tokens(host, 0.5)
    file = io.BytesIO()
    torch.save(host.state_dict(), file)
    file.seek(0)
    other = Timed().eval()
    merge_tokens(other, 0.5)
    other.load_state_dict(torch.load(file))
    assert torch.equal(call(other), call(host))


def test_a_graph_for_each_setting():
    torch._dynamo.reset()
    host, counter = Timed().eval(), CompileCounter()
    agent_sd(host, 0.4, steps=5)
    expected = [call(host, 9 - step) for step in range(4)]
    host.compile(backend=counter)
    for step, out in enumerate(expected):
        torch.testing.assert_close(call(host, 9 - step), out)
        assert counter.frame_count == (1 if step < 2 else 2)


def test_bad_input_is_refused_in_a_line(host):
    for settings, told in (
        ({"ratio": 1.5}, r"ratio=1.5: .* from 0 to 1"),
        ({"agents": -1}, "agents=-1"),
        ({"ratio": math.nan}, "ratio=nan"),
        ({"cell": (0, 2)}, r"cell=\(0, 2\): .* as \(2, 2\)"),
        ({"cell": (2,)}, r"cell=\(2,\)"),
        ({"later": {0: Setting()}}, r"later=\[0\]: .*step 1"),
        ({"max_downsample": 0}, "max_downsample=0"),
    ):
        with pytest.raises(LinsightError, match=told):
            merge_tokens(host, **settings)
    with pytest.raises(LinsightError, match="no BasicTransformerBlock"):
        merge_tokens(torch.nn.Linear(2, 2))
    with pytest.raises(LinsightError, match=r"object is no module: .* pipe.unet"):
        merge_tokens(object())
    merging = merge_tokens(host)
    with pytest.raises(LinsightError, match="step=-1"):
        merging.step = -1
    with pytest.raises(LinsightError, match=r"first argument of Timed .* latents"):
        host(torch.randn(2, 120, 16), None, TEXT)
    remove_merging(host)
    merge_tokens(host)
    with pytest.raises(LinsightError, match="a block was called, but not the model"):
        host.block(torch.randn(2, 120, 16), TEXT)
    host.block.attn1.norm_q = torch.nn.LayerNorm(8)
    with pytest.raises(LinsightError, match=r"block.attn1 has norm_q: .* alone"):
        merge_tokens(host)
    del host.block.attn1.norm_q, host.block.attn1.heads
    with pytest.raises(LinsightError, match=r"block.attn1 lacks heads"):
        merge_tokens(host)


def test_a_mask_is_refused_where_tokens_are_merged(host):
    mask = torch.ones(2, 120, 120, dtype=torch.bool)[:, None]

    def masked(module, args, kwargs):
        return args, kwargs | {"mask": mask}

    host.block.attn1.register_forward_pre_hook(masked, with_kwargs=True)
    plain = call(host)
    merge_tokens(host, 0)
    assert torch.equal(call(host), plain)
    merge_tokens(host, 0.5)
    with pytest.raises(CapabilityError, match=r"block.attn1: merged tokens have no attention mask"):
        call(host)


# ---- networks of diffusers


def unet(kind="sd1"):
    """A small network: as SD 1.x its first level has attention, as SDXL it has not, but deep blocks below."""
    diffusers = pytest.importorskip("diffusers")
    shared = {"sample_size": 16, "cross_attention_dim": 12, "norm_num_groups": 4, "block_out_channels": (8, 16)}
    if kind == "sd1":
        return diffusers.UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            **shared,
        ).eval()
    return diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        **shared,
    ).eval()


ADDED = {"text_embeds": torch.randn(2, 12), "time_ids": torch.arange(12.0).view(2, 6)}


@torch.no_grad()
def denoise(model, time=981, size=(16, 16)):
    """Both halves of guidance, as pipelines call it."""
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    added = ADDED if model.config.addition_embed_type else None
    return model(latent, torch.tensor(time), encoder_hidden_states=TEXT, added_cond_kwargs=added, return_dict=False)[0]


@pytest.fixture(scope="module")
def made():
    """Each kind of network, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers' imports
        return {kind: unet(kind) for kind in ("sd1", "sdxl")}


@pytest.fixture
def networks(made):
    yield made
    for model in made.values():
        remove_merging(model)


@pytest.mark.parametrize(("kind", "downsample", "blocks", "tokens"), [("sd1", 1, 3, 256), ("sdxl", 2, 8, 64)])
def test_networks_of_diffusers(networks, kind, downsample, blocks, tokens):
    model = networks[kind]
    before, plain = {name: dict(vars(m)) for name, m in model.named_modules()}, denoise(model)
    merge_tokens(model, 0, max_downsample=downsample)
    assert torch.equal(denoise(model), plain)

    seen = []
    handles = [
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        for name, module in model.named_modules()
        if name.endswith("attn1.to_k") and not (kind == "sd1" and "mid" in name)  # on the next level
    ]
    merging = agent_sd(model, 0.4, steps=5, max_downsample=downsample)
    agents = denoise(model, 900)
    kept, fewest = tokens - int(0.4 * tokens), tokens // 16
    assert seen == [kept] * len(merging.counts)
    assert {*merging.counts.values()} == {Counts(tokens, kept, fewest)}
    assert len(merging.counts) == blocks
    denoise(model, 700)
    late = denoise(model, 500)
    assert {*merging.counts.values()} == {Counts(tokens, kept, 0)}
    assert len({x.sum().item() for x in (plain, agents, late)}) == 3

    merging.remove()
    for handle in handles:
        handle.remove()
    assert torch.equal(denoise(model), plain)
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def test_coarse_levels_are_left_alone_and_that_is_told(networks):
    model = networks["sdxl"]
    plain = denoise(model)
    merge_tokens(model, 0.5)
    with pytest.warns(UserWarning, match=r"blocks see 64 at most, of a latent of 16x16: max_downsample=2 merges there"):
        assert torch.equal(denoise(model), plain)
    assert torch.equal(denoise(model), plain)  # told once


@pytest.mark.parametrize("size", [(10, 14), (9, 13), (1, 26)])
def test_latents_of_any_size(networks, size):
    for kind, downsample in (("sd1", 1), ("sdxl", 2)):
        merging = agent_sd(networks[kind], 0.5, max_downsample=downsample)
        assert denoise(networks[kind], size=size).isfinite().all()
        tokens = math.prod(-(-side // downsample) for side in size)
        assert {count.tokens for count in merging.counts.values()} == {tokens}


def test_processors_of_the_user_stay(networks):
    """Whatever attention runs on the merged tokens, agents stay, and removal does not touch it."""
    from diffusers.models.attention_processor import AttnProcessor

    model = networks["sd1"]
    merging = agent_sd(model)
    expected = denoise(model)
    model.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(denoise(model), expected)
    merging.remove()
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
    model.set_default_attn_processor()


def test_gradients_pass_and_are_those_of_checkpointing(networks):
    model = networks["sd1"]
    merge_tokens(model, 0.4, cell=(4, 4), agents=0.95, generator=torch.Generator().manual_seed(0))
    latent, found = torch.randn(1, 4, 16, 16), []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.train().zero_grad()
        model(latent, 5, TEXT[:1]).sample.square().mean().backward()
        found.append(model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.grad.clone())
    model.eval().disable_gradient_checkpointing()
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0
