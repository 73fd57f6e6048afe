"""Which mechanism stands in which block."""

import pytest

from linsight.errors import LinsightError, UnknownNameError
from linsight.models import plan


def names(*args):
    return [[choice.name for choice in stage] for stage in plan(*args)]


@pytest.mark.parametrize(
    ("attention", "depths", "wanted"),
    [
        ("inline", [2, 1], [["inline"] * 2, ["inline"]]),
        ("inline, softmax", [2, 1], [["inline"] * 2, ["softmax"]]),
        ("inline:2/softmax", [3], [["inline", "inline", "softmax"]]),
        ("inline:1/softmax", [2, 3], [["inline", "softmax"], ["inline", "softmax", "softmax"]]),
        ("inline,linear:1/softmax", [1, 2], [["inline"], ["linear", "softmax"]]),
        ("softmax~inline", [3, 2], [["softmax", "inline", "softmax"], ["softmax", "inline"]]),
        ("linear:1/softmax ~ inline", [4], [["linear", "softmax", "inline", "softmax"]]),
        ("inline:9/softmax", [2], [["inline", "inline"]]),
        ("inline:0/softmax", [2], [["softmax", "softmax"]]),
    ],
)
def test_names(attention, depths, wanted):
    assert names(attention, depths) == wanted


def test_options_go_to_the_first_mechanism_named():
    (first, second), (third,) = plan("inline:1/softmax,inline", [2, 1], {"feature_map": "relu"})
    assert (first.options, second.options, third.options) == ({"feature_map": "relu"}, {}, {"feature_map": "relu"})


def test_a_list_gives_one_value_to_each_stage():
    rows = plan("inline,softmax,inline", [1, 2, 1], {"feature_map": ["relu", "exp", "identity"], "local": False})
    assert [[choice.options for choice in row] for row in rows] == [
        [{"feature_map": "relu", "local": False}],
        [{}, {}],
        [{"feature_map": "identity", "local": False}],
    ]
    with pytest.raises(LinsightError, match="lists 2 values, but this host has 3 stages"):
        plan("inline", [1, 1, 1], {"feature_map": ["relu", "exp"]})
    with pytest.raises(UnknownNameError, match="did you mean 'relu'"):
        plan("inline", [1, 1], {"feature_map": ["exp", "rely"]})


def test_values_of_options_that_blocks_take_in_turn():
    rows = plan("nat:3/softmax,softmax,nat", [4, 1, 3], {"dilation": ["1~8", 1, "[1, 2] ~ 2~3"], "rpb": "true~false"})
    assert [[choice.options for choice in row] for row in rows] == [
        [{"dilation": 1, "rpb": True}, {"dilation": 8, "rpb": False}, {"dilation": 1, "rpb": True}, {}],
        [{}],
        [{"dilation": (1, 2), "rpb": True}, {"dilation": 2, "rpb": False}, {"dilation": 3, "rpb": True}],
    ]
    ((first, second),) = plan("inline", [2], {"feature_map": "relu~exp"})
    assert (first.options, second.options) == ({"feature_map": "relu"}, {"feature_map": "exp"})
    with pytest.raises(LinsightError, match="dilation='wide' of 'nat' must be a whole number"):
        plan("nat", [2], {"dilation": "1~wide"})


def test_blocks_are_numbered_over_all_stages():
    rows = plan("inline:1/softmax", [2, 1, 3])
    assert [choice.index for row in rows for choice in row] == list(range(6))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("inlin", "did you mean 'inline'"),
        ("inline:1/sotfmax", "did you mean 'softmax'"),
        ("inline,softmax,inline", "names 3 stages, but this host has 2"),
        ("inline:2", "NAME:COUNT/NAME"),
        ("inline/softmax", "NAME:COUNT/NAME"),
        ("inline:x/softmax", "NAME:COUNT/NAME"),
        ("softmax~inlin", "did you mean 'inline'"),
        ("", "unknown attention ''"),
    ],
)
def test_mistakes_are_one_line(attention, message):
    with pytest.raises(LinsightError, match=message) as caught:
        plan(attention, [2, 2])
    assert "\n" not in str(caught.value)


def test_unknown_option():
    with pytest.raises(UnknownNameError, match="did you mean 'feature_map'"):
        plan("inline", [2], {"featuremap": "relu"})
