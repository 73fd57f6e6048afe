"""The preparation of images in a graph, beside timm's transform of Pillow images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from linsight.data.images import eval_transform, statistics
from linsight.errors import LinsightError
from linsight.export import Served
from linsight.tasks import ClassifyRecipe

SIZES = [(64, 64), (97, 131), (33, 200), (150, 40), (16, 16), (1, 1), (1, 37), (240, 260), (20, 14)]


def picture(height, width, channels):
    """Gradients with noise, and with opacities from none to all."""
    rng = np.random.default_rng(height + width)
    rows, columns = np.mgrid[0:height, 0:width]
    layers = [(rows * (3 + c) + columns * (7 - c)) % 256 for c in range(channels)]
    pixels = np.stack(layers, -1) + rng.integers(-30, 30, (height, width, channels))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    if channels == 4:
        pixels[::3, :, 3] = 0
        pixels[1::3, ::2, 3] = 255
    return pixels


def image(pixels):
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


@pytest.mark.parametrize("crop", ["squash", "center", "border"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "interpolation", "pct"),
    [((16, 16), "bicubic", 0.875), ((16, 24), "bilinear", 0.9), ((23, 15), "bicubic", 1)],
)
def test_pixels_are_those_of_timm(crop, channels, size, interpolation, pct):
    mean = (0.4, 0.5, 0.6, 0.7)[:channels]
    recipe = ClassifyRecipe(
        in_chans=channels, mean=mean, std=(0.2,) * channels, interpolation=interpolation, crop_pct=pct, eval_crop=crop
    )
    transform = eval_transform(recipe, size)
    served = Served(nn.Flatten(), size, *statistics(recipe), interpolation=interpolation, crop_pct=pct, crop_mode=crop)
    for height, width in SIZES:
        pixels = picture(height, width, channels)
        try:
            wanted = transform(image(pixels)).float()
        except ValueError:  # nothing is left of such a side
            assert crop == "border" and min(height, width) == 1
            continue
        found = served.prepare(torch.from_numpy(pixels)[None])[0]
        assert found.shape == wanted.shape and torch.equal(found, found.round())
        error = (found - wanted).abs()
        if channels == 4:  # where little is to be seen of a colour, a level of what is makes many of it
            error[:3] *= wanted[3:] / 255
        if height <= width:  # of taller ones, newer versions of Pillow resize rows first
            assert error.max() <= (1 if channels < 4 else 2) and (error > 0).float().mean() < 0.06, (
                height,
                width,
                error.max(),
            )
        else:
            assert error.mean() < 0.5, (height, width, error.mean())


def test_probabilities_are_those_of_the_transform(small):
    recipe = ClassifyRecipe(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25), eval_crop="center")
    mean, std = statistics(recipe)
    served = Served(small, (32, 32), mean, std, crop_mode="center")
    pixels = np.stack([picture(80 + i, 64 + i, 3)[:80, :64] for i in range(3)])
    prepared = torch.stack([eval_transform(recipe, (32, 32))(image(one)) for one in pixels]).float()
    images = (prepared / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    wanted = small(images).softmax(-1)
    found = served(torch.from_numpy(pixels))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    torch.testing.assert_close(found.sum(-1), torch.ones(3))


def test_pixels_stay_in_float32_in_a_half_model(small):
    served = Served(small, (16, 16), (0.5,) * 3, (0.2,) * 3)
    pixels = torch.from_numpy(picture(40, 30, 3))[None]
    wanted = served(pixels)
    small.half()
    found = served(pixels)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("given", "told"), [({"interpolation": "lanczos"}, "lanczos"), ({"crop_mode": "five"}, "five")]
)
def test_what_has_no_form_in_a_graph_is_one_line(small, given, told):
    with pytest.raises(LinsightError, match=told) as error:
        Served(small, (16, 16), (0.5,) * 3, (0.2,) * 3, **given)
    assert "\n" not in str(error.value)
