"""Streaming is the dense forward: any mechanism, host, image size and tile size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import linsight
from linsight.attention import is_block

from .hosts import PLAIN, SMALL, STREAMING, close, image, small, whole

few = settings(max_examples=3, deadline=None, derandomize=True, database=None)


def same_as_dense(model, picture, tile):
    found = [linsight.stream(model, picture, tile=tile, output=name, **PLAIN) for name in ("map", "logits")]
    spatial, _, logits = whole(model, picture)
    close(found[0].flatten(0, 1), spatial)
    close(found[1], logits)


@pytest.mark.parametrize("attention", STREAMING)
def test_every_mechanism_in_a_vit(attention):
    model = small("vit_tiny", attention, cpe=not is_block(attention))

    @few
    @given(st.integers(9, 40), st.integers(9, 40), st.integers(12, 36))
    def check(height, width, tile):
        same_as_dense(model, image(height, width), tile)

    check()


@pytest.mark.parametrize("host", [host for host in SMALL if host != "vit_tiny"])
def test_every_host(host):
    @few
    @given(st.integers(33, 90), st.integers(33, 90), st.integers(30, 64), st.sampled_from(STREAMING))
    def check(height, width, tile, attention):
        same_as_dense(small(host, attention), image(height, width), tile)

    check()


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": "siamese"},
        {"steps": [(8, 1), (16, 1)]},
        {"norm": "siamese", "steps": [(8, 1), (16, 1)]},
        {"reg_tokens": 3, "no_embed_class": True, "pre_norm": True},
        {"patch_size": (4, 6), "global_pool": "avg"},
        {"border": 2, "global_pool": "avg"},
    ],
)
def test_every_form_of_the_vit(arguments):
    same_as_dense(small("vit_tiny", "inline", cpe=True, **arguments), image(29, 34), 15)


def test_a_class_token_behind_a_pyramid():
    model = small("pvt_tiny", "inline", global_pool="token")
    same_as_dense(model, image(70, 97), 40)
    close(linsight.stream(model, image(70, 97), tile=40, output="features", **PLAIN), whole(model, image(70, 97))[1])
