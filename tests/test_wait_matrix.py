"""The wait matrix: every fault that is put into random waits is found, by its right name, and no other."""

import itertools

import numpy as np
import pytest

import moe_jax as moe
from moe_jax import errors

STEPS = 20


def random_times(rng, ranks, sigma, typical=1000.0):
    """When ranks are ready, [STEPS, R], and how long blocks travel, [STEPS, R, R], both at random."""
    return typical * rng.lognormal(0, sigma, (STEPS, ranks)), typical * rng.lognormal(0, sigma, (STEPS, ranks, ranks))


def for_each_other(come):
    """[STEPS, R, R]: how long each rank stands ready while each other one is not."""
    return np.maximum(come[:, None, :] - come[:, :, None], 0)


def with_faults(rng, ranks, sigma, faults):
    """The waits of ranks with ``faults``, (kind, source, receiver, microseconds)."""
    come, travel = random_times(rng, ranks, sigma)
    for kind, source, receiver, late in faults:
        late = late * rng.uniform(0.9, 1.1, (STEPS, ranks, ranks))
        if kind == "compute":
            come[:, source] += late[:, 0, 0]
        else:
            cells = slice(None) if receiver is None else receiver, slice(None) if source is None else source
            travel[:, *cells] += late[:, *cells]
    return for_each_other(come), travel


def names(found):
    return {(one.kind, one.source, one.receiver) for one in found}


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_nothing_stands_out_of_noise(ranks, sigma):
    for seed in range(30):
        come, travel = random_times(np.random.default_rng(seed), ranks, sigma)
        assert moe.find_stragglers(for_each_other(come), travel) == []


@pytest.mark.parametrize("sigma", [0.1, 0.8])
@pytest.mark.parametrize("ranks", [3, 4, 8, 16])
def test_each_fault_is_found_and_no_other(ranks, sigma):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        source, receiver = map(int, rng.permutation(ranks)[:2])
        for kind in ("compute", "receiver", "sender", "link"):
            where = (None if kind == "receiver" else source, receiver if kind in ("receiver", "link") else None)
            found = moe.find_stragglers(*with_faults(rng, ranks, sigma, [(kind, *where, 30_000.0)]))
            assert names(found) == {(kind, *where)}, (seed, [str(one) for one in found])
            assert 0.7 < (found[0].microseconds - found[0].typical) / 30_000 < 1.3 and found[0].share > 0.9


def test_several_at_once_are_told_apart():
    """Two of each kind, at random places of 12 ranks; what is late by the ends of a link does not make it slow."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        r = [int(rank) for rank in rng.permutation(12)]
        faults = [
            ("compute", r[0], None, 40_000.0),
            ("compute", r[1], None, 20_000.0),
            ("receiver", None, r[2], 25_000.0),
            ("receiver", None, r[3], 50_000.0),
            ("sender", r[4], None, 30_000.0),
            ("link", r[5], r[6], 20_000.0),
            ("link", r[4], r[3], 100_000.0),  # beyond what both of its ends add
        ]
        found = moe.find_stragglers(*with_faults(rng, 12, 0.5, faults))
        assert names(found) == {fault[:3] for fault in faults}, (seed, [str(one) for one in found])


def test_two_ranks():
    rng = np.random.default_rng(0)
    for fault in (("compute", 1, None), ("link", 0, 1), ("link", 1, 0)):
        assert names(moe.find_stragglers(*with_faults(rng, 2, 0.5, [(*fault, 30_000.0)]))) == {fault}


def test_an_early_rank_is_not_slow():
    """It waits for all others, as a slow receiver does, but none of its blocks travels long."""
    come, travel = random_times(np.random.default_rng(0), 8, 0.2)
    come += 30_000
    come[:, 3] -= 30_000
    assert moe.find_stragglers(for_each_other(come), travel) == []


def test_half_of_the_ranks_are_late():
    """As the ranks of a slow node are; they do not wait for each other."""
    faults = [("compute", rank, None, 30_000.0) for rank in (4, 5, 6, 7)]
    found = moe.find_stragglers(*with_faults(np.random.default_rng(0), 8, 0.2, faults))
    assert names(found) == {fault[:3] for fault in faults}


def test_warm_up_share_and_thresholds():
    ready, travel = np.zeros((8, 4, 4)), np.full((8, 4, 4), 100.0)
    ready[:2, :, 1] = 1e6  # while something compiled
    assert moe.find_stragglers(ready, travel) == []
    assert names(moe.find_stragglers(ready, travel, warm_up=0, share=0.25)) == {("compute", 1, None)}
    travel[::2, 2, 3] = 900.0  # every other step
    assert moe.find_stragglers(ready, travel) == []
    (found,) = moe.find_stragglers(ready, travel, share=0.5)
    assert (found.kind, found.source, found.receiver, found.share, found.typical) == ("link", 3, 2, 0.5, 100.0)
    assert moe.find_stragglers(ready, travel, share=0.5, at_least=900.0) == []
    assert moe.find_stragglers(ready, travel, share=0.5, times=10.0) == []
    ready[:, 1, 1] = travel[:, 1, 1] = 1e9
    assert len(moe.find_stragglers(ready, travel, share=0.5)) == 1, "the diagonal is not read"


def test_the_longest_comes_first_in_words():
    ready, travel = np.zeros((5, 4, 4), np.int32), np.full((5, 4, 4), 40, np.int32)
    travel[:, :, 2] = 2_100_000
    ready[:, :, 1] = 19_800
    travel[:, 0, :] += 300
    travel[:, 3, 0] = 1040
    assert [str(one) for one in moe.find_stragglers(ready, travel, at_least=100)] == [
        "slow sender 2: each block of rank 2 takes 2.1 s to arrive, and 40 us of another, in all steps",
        "slow compute on rank 1: the others wait 19.8 ms until it is ready, and 0 us for another rank, in all steps",
        "slow link 0-3: blocks of rank 0 take 1.0 ms to come to rank 3 alone, and 40 us on another link, in all steps",
        "slow receiver 0: each block takes 0.3 ms to come to rank 0, and 40 us to come to another, in all steps",
    ]


def test_median_of_others():
    from moe_jax.elastic.wait_matrix import _median_of_others

    for size in range(2, 8):
        for values in itertools.islice(itertools.permutations(range(size)), 50):
            values = np.array(values) // 2  # ties too
            expected = [np.median(np.delete(values, place)) for place in range(size)]
            np.testing.assert_array_equal(_median_of_others(values), expected)


ZEROS = np.zeros((4, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((np.zeros((3, 3)), ZEROS), {}, errors.ShapeError, r"ready has shape \(3, 3\)"),
        ((ZEROS, np.zeros((4, 3, 2))), {}, errors.ShapeError, r"travel has shape \(4, 3, 2\)"),
        ((ZEROS[:3], ZEROS), {}, errors.ShapeError, "same steps"),
        ((np.zeros((4, 1, 1)),) * 2, {}, errors.ShapeError, "at least one and two"),
        ((ZEROS[:0],) * 2, {}, errors.ShapeError, "at least one and two"),
        ((ZEROS, ZEROS > 0), {}, errors.DtypeError, "travel has dtype bool"),
        ((ZEROS - 1, ZEROS), {}, errors.InvalidArgumentError, "ready has a negative"),
        ((ZEROS, ZEROS * np.nan), {}, errors.InvalidArgumentError, "travel has a negative.*not finite"),
        ((ZEROS, ZEROS), {"warm_up": 4}, errors.InvalidArgumentError, "warm_up=4 leaves none of 4"),
        ((ZEROS, ZEROS), {"warm_up": -1}, errors.InvalidArgumentError, "warm_up=-1"),
        ((ZEROS, ZEROS), {"at_least": -1.0}, errors.InvalidArgumentError, "at_least=-1.0"),
        ((ZEROS, ZEROS), {"times": 0.5}, errors.InvalidArgumentError, "times=0.5"),
        ((ZEROS, ZEROS), {"share": 0.0}, errors.InvalidArgumentError, "share=0.0"),
        ((ZEROS, ZEROS), {"share": 1.5}, errors.InvalidArgumentError, "share=1.5"),
        ((ZEROS, ZEROS), {"share": None}, errors.InvalidArgumentError, "share=None"),
        ((ZEROS, ZEROS), {"at_least": "1ms"}, errors.InvalidArgumentError, "at_least='1ms' must be a number"),
        (([[[0]], [[0, 1]]], ZEROS), {}, errors.ShapeError, "ready is no array, but lists of several lengths"),
    ],
)
def test_bad_input(arguments, options, error, text):
    with pytest.raises(error, match=text):
        moe.find_stragglers(*arguments, **options)
