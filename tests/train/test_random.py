import random

import numpy as np
import pytest
import torch

from linsight.data.random import Batches, hold_out, key, seed_sample, seed_step, share


def test_a_key_depends_on_every_part_and_on_their_order():
    keys = {key(*parts) for parts in np.ndindex(8, 8, 8)}
    assert len(keys) == 512
    assert key(1, 2) != key(2, 1) != key(2, 1, 0)
    # a run of last year must resume today
    assert key(0, 1, 2) == 0xF4F373571B7FEB84


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeding_covers_the_three_generators_and_keeps_purposes_apart():
    drawn = []
    for seed in (seed_sample, seed_sample, seed_step):
        seed(3, 1, 4)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_an_epoch_is_a_permutation_that_resumes_at_any_step():
    batches = Batches(23, 4, seed=5, shuffle=True)
    batches.epoch = 2
    whole = list(batches)
    assert len(whole) == len(batches) == 5  # the last, smaller batch is left out
    indices = [index for batch in whole for epoch, index in batch]
    assert len(set(indices)) == 20 and all(epoch == 2 for batch in whole for epoch, _ in batch)
    batches.start = 3
    assert list(batches) == whole[3:]
    batches.epoch, batches.start = 3, 0
    assert [index for batch in batches for _, index in batch] != indices


def test_copies_of_an_image_lie_beside_each_other_and_an_epoch_stays_as_long():
    batches = Batches(23, 4, seed=5, shuffle=True, repeats=3)
    whole = list(batches)
    assert len(whole) == len(batches) == 5
    items = [item for batch in whole for item in batch]
    assert [copy for _, _, copy in items[:6]] == [0, 1, 2, 0, 1, 2]
    images = [index for _, index, _ in items]
    assert images[0::3][:6] == images[1::3][:6] == images[2::3] and len(set(images)) == 7
    batches.start = 3
    assert list(batches) == whole[3:]


@pytest.mark.parametrize("shards", [None, np.arange(23) // 5])
def test_an_epoch_may_be_shorter_or_longer_than_the_data(shards):
    batches = Batches(23, 4, seed=5, shuffle=True, shards=shards)
    whole = list(batches)
    short = Batches(23, 4, seed=5, shuffle=True, shards=shards, length=9)
    assert list(short) == whole[:2] and len(short) == 2
    long = Batches(23, 4, seed=5, shuffle=True, shards=shards, length=60)
    items = [item for batch in long for item in batch]
    found = [item[1] for item in items]
    assert len(long) == 15 and list(long)[:5] == whole
    assert sorted(found[:23]) == sorted(found[23:46]) == list(range(23)) and found[:23] != found[23:46]
    assert len(set(items)) == 60 and all(item[2] == place // 23 for place, item in enumerate(items) if place >= 23)
    long.start = 9
    assert [item for batch in long for item in batch] == items[36:]
    copies = Batches(5, 4, seed=5, shuffle=True, repeats=3, length=40)
    items = [item for batch in copies for item in batch]
    assert len(set(items)) == 40 and {copy for _, _, copy in items} == set(range(9))
    assert sorted(image for _, image, _ in items[:15:3]) == list(range(5))
    assert [len(batch) for batch in Batches(10, 4, shuffle=False, length=6)] == [4, 2]
    assert list(Batches(0, 4, shuffle=True, length=6)) == []


def test_evaluation_sees_every_image_once_and_a_small_data_set_has_one_batch():
    assert [len(batch) for batch in Batches(10, 4, shuffle=False)] == [4, 4, 2]
    assert [len(batch) for batch in Batches(3, 4, shuffle=True)] == [3]


def test_hold_out_takes_a_share_of_each_class():
    targets = [0] * 50 + [1] * 10 + [2] * 2
    rest, held = hold_out(targets, 0.2)
    assert sorted(rest + held) == list(range(62))
    assert [sum(targets[i] == c for i in held) for c in range(3)] == [10, 2, 1]
    assert (rest, held) == hold_out(targets, 0.2)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 64])
@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shares_are_all_images_each_once_and_pairs_stay_together(count, of):
    shares = [share(count, number, of) for number in range(of)]
    assert sorted(place for part in shares for place in part) == list(range(count))
    for part in shares:
        assert [count - 1 - place for place in reversed(part)] == part
        assert abs(len(part) - count / of) <= 2
