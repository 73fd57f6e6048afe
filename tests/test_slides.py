"""A slide as a bag of tiles, against its tiles one by one; bag models, masks and their mistakes; the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import linsight
from linsight.cli.app import main
from linsight.errors import CheckpointError, LinsightError
from linsight.models.bags import Acmil, bag_loss
from linsight.slides import attention_map, attention_picture, embed_slide, load_bag, load_bag_model, see_slide
from linsight.tasks import ClassifyRecipe
from linsight.train.model import build, save

tifffile = pytest.importorskip("tifffile")
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16}
GLASS = [(0, 1), (2, 2), (3, 4)]  # tiles without tissue
GRID = (4, 5)


def pixels():
    """60 x 70, which 16 does not divide: tissue but for some tiles."""
    found = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    for row, column in GLASS:
        found[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 250
    return found


@pytest.fixture
def slide(tmp_path):
    tifffile.imwrite(tmp_path / "slide.tif", pixels(), photometric="rgb", tile=(32, 48), compression="zlib")
    return tmp_path / "slide.tif"


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return linsight.create_model("vit_tiny", attention="inline", num_classes=3, **VIT).eval()


def test_a_slide_is_a_bag_of_its_tiles(slide, backbone, tmp_path):
    done = []
    bag = embed_slide(backbone, slide, batch_size=2, report=lambda *numbers: done.append(numbers))
    places = [(i, j) for i in range(GRID[0]) for j in range(GRID[1]) if (i, j) not in GLASS]
    assert bag.places.tolist() == [list(place) for place in places] and bag.grid == GRID and bag.tile == 16
    assert done[-1] == (20, 20)
    white = np.full((64, 80, 3), 255, np.uint8)
    white[:60, :70] = pixels()
    mean, std = (torch.tensor(backbone.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    for (i, j), feature in zip(places, bag.features, strict=True):
        tile = torch.from_numpy(white[i * 16 : i * 16 + 16, j * 16 : j * 16 + 16] / 255).float().movedim(-1, 0)
        with torch.no_grad():
            alone = backbone.forward_head(backbone.forward_features((tile - mean)[None] / std), pre_logits=True)
        torch.testing.assert_close(feature, alone[0], rtol=1e-4, atol=1e-5)
    everything = embed_slide(backbone, slide, tissue=0)
    assert len(everything.places) == 20
    bag.save(tmp_path / "bag.safetensors")
    again = load_bag(tmp_path / "bag.safetensors")
    assert torch.equal(again.features, bag.features) and again.grid == bag.grid and again.tile == bag.tile


def test_tiles_of_another_side_are_resized(slide, backbone):
    bag = embed_slide(backbone, slide, tile=32)
    assert bag.grid == (2, 3) and bag.picture.shape == (3, 64, 96) and bag.features.shape == (6, 16)


def test_an_answer_and_its_picture(slide, backbone):
    bag = embed_slide(backbone, slide)
    model = Acmil(16, 2, kind="multihead", branches=2).eval()
    seen = see_slide(model, bag)
    assert seen.probabilities.shape == (2,) and abs(float(seen.weights.sum()) - 1) < 1e-5
    weights = torch.zeros(len(bag.places))
    weights[3] = 1.0
    shown = attention_map(bag, weights)
    assert shown[tuple(bag.places[3].tolist())] == 1
    assert sorted(shown.isnan().nonzero().tolist()) == [[*place] for place in GLASS]
    drawn = np.asarray(attention_picture(bag, weights, strength=1.0))
    side = bag.picture.shape[1] // bag.grid[0]
    assert drawn.shape[:2] == (64, 80) and side == 16
    row, column = bag.places[3] * side
    assert tuple(drawn[row, column]) == (253, 231, 37)
    assert (drawn[:16, 16:32] == 250).all()  # glass is as it is
    with pytest.raises(LinsightError, match="backbone that it was trained with"):
        see_slide(Acmil(8, 2).eval(), bag)


@pytest.mark.parametrize("kind", ["gated", "multihead"])
def test_padded_bags_are_bags_alone(kind):
    model = Acmil(12, 3, kind=kind, branches=3, inner_dim=16).eval()
    bags = torch.randn(2, 9, 12)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    bags[1, 5:] = torch.nan
    both = model(bags, keep)
    alone = model(bags[1:, :5])
    torch.testing.assert_close(both.logits[1:], alone.logits)
    torch.testing.assert_close(both.weights[1, :5], alone.weights[0])
    assert not both.weights[1, 5:].any()
    half = model.bfloat16()(torch.randn(1, 9, 12, dtype=torch.bfloat16))
    assert half.logits.dtype == torch.bfloat16 and half.scores.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gated", "multihead"])
def test_top_patches_are_left_out_in_training(kind):
    model = Acmil(12, 2, kind=kind, branches=2, inner_dim=16, n_masked=4, mask_drop=0.5)
    bags = torch.randn(1, 20, 12)
    free = model.eval()(bags).scores
    scores = model.train()(bags).scores
    drawn = scores == -1e9
    assert (drawn.sum(-1) == 2).all()
    assert (~drawn | (free >= free.topk(4, dim=-1).values[..., -1:])).all()
    torch.testing.assert_close(scores[~drawn], free[~drawn])
    few = model(bags[:, :1])
    assert few.logits.isfinite().all()


def test_one_branch_has_one_term():
    out = Acmil(12, 2, branches=1).eval()(torch.randn(3, 7, 12))
    terms = bag_loss(out, torch.tensor([0, 1, 1]))
    assert terms.total == terms.slide and not terms.branch and not terms.diversity


@pytest.mark.parametrize("kind", ["gated", "multihead"])
def test_weights_tell_the_sizes(kind, tmp_path):
    model = Acmil(12, 3, kind=kind, branches=2, inner_dim=16, hidden_dim=6)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "bag.pth")
    again = load_bag_model(tmp_path / "bag.pth")
    assert again.kind == kind and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="no bag model"):
        load_bag_model({"head.weight": torch.zeros(2, 2)})


def test_mistakes_are_told(slide, backbone, tmp_path):
    for mistake, word in (
        (lambda: embed_slide(backbone, np.full((20, 20, 3), 250, np.uint8)), "tissue=0"),
        (lambda: embed_slide(backbone.train(), slide), "training mode"),
        (lambda: embed_slide(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)).eval(), slide, tile=16), "one vector each"),
        (lambda: load_bag(tmp_path / "none.safetensors"), "no such bag"),
        (lambda: load_bag(slide), "no bag of tiles"),
        (lambda: Acmil(12, 2, kind="gate"), "gated"),
        (lambda: Acmil(12, 2, kind="multihead", inner_dim=12), "does not divide"),
        (lambda: Acmil(12, 2)(torch.zeros(1, 3, 4)), "batch, patches, 12"),
        (lambda: Acmil(12, 2)(torch.zeros(1, 3, 12), torch.zeros(1, 3, dtype=torch.bool)), "a patch in each bag"),
    ):
        with pytest.raises(LinsightError, match=word):
            mistake()


def test_the_command(slide, tmp_path, monkeypatch, capsys):
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    recipe = ClassifyRecipe(model="vit_tiny", attention="inline", model_args=args, img_size=(16, 16))
    save(tmp_path / "best.safetensors", build(recipe, 3).state_dict(), recipe, {"classes": ("a", "b", "c")})
    torch.save(Acmil(16, 2).state_dict(), tmp_path / "bag.pth")
    common = ["linsight", "slide", str(tmp_path / "best.safetensors"), str(slide), "--device", "cpu", "--amp", "off"]
    asked = ["--bag-model", str(tmp_path / "bag.pth"), "--classes", "benign,tumour", "--json"]
    files = ["--picture", str(tmp_path / "a.png"), "--bag", str(tmp_path / "bag.safetensors")]
    monkeypatch.setattr("sys.argv", [*common, *asked, *files])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] in ("benign", "tumour") and found["tiles"] == 17 and found["of"] == 20
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (80, 64)
    assert load_bag(tmp_path / "bag.safetensors").features.shape == (17, 16)
    monkeypatch.setattr("sys.argv", common)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--bag-model" in capsys.readouterr().err
