"""Index arithmetic: by hand where a person can check it, and as laws over generated exchanges.

The laws play a whole exchange over all ranks in NumPy. What travels is a pair's number, so every row names its origin.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import layout, reference

# One exchange group: P tp ranks, W source ranks, L local experts, n pairs per rank.
P, W, L, N = 2, 3, 2, 6
WINDOWS = [(2, True), (2, False), (N, True), (N, False)]  # (capacity, compact)
ROWS = P * W * N  # no rank can get more


def i32(values):
    return np.asarray(values, np.int32)


def equal(actual, expected):
    chex.assert_type(actual, jnp.int32)
    np.testing.assert_array_equal(actual, np.asarray(expected))


sort_pairs = jax.jit(layout.sort_pairs, static_argnums=1)
map_blocks = jax.jit(layout.map_blocks, static_argnums=3)
send_maps = jax.jit(layout.send_maps, static_argnums=(1, 3), static_argnames="compact")
receive_maps = jax.jit(layout.receive_maps, static_argnums=2, static_argnames=("compact", "num_rows"))
gather_maps = jax.jit(layout.gather_maps, static_argnums=(2, 4), static_argnames="num_rows")
searchsorted = jax.jit(layout.searchsorted, static_argnames="side")
clip_to_stretch = jax.jit(layout.clip_to_stretch)


@jax.jit
def sort_all(destinations):
    return jax.vmap(jax.vmap(lambda d: layout.sort_pairs(d, W * L)))(destinations)


@functools.partial(jax.jit, static_argnums=(2, 3))
def send_all(pairs, start, capacity, compact):
    one = functools.partial(layout.send_maps, num_ranks=W, start=start, capacity=capacity, compact=compact)
    return jax.vmap(jax.vmap(one))(pairs)


@functools.partial(jax.jit, static_argnums=(2, 3))
def receive_all(recv_counts, start, capacity, compact):
    one = functools.partial(layout.receive_maps, start=start, capacity=capacity, compact=compact, num_rows=ROWS)
    return jax.vmap(one)(recv_counts)


@functools.partial(jax.jit, static_argnums=2)
def gather_all(destinations, start, capacity):
    def one(rank):
        return layout.gather_maps(destinations, rank, L, start, capacity, num_rows=ROWS)

    return jax.vmap(one)(jnp.arange(W, dtype=jnp.int32))


def destinations(num_destinations, shape):
    """Destinations with many ties and gaps: every entry -1 .. D-1, drawn from a few values so that skew is common."""
    size = int(np.prod(shape))
    value = st.integers(-1, num_destinations - 1)
    entries = st.lists(value, min_size=1, max_size=num_destinations + 1).flatmap(
        lambda few: st.lists(st.sampled_from(few), min_size=size, max_size=size)
    )
    return entries.map(lambda d: np.array(d, np.int32).reshape(shape))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_sort_pairs_by_hand():
    pairs = sort_pairs(i32([2, -1, 0, 2, 0]), 4)
    equal(pairs.order, [2, 4, 0, 3, 1])  # destination 0: pairs 2, 4; destination 2: pairs 0, 3; none: pair 1
    equal(pairs.position, [2, 4, 0, 3, 1])
    equal(pairs.counts, [2, 0, 2, 0])


@pytest.mark.parametrize(
    ("start", "compact", "sizes", "bases", "slot_pair", "pair_slot"),
    [
        # Lists: rank 0 gets pairs 2, 4, 1 (experts 0, 0, 1); rank 1 gets pair 3; pair 0 goes nowhere.
        (0, False, [2, 1], [0, 2], [2, 4, 3, -1], [-1, -1, 0, 2, 1]),
        (0, True, [2, 1], [0, 2], [2, 4, 3, -1], [-1, -1, 0, 2, 1]),
        (2, False, [1, 0], [0, 2], [1, -1, -1, -1], [-1, 0, -1, -1, -1]),
        (2, True, [1, 0], [0, 1], [1, -1, -1, -1], [-1, 0, -1, -1, -1]),
        (1, False, [2, 0], [0, 2], [4, 1, -1, -1], [-1, 1, -1, -1, 0]),
        (4, True, [0, 0], [0, 0], [-1] * 4, [-1] * 5),
    ],
)
def test_send_maps_by_hand(start, compact, sizes, bases, slot_pair, pair_slot):
    pairs = sort_pairs(i32([-1, 1, 0, 2, 0]), 4)
    maps = send_maps(pairs, 2, start, 2, compact=compact)
    for actual, expected in zip(maps, (sizes, bases, slot_pair, pair_slot), strict=True):
        equal(actual, expected)


def test_compact_sender_without_rows_for_rank_0_wastes_no_slot():
    maps = send_maps(sort_pairs(i32([3, 2, 3]), 4), 2, 0, 3, compact=True)
    equal(maps.slot_pair, [1, 0, 2])
    equal(maps.bases, [0, 0])


@pytest.mark.parametrize(
    ("compact", "bases", "row_slot", "slot_row"),
    [
        # Source 0 sends one row to expert 0 and two to expert 1, source 1 one row to expert 0.
        (False, [[0, 4]], [0, 4, 1, 2, -1], [0, 2, 3, -1, 1, -1, -1, -1]),
        (True, [[0, 3]], [0, 3, 1, 2, -1], [0, 2, 3, 1, -1, -1, -1, -1]),
    ],
)
def test_receive_maps_by_hand(compact, bases, row_slot, slot_row):
    maps = receive_maps(i32([[[1, 2], [1, 0]]]), 0, 4, compact=compact, num_rows=5)
    equal(maps.sizes, [[3, 1]])
    equal(maps.bases, bases)
    equal(maps.group_sizes, [2, 2])
    equal(maps.row_slot, row_slot)
    equal(maps.slot_row, slot_row)


def test_receive_maps_put_tp_ranks_between_expert_and_source():
    maps = receive_maps(i32([[[1, 1], [1, 0]], [[0, 1], [1, 0]]]), 0, 2, compact=False, num_rows=6)
    # Slots: tp 0 source 0: 0-1, source 1: 2-3; tp 1 source 0: 4-5, source 1: 6-7.
    # Rows: expert 0 of (0, 0), (0, 1), (1, 1); then expert 1 of (0, 0), (1, 0).
    equal(maps.row_slot, [0, 2, 6, 1, 4, -1])
    equal(maps.bases, [[0, 2], [4, 6]])


def test_gather_maps_by_hand():
    # Two sources with two pairs each; rank 1 owns flat slots 2 and 3.
    maps = gather_maps(i32([[[3, 2], [2, 0]]]), i32(1), 2, 0, 2, num_rows=4)
    equal(maps.recv_counts, [[[1, 1], [1, 0]]])
    equal(maps.group_sizes, [2, 1])
    equal(maps.row_pair, [1, 2, 0, -1])  # slot 2: pairs 1 and 2; slot 3: pair 0
    equal(maps.pair_row, [[2, 0], [1, -1]])


def test_gather_maps_clip_every_source_by_itself():
    maps = gather_maps(i32([[[3, 2], [2, 0]]]), i32(1), 2, 1, 1, num_rows=4)
    equal(maps.group_sizes, [0, 1])  # the second entry of source 0's list is its pair for slot 3
    equal(maps.row_pair, [0, -1, -1, -1])
    equal(maps.pair_row, [[0, -1], [-1, -1]])


def test_map_blocks_by_hand():
    equal(map_blocks(i32([1, 4]), i32([10, 20]), i32([2, 1]), 6), [-1, 10, 11, -1, 20, -1])
    equal(map_blocks(i32([0, 0, 2, 2]), i32([7, 5, 9, 3]), i32([0, 2, 0, 1]), 3), [5, 6, 3])
    equal(map_blocks(i32([]), i32([]), i32([]), 2), [-1, -1])
    # Blocks in any order and shape, and addresses of the caller's.
    starts, targets, sizes = i32([[4, 0], [9, 2]]), i32([[0, 10], [20, 30]]), i32([[2, 2], [1, 0]])
    equal(jax.jit(layout.map_blocks)(starts, targets, sizes, i32([9, 5, 2, 0, -1])), [20, 1, -1, 10, -1])
    assert map_blocks(i32([0]), i32([5]), i32([2]), 0).shape == (0,)


@pytest.mark.parametrize(
    ("start", "first", "sizes"),
    [(0, [0, 2, 2], [2, 0, 1]), (1, [0, 1, 1], [1, 0, 2]), (4, [0, 0, 0], [0, 0, 1]), (5, [0, 0, 0], [0, 0, 0])],
)
def test_clip_to_stretch_by_hand(start, first, sizes):
    for lists in ([2, 0, 3], [[2, 0, 3], [2, 0, 3]]):
        actual_first, actual_sizes = clip_to_stretch(i32(lists), start, 3)
        equal(actual_first, np.broadcast_to(first, np.shape(lists)))
        equal(actual_sizes, np.broadcast_to(sizes, np.shape(lists)))


def test_exclusive_cumsum_and_row_starts_by_hand():
    equal(layout.exclusive_cumsum(i32([2, 0, 3])), [0, 2, 2])
    # Blocks in row order: expert 0: 1, 3; expert 1: 2, 4.
    equal(layout.row_starts(i32([[[1, 2], [3, 4]]])), [[[0, 4], [1, 6]]])


def test_running_sums_go_along_the_last_axis():
    sizes = np.arange(24).reshape(2, 3, 4) % 5
    equal(layout.exclusive_cumsum(i32(sizes)), np.cumsum(sizes, axis=-1) - sizes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_searchsorted_is_numpys(side):
    ascending, values = np.array([-3, 0, 0, 2, 7, 7, 7]), np.arange(-4, 9)
    equal(searchsorted(i32(ascending), i32(values), side=side), np.searchsorted(ascending, values, side=side))
    equal(searchsorted(i32([]), i32([1, 2]), side=side), [0, 0])


def test_ids_outside_are_not_counted():
    equal(layout.count_each(i32([[2, -1, 0], [4, 2, 3]]), 4), [1, 0, 2, 1])


def test_no_pairs():
    pairs = sort_pairs(i32([]), 4)
    equal(pairs.counts, [0] * 4)
    assert pairs.order.shape == pairs.position.shape == (0,)
    for compact in (True, False):
        maps = send_maps(pairs, 2, 0, 3, compact=compact)
        equal(maps.sizes, [0, 0])
        assert (np.asarray(maps.slot_pair) == -1).all()
        assert maps.pair_slot.shape == (0,)
        received = receive_maps(i32(np.zeros((1, 2, 2))), 0, 3, compact=compact, num_rows=2)
        equal(received.row_slot, [-1, -1])
        equal(received.slot_row, [-1] * 6)
    gathered = gather_maps(i32(np.zeros((1, 2, 0))), i32(0), 2, 0, 3, num_rows=2)
    equal(gathered.row_pair, [-1, -1])
    assert gathered.pair_row.shape == (2, 0)


# --- laws ------------------------------------------------------------------------------------------------------------


def check_order(order, position, destination, num_destinations):
    key = np.where(destination < 0, num_destinations, destination)
    equal(order, np.argsort(key, kind="stable"))
    equal(np.asarray(position)[np.asarray(order)], np.arange(len(key), dtype=np.int32))


def check_pairs(pairs, destination, num_destinations):
    destination = np.asarray(destination)
    check_order(pairs.order, pairs.position, destination, num_destinations)
    equal(pairs.counts, [np.sum(destination == d) for d in range(num_destinations)])


@given(destinations(5, (20,)))
def test_sort_is_stable_and_a_bijection(destination):
    check_pairs(sort_pairs(destination, 5), destination, 5)


@given(destinations(1, (7,)))
def test_sort_with_one_destination(destination):
    check_pairs(sort_pairs(destination, 1), destination, 1)


@pytest.mark.parametrize(("num_pairs", "packed"), [(2047, True), (2048, False)])
def test_sort_on_both_sides_of_the_packed_key_limit(num_pairs, packed):
    num_destinations = 2**20
    assert ((num_destinations + 1) * num_pairs < 2**31) == packed
    rng = np.random.default_rng(0)
    destination = rng.integers(-1, num_destinations, num_pairs).astype(np.int32)
    destination[::3] = num_destinations - 1  # ties at the far end, where packed keys are largest
    destination[1::7] = -1
    order, position = jax.jit(lambda d: layout.sort_pairs(d, num_destinations)[:2])(destination)  # too many to count
    check_order(order, position, destination, num_destinations)
    jaxpr = jax.make_jaxpr(lambda d: layout.sort_pairs(d, num_destinations))(destination).jaxpr
    two_key_sorts = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "sort" and len(eqn.invars) == 2]
    assert bool(two_key_sorts) != packed  # the case really takes the path it is meant for


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50)), max_size=5))
def test_map_blocks_is_a_loop_over_blocks(blocks):
    """Each block: (gap before it, size, target); starts ascend and blocks do not overlap."""
    blocks = blocks + [(0, 0, 0)] * (5 - len(blocks))
    expected = np.full(30, -1)
    starts, sizes, targets, cursor = [], [], [], 0
    for gap, size, target in blocks:
        cursor += gap
        starts.append(cursor)
        sizes.append(size)
        targets.append(target)
        expected[cursor : cursor + size] = np.arange(target, target + size)
        cursor += size
    equal(map_blocks(i32(starts), i32(targets), i32(sizes), 30), expected)


def list_positions(dest):
    """[P, W, n] position of every pair in its source's list for its destination rank; -1 where it has none."""
    positions = np.full(dest.shape, -1)
    for p, w in np.ndindex(P, W):
        lists = [0] * W
        for pair in sorted(range(N), key=lambda i: (dest[p, w, i], i)):
            if dest[p, w, pair] >= 0:
                rank = dest[p, w, pair] // L
                positions[p, w, pair] = lists[rank]
                lists[rank] += 1
    return positions


def pair_number(p, w, pair):
    return (p * W + w) * N + pair


def expected_rows(dest, start, capacity):
    """For every rank, the numbers of the pairs of one stretch in the oracle's row order, and its group sizes."""
    ids = dest.transpose(1, 0, 2)[..., None]  # the oracle wants [W, P, T, K]; a token is one pair here
    oracle = reference.dispatch(np.zeros((W, P, N, 1)), ids, num_experts=W * L)
    positions = list_positions(dest)
    for rank in range(W):
        kept = [(p, w, t) for p, w, t, _ in oracle.origins[rank][0] if start <= positions[p, w, t] < start + capacity]
        local = [dest[origin] - rank * L for origin in kept]
        yield [pair_number(*origin) for origin in kept], np.bincount(local, minlength=L)


def arrivals(send, capacity, compact, rank):
    """What lies in the [P * A] arrival buffer of ``rank``: pair numbers, or -1; built from the senders' maps alone."""
    buffer = np.full((P, W * capacity), -1)
    for p in range(P):
        landing = 0
        for source in range(W):
            size, base = send.sizes[p, source, rank], send.bases[p, source, rank]
            slots = send.slot_pair[p, source, base : base + size]
            assert (slots >= 0).all()
            landing = landing if compact else source * capacity
            buffer[p, landing : landing + size] = pair_number(p, source, slots)
            landing += size
    return buffer.ravel()


def check_inverse(forward, backward):
    """``forward`` and ``backward`` are inverse partial maps, -1 for none."""
    for one, other in ((forward, backward), (backward, forward)):
        there = np.flatnonzero(one >= 0)
        np.testing.assert_array_equal(other[one[there]], there)


def check_senders(dest, send, start, capacity):
    positions = list_positions(dest)
    inside = (positions >= start) & (positions < start + capacity)
    np.testing.assert_array_equal(send.pair_slot >= 0, inside)
    for p, w in np.ndindex(P, W):
        check_inverse(send.pair_slot[p, w], send.slot_pair[p, w])
        ranks = (dest[p, w] // L)[inside[p, w]]
        np.testing.assert_array_equal(send.sizes[p, w], np.bincount(ranks, minlength=W))


def check_receiver(received, rank, arrived, rows, group_sizes):
    row_slot = received.row_slot[rank]
    assert (row_slot[: len(rows)] >= 0).all()
    assert (row_slot[len(rows) :] == -1).all()
    np.testing.assert_array_equal(arrived[row_slot[: len(rows)]], rows)
    check_inverse(row_slot, received.slot_row[rank])
    np.testing.assert_array_equal(received.slot_row[rank] >= 0, arrived >= 0)
    np.testing.assert_array_equal(received.group_sizes[rank], group_sizes)


def check_gatherer(gathered, rank, rows, group_sizes):
    np.testing.assert_array_equal(gathered.row_pair[rank], rows + [-1] * (ROWS - len(rows)))
    check_inverse(gathered.row_pair[rank], gathered.pair_row[rank].ravel())
    np.testing.assert_array_equal(gathered.group_sizes[rank], group_sizes)


def count_pairs(dest):
    """[rank, P, W, L] how many pairs each source has for each local expert of each rank."""
    counts = np.zeros((W, P, W, L), np.int32)
    for p, w, pair in np.argwhere(dest >= 0):
        rank, local = divmod(dest[p, w, pair], L)
        counts[rank, p, w, local] += 1
    return counts


@pytest.mark.parametrize(("capacity", "compact"), WINDOWS)
@given(dest=destinations(W * L, (P, W, N)))
def test_every_exchange_delivers_the_oracles_rows(capacity, compact, dest):
    pairs, counts = sort_all(dest), count_pairs(dest)
    times_seen = np.zeros(P * W * N, int)
    for start in range(0, N, capacity):
        send = jax.tree.map(np.asarray, send_all(pairs, start, capacity, compact))
        received = jax.tree.map(np.asarray, receive_all(counts, start, capacity, compact))
        gathered = jax.tree.map(np.asarray, gather_all(dest, start, capacity))
        check_senders(dest, send, start, capacity)
        np.testing.assert_array_equal(gathered.recv_counts, counts)
        for rank, (rows, group_sizes) in enumerate(expected_rows(dest, start, capacity)):
            check_receiver(received, rank, arrivals(send, capacity, compact, rank), rows, group_sizes)
            check_gatherer(gathered, rank, rows, group_sizes)
            times_seen[rows] += 1
    np.testing.assert_array_equal(times_seen, (dest >= 0).ravel())  # stretches partition the pairs that travel


@given(destinations(W * L, (P, W, N)), st.integers(0, N))
def test_sender_and_receiver_agree_on_sizes_and_bases(dest, start):
    pairs, counts = sort_all(dest), count_pairs(dest)
    sizes = {}
    for compact in (True, False):
        send, received = send_all(pairs, start, 2, compact), receive_all(counts, start, 2, compact)
        sizes[compact] = np.asarray(send.sizes)
        np.testing.assert_array_equal(sizes[compact].transpose(2, 0, 1), received.sizes)
        tp_base = np.arange(P)[:, None] * W * 2
        from_first = np.cumsum(received.sizes, axis=-1) - received.sizes if compact else 2 * np.arange(W)
        np.testing.assert_array_equal(received.bases, np.broadcast_to(from_first + tp_base, (W, P, W)))
    np.testing.assert_array_equal(sizes[True], sizes[False])


def test_one_expert_on_one_rank():
    maps = send_maps(sort_pairs(i32([0, -1, 0]), 1), 1, 0, 3, compact=True)
    equal(maps.slot_pair, [0, 2, -1])
    received = receive_maps(i32([[[2]]]), 0, 3, compact=True, num_rows=3)
    equal(received.row_slot, [0, 1, -1])
    equal(received.group_sizes, [2])
