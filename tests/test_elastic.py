"""Rank tables and receive windows in dispatch and combine, against loops over ranks, on every transport.

Data are small whole numbers: sums and their adjoints are exact, so all transports must agree bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import elastic_info
from helpers import mesh_of, over_mesh, small_integers
from jax.sharding import PartitionSpec

import moe_jax as moe
from moe_jax.recovery.window import buffer_reset

T, K, H = 3, 2, 4
EXCHANGES = ["padded", "ragged"]  # transports that have a window
TRANSPORTS = [*EXCHANGES, "allgather", "hierarchy"]


def make(ep=8, tp=1, transport="padded", *, local=2, shared=0, num_shared=0, zero=0, copy=0, const=0, **options):
    """A mesh and a plan with ``local`` experts on each of ``ep - shared`` ranks."""
    nodes = {"nodes": 2} if transport == "hierarchy" else {}
    mesh = moe.make_mesh(ep=ep, tp=tp, **nodes)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=local * (ep - shared), top_k=K, dtype="float32",
        num_shared_ranks=shared, num_shared_experts=num_shared, num_zero_experts=zero, num_copy_experts=copy,
        num_const_experts=const, transport=transport, poison=True, **options,
    )  # fmt: skip
    return mesh, plan


def over(mesh, plan, function):
    """``function`` per shard over arrays [W, P, ...], jitted."""
    return jax.jit(over_mesh(mesh, function, (plan.ep_axis, plan.tp_axis)))


# --- the oracle -------------------------------------------------------------------------------------------------------


class World:
    """Who is there according to a table, read with plain NumPy."""

    def __init__(self, plan, table):
        W = plan.ep_size
        self.plan, self.size, self.shared, self.experts = plan, W, plan.num_shared_ranks, plan.num_experts
        self.physical = list(range(W))
        if table is not None and table[0] == 1:
            self.size, self.shared, self.experts = (int(n) for n in table[1:4])
            self.physical = [int(rank) for rank in table[4 + W :][: self.size]]

    def copies(self, source, ids, mask):
        """(physical rank, local expert, token, k) of all that logical rank ``source`` sends; ids and mask [T, K]."""
        plan, num_shared = self.plan, self.plan.pairs_per_token - K
        per_expert = self.shared // num_shared if num_shared else 0
        for t, k in np.ndindex(ids.shape):
            e = int(ids[t, k])
            if mask[t, k] and 0 <= e < self.experts:
                yield self.physical[self.shared + e // plan.num_local_experts], e % plan.num_local_experts, t, k
        for t in range(T):
            for s in range(num_shared if per_expert and mask[t].any() else 0):
                yield self.physical[source % per_expert + s * per_expert], 0, t, K + s


def origins(plan, ids, mask, table, may_send=lambda source, target, lane: True):
    """[W] lists of (local expert, tp rank, physical source, token, k) in the order of the rows; and what stayed behind.

    Rows come by local expert, then tp rank, then *logical* source, then token * K + k, shared copies by token.
    ``may_send(source, target, lane)``, of physical ranks; how many copies of [W, P] it held back.
    """
    world = World(plan, table)
    rows, held = [[] for _ in range(plan.ep_size)], np.zeros((plan.ep_size, plan.tp_size), int)
    for lane in range(plan.tp_size):
        for logical in range(world.size):
            source = world.physical[logical]
            for target, expert, t, k in world.copies(logical, ids[source, lane], mask[source, lane]):
                if may_send(source, target, lane):
                    rows[target].append((expert, lane, logical, t, k, source))
                else:
                    held[source, lane] += 1
    rows = [[(e, p, source, t, k) for e, p, _, t, k, source in sorted(mine)] for mine in rows]
    return rows, held


def random_ids(rng, plan, table, num_special=0):
    """[W, P, T, K] ids of what is left, special ones behind the routed experts that are left; distinct in a row."""
    total = World(plan, table).experts + num_special
    shape = (plan.ep_size, plan.tp_size, T)
    ids = np.stack([rng.permutation(total)[:K] for _ in range(int(np.prod(shape)))])
    return ids.reshape(*shape, K).astype(np.int32)


def random_mask(rng, plan):
    return rng.random((plan.ep_size, plan.tp_size, T, K)) < 0.7


def as_rows(x, rows):
    """[n, H] of one rank."""
    return np.array([x[source, p, t] for _, p, source, t, _ in rows], x.dtype).reshape(len(rows), x.shape[-1])


def expected_sums(plan, rows_of, values, weights):
    """[W, P, T, H]: the values of the rows at their tokens, partial ones of tp ranks added, with their weights."""
    y = np.zeros((plan.ep_size, plan.tp_size, T, H))
    for rank, rows in enumerate(rows_of):
        for j, (_, p, source, t, k) in enumerate(rows):
            y[source, p, t] += (weights[source, p, t, k] if k < K else 1.0) * values[rank, :, j].sum(axis=0)
    return y


def transposes(plan, rows_of, values, weights, ct_rows, ct_y):
    """The adjoints by the same lists: d_x of dispatch; d_values [W, P, M, H] and d_weights of combine."""
    d_x, d_values = np.zeros((plan.ep_size, plan.tp_size, T, H)), np.zeros(values.shape)
    d_weights = np.zeros(weights.shape)
    for rank, rows in enumerate(rows_of):
        for j, (_, p, source, t, k) in enumerate(rows):
            d_x[source, p, t] += ct_rows[rank, :, j].sum(axis=0)
            d_values[rank, :, j] = (weights[source, p, t, k] if k < K else 1.0) * ct_y[source, p, t]
            if k < K:
                d_weights[source, p, t, k] = values[rank, :, j].sum(axis=0) @ ct_y[source, p, t]
    return d_x, d_values, d_weights


# --- rank tables ------------------------------------------------------------------------------------------------------


def there_and_back(plan, x, ids, mask, table, values, weights, ct_rows, ct_y):
    """Rows, sums and every adjoint. Per shard."""

    def out(x):
        sent = moe.dispatch(x, ids, plan, token_mask=mask, rank_table=table)
        return sent.x, sent

    rows, pull, sent = jax.vjp(out, x, has_aux=True)
    y, pull_back = jax.vjp(lambda values, weights: moe.combine(values, weights, sent.handle), values, weights)
    return rows, sent.group_sizes, sent.stats, y, pull(ct_rows)[0], pull_back(ct_y)


@functools.cache
def program(ep, tp, transport, **sizes):
    mesh, plan = make(ep, tp, transport, **sizes)
    return plan, over(mesh, plan, functools.partial(there_and_back, plan))


def poisoned(rng, plan, rows_of):
    """[W, P, M, H] whole numbers, NaN past the rows of each rank."""
    num_rows = plan.num_rows(plan.max_pair_rows)
    array = small_integers(rng, (plan.ep_size, plan.tp_size, num_rows, H))
    for rank, rows in enumerate(rows_of):
        array[rank, :, len(rows) :] = np.nan
    return array


def draw(rng, plan, table):
    """x, ids, mask, table for all ranks, values, weights, cotangents; and the oracle's rows."""
    ids, mask = random_ids(rng, plan, table), random_mask(rng, plan)
    rows_of, _ = origins(plan, ids, mask, table)
    lead = (plan.ep_size, plan.tp_size)
    x, ct_y = small_integers(rng, (*lead, T, H)), small_integers(rng, (*lead, T, H))
    values, ct_rows = poisoned(rng, plan, rows_of), poisoned(rng, plan, rows_of)
    weights = small_integers(rng, (*lead, T, K))
    arrays = (x, ids, mask, np.broadcast_to(table, (*lead, *table.shape)), values, weights, ct_rows, ct_y)
    return arrays, rows_of


def check(plan, arrays, rows_of, got):
    """All that ``there_and_back`` gives, against the loops; what remains is compared between transports."""
    x, _, _, _, values, weights, ct_rows, ct_y = arrays
    rows, sizes, stats, y, d_x, (d_values, d_weights) = jax.tree.map(np.asarray, got)
    want_x, want_values, want_weights = transposes(plan, rows_of, values, weights, ct_rows, ct_y)
    for rank, mine in enumerate(rows_of):
        experts = [row[0] for row in mine]
        want_sizes = [experts.count(e) for e in range(plan.num_local_experts)]
        for p in range(plan.tp_size):
            np.testing.assert_array_equal(sizes[rank, p], want_sizes)
            np.testing.assert_array_equal(rows[rank, p, : len(mine)], as_rows(x, mine))
            np.testing.assert_array_equal(d_values[rank, p, : len(mine)], want_values[rank, p, : len(mine)])
    np.testing.assert_array_equal(y, expected_sums(plan, rows_of, values, weights))
    np.testing.assert_array_equal(d_x, want_x)
    np.testing.assert_array_equal(d_weights, want_weights)
    for count in (stats.num_dropped, stats.num_invalid, stats.num_stale):
        assert not count.any()


def tables(ep, shared, num_shared, local, rng):
    """Switched off, nobody removed, two removed, their survivors in any order, few left, and no shared rank left."""
    some = np.sort(rng.permutation(ep)[: ep - 2])
    alive = np.isin(np.arange(ep), some)
    options = {"num_shared_ranks": shared, "num_experts": local * (ep - shared)}
    yield np.array([0, *rng.integers(-9, 99, 3 + 2 * ep)], np.int32)
    yield moe.make_rank_table(ep, np.ones(ep, bool), **options)
    yield moe.make_rank_table(ep, alive, **options)
    yield elastic_info(ep, rng.permutation(some).tolist(), shared, local * (ep - 2 - shared))
    few = num_shared + 2  # each shared expert on one rank, and two ranks with routed experts
    yield elastic_info(ep, rng.permutation(ep)[:few].tolist(), num_shared, local * 2)
    yield elastic_info(ep, rng.permutation(ep)[:3].tolist(), 0, local * 3)


WORLDS = [
    (8, 1, {"local": 1}),
    (8, 1, {"local": 1, "shared": 4, "num_shared": 2}),
    (4, 2, {"local": 2}),
    (4, 1, {"local": 2, "shared": 1, "num_shared": 1}),
]
DEFAULT = [*((WORLDS[1], t) for t in TRANSPORTS if t != "ragged"), (WORLDS[2], "padded")]
SLOW = [(WORLDS[0], "padded"), (WORLDS[0], "hierarchy"), (WORLDS[1], "ragged"), (WORLDS[2], "ragged")]
SLOW += [(WORLDS[2], "hierarchy"), (WORLDS[3], "ragged"), (WORLDS[3], "allgather")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("world", "transport"), [*DEFAULT, *SLOW])
def test_tables(world, transport):
    """Rows by logical source, removed ranks out of it, shared ranks that change their role; forward and backward."""
    ep, tp, sizes = world
    plan, run = program(ep, tp, transport, **sizes)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for table in tables(ep, sizes.get("shared", 0), sizes.get("num_shared", 0), sizes["local"], rng):
            arrays, rows_of = draw(rng, plan, table)
            check(plan, arrays, rows_of, run(*arrays))
    assert run._cache_size() == 1


def test_removed_ranks_neither_send_nor_get():
    plan, run = program(8, 1, "padded", **WORLDS[1][2])
    rng = np.random.default_rng(0)
    removed = [0, 5]
    alive = ~np.isin(np.arange(8), removed)
    table = moe.make_rank_table(8, alive, num_shared_ranks=4, num_experts=4)
    arrays, rows_of = draw(rng, plan, table)
    assert sum(map(len, rows_of)) and not any(source in removed for rows in rows_of for _, _, source, _, _ in rows)
    rows, sizes, _, y, d_x, _ = jax.tree.map(np.asarray, run(*arrays))
    assert not sizes[removed].any() and sizes[alive].any()
    assert not y[removed].any() and not d_x[removed].any()
    for rank in removed:  # what a removed rank holds reaches nobody
        arrays[0][rank] = np.nan
    again = run(*arrays)
    for rank, mine in enumerate(rows_of):
        np.testing.assert_array_equal(again[0][rank, 0, : len(mine)], rows[rank, 0, : len(mine)])


def test_a_permutation_of_the_survivors_only_renumbers():
    """Law 6: move what every survivor holds to its new place, and rows and sums move along, bit for bit."""
    plan, run = program(8, 1, "padded", **WORLDS[1][2])
    rng = np.random.default_rng(3)
    straight, permuted = [1, 2, 4, 5, 6, 7], [6, 1, 7, 4, 2, 5]
    one, other = (elastic_info(8, order, 2, 4) for order in (straight, permuted))
    arrays, rows_of = draw(rng, plan, one)
    moved = [np.array(a) for a in arrays]
    for old, new in zip(straight, permuted, strict=True):
        for mine, theirs in zip(moved, arrays, strict=True):
            mine[new] = theirs[old]
    moved[3] = np.broadcast_to(other, moved[3].shape)
    before, after = (jax.tree.map(np.asarray, run(*a)) for a in (arrays, moved))
    for old, new in zip(straight, permuted, strict=True):
        count = len(rows_of[old])
        np.testing.assert_array_equal(after[0][new, 0, :count], before[0][old, 0, :count])
        np.testing.assert_array_equal(after[1][new], before[1][old])
        for index in (3, 4):
            np.testing.assert_array_equal(after[index][new], before[index][old])


@pytest.mark.quick("padded")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_special_ids_follow_the_experts_that_are_left(transport):
    """The zero expert is E', then come a copy and two constants."""
    mesh, plan = make(8, transport=transport, local=1, zero=1, copy=1, const=2)
    rng = np.random.default_rng(0)
    lead = (8, 1)
    alpha1, alpha2 = np.float32([[1, 2]] * 8)[:, None], np.float32([[2, -1]] * 8)[:, None]
    v = small_integers(rng, (*lead, 2, H))

    def shard(x, ids, mask, table, values, weights):
        sent = moe.dispatch(x, ids, plan, token_mask=mask, rank_table=table)
        constants = {"const_alpha1": alpha1[0, 0], "const_alpha2": alpha2[0, 0], "const_v": jnp.asarray(v[0, 0])}
        return sent.x, sent.group_sizes, sent.stats, moe.combine(values, weights, sent.handle, x=x, **constants)

    run = over(mesh, plan, shard)
    for seed, size in enumerate((8, 6, 3)):
        rng = np.random.default_rng(seed)
        table = elastic_info(8, rng.permutation(8)[:size].tolist(), 0, size)
        alive = table[4:12] >= 0
        ids, mask = random_ids(rng, plan, table, num_special=4), random_mask(rng, plan)
        x, weights = small_integers(rng, (*lead, T, H)), small_integers(rng, (*lead, T, K))
        rows_of, _ = origins(plan, ids, mask, table)
        values = poisoned(rng, plan, rows_of)
        rows, sizes, stats, y = run(x, ids, mask, np.broadcast_to(table, (*lead, 20)), values, weights)
        want = expected_sums(plan, rows_of, values, weights)
        for w, t, k in np.ndindex(8, T, K):
            place = ids[w, 0, t, k] - size
            if place > 0 and alive[w] and mask[w, 0, t, k]:  # place 0 is the zero expert
                special = x[w, 0, t] if place == 1 else (
                    alpha1[0, 0, place - 2] * x[w, 0, t] + alpha2[0, 0, place - 2] * v[0, 0, place - 2]
                )  # fmt: skip
                want[w, 0, t] += weights[w, 0, t, k] * special
        np.testing.assert_array_equal(y, want)
        for rank, mine in enumerate(rows_of):
            assert np.sum(sizes[rank]) == len(mine)
            np.testing.assert_array_equal(rows[rank, 0, : len(mine)], as_rows(x, mine))
        assert not np.asarray(stats.num_invalid).any()
        first = table[12]
        ids[first, 0, 0, 0], mask[first] = size + 4, True  # behind the last constant: nowhere, and counted
        stats = run(x, ids, mask, np.broadcast_to(table, (*lead, 20)), values, weights)[2]
        assert np.asarray(stats.num_invalid)[first].item() == 1


# --- receive windows --------------------------------------------------------------------------------------------------


def empty_windows(plan, with_weights=False):
    """[W, P, ...] of every rank."""
    window = moe.make_receive_window(plan, with_weights=with_weights)
    return jax.tree.map(lambda a: np.tile(a, (plan.ep_size, plan.tp_size, *[1] * a.ndim)), window)


def with_window(plan, with_weights, window, x, ids, mask, table, values, weights, ct_rows):
    """One step. Per shard."""

    def out(x):
        options = {"combine_weights": weights} if with_weights else {}
        sent = moe.dispatch(x, ids, plan, token_mask=mask, rank_table=table, window=window, **options)
        return sent.x, sent

    rows, pull, sent = jax.vjp(out, x, has_aux=True)
    y = moe.combine(values, weights, sent.handle)
    return sent.window, rows, sent.group_sizes, sent.stats, sent.row_weights, y, pull(ct_rows)[0]


@functools.cache
def window_program(ep, tp, transport, with_weights, **sizes):
    mesh, plan = make(ep, tp, transport, **sizes)
    mapped = over_mesh(mesh, functools.partial(with_window, plan, with_weights), (plan.ep_axis, plan.tp_axis))
    return mesh, plan, jax.jit(mapped, donate_argnums=0)


def on_device(mesh, plan, tree):
    sharding = jax.NamedSharding(mesh, PartitionSpec(plan.ep_axis, plan.tp_axis))
    return jax.tree.map(lambda a: jax.device_put(a, sharding), tree)


def check_step(plan, arrays, rows_of, held, steps, got):
    """One step with windows; ``steps`` [W, P] before it, ``held`` [W, P] copies that were not sent."""
    x, _, _, _, values, weights, ct_rows = arrays
    window, rows, sizes, stats, row_weights, y, d_x = got
    np.testing.assert_array_equal(window.step[..., 0], steps + 1)
    np.testing.assert_array_equal(stats.num_stale[..., 0], held)
    want_x, _, _ = transposes(plan, rows_of, values, weights, ct_rows, np.zeros_like(x))
    for rank, mine in enumerate(rows_of):
        for p in range(plan.tp_size):
            came = [sum(row[2] == source and row[1] == p for row in mine) for source in range(plan.ep_size)]
            np.testing.assert_array_equal(window.counts[rank, p], came)
            assert np.sum(sizes[rank, p]) == len(mine)
            np.testing.assert_array_equal(rows[rank, p, : len(mine)], as_rows(x, mine))
            if row_weights is not None:
                want = [weights[source, q, t, k] if k < K else 1.0 for _, q, source, t, k in mine]
                np.testing.assert_array_equal(row_weights[rank, p, : len(mine)], want)
    np.testing.assert_array_equal(y, expected_sums(plan, rows_of, values, weights))
    np.testing.assert_array_equal(d_x, want_x)


def draw_step(rng, plan, table, steps):
    """Arrays of one step, the oracle's rows, and the copies not sent for the sake of ``steps`` [W, P]."""
    ids, mask = random_ids(rng, plan, table), random_mask(rng, plan)
    rows_of, held = origins(plan, ids, mask, table, lambda a, b, p: steps[a, p] == steps[b, p])
    lead = (plan.ep_size, plan.tp_size)
    x, weights = small_integers(rng, (*lead, T, H)), small_integers(rng, (*lead, T, K))
    values, ct_rows = poisoned(rng, plan, rows_of), poisoned(rng, plan, rows_of)
    arrays = (x, ids, mask, np.broadcast_to(table, (*lead, *table.shape)), values, weights, ct_rows)
    return arrays, rows_of, held


WINDOWS = [
    (8, 1, "padded", True, {"local": 1, "shared": 2, "num_shared": 1}),
    (2, 2, "ragged", True, {"local": 2}),
    pytest.param(8, 1, "ragged", False, {"local": 1, "shared": 2, "num_shared": 1}, marks=pytest.mark.slow),
    pytest.param(2, 2, "padded", False, {"local": 2}, marks=pytest.mark.slow),
    pytest.param(4, 1, "padded", False, {"local": 2, "quant": "none"}, marks=pytest.mark.slow),
]


@pytest.mark.quick("8-1-padded-True-sizes0")
@pytest.mark.parametrize(("ep", "tp", "transport", "with_weights", "sizes"), WINDOWS)
def test_windows_from_step_to_step(ep, tp, transport, with_weights, sizes):
    """Steps in step, a rank that falls behind, and a reset that brings it back; the window is always given away."""
    mesh, plan, run = window_program(ep, tp, transport, with_weights, **sizes)
    everybody = np.zeros(4 + 2 * ep, np.int32)
    steps = np.zeros((ep, tp), int)
    window = on_device(mesh, plan, empty_windows(plan, with_weights))
    rng = np.random.default_rng(0)
    late = ep - 1

    def one_step(window, table, steps):
        arrays, rows_of, held = draw_step(rng, plan, table, steps)
        before = window
        got = run(window, *arrays)
        assert before.data.is_deleted() and before.step.is_deleted()  # nobody reads the old counts
        check_step(plan, arrays, rows_of, held, steps, got)
        return got[0], rows_of, held

    for _ in range(2):
        window, _, held = one_step(window, everybody, steps)
        assert not held.any()
        steps += 1
    # The late rank's window is that of another step: it still talks to itself.
    moved = np.array(window.step)
    moved[late] -= 1
    window = on_device(mesh, plan, moe.Window(data=window.data, counts=window.counts, step=moved))
    steps[late] -= 1
    window, rows_of, held = one_step(window, everybody, steps)
    assert held.any() and not any(source != late for _, _, source, _, _ in rows_of[late])
    steps += 1
    if sizes.get("shared"):  # a table that removes the late rank leaves nobody who waits for it
        options = {"num_shared_ranks": sizes["shared"], "num_experts": plan.num_experts}
        gone = moe.make_rank_table(ep, np.arange(ep) != late, **options)
        window, _, held = one_step(window, gone, steps)
        assert not held.any()
        steps += 1
    for mask, together in ((np.arange(ep) != late, False), (np.ones(ep, bool), True)):
        window = reset_program(mesh, plan)(window, np.tile(mask, (ep, tp, 1)))
        steps = np.where(mask[:, None], 0, steps)
        np.testing.assert_array_equal(window.step[..., 0], steps)
        window, _, held = one_step(window, everybody, steps)
        assert held.any() != together
        steps += 1


def reset_program(mesh, plan):
    return over(mesh, plan, lambda window, mask: buffer_reset(window, mask, plan.ep_axis))


def test_rows_are_those_without_a_window():
    """And so is everything else that the call gives, bit for bit."""
    mesh, plan, run = window_program(8, 1, "padded", True, **WINDOWS[0][4])
    table = moe.make_rank_table(8, np.arange(8) != 3, num_shared_ranks=2, num_experts=plan.num_experts)
    arrays, rows_of, _ = draw_step(np.random.default_rng(1), plan, table, np.zeros((8, 1)))
    plain = over(
        mesh, plan,
        lambda x, ids, mask, table, values, weights, ct: with_window(
            plan, True, None, x, ids, mask, table, values, weights, ct
        ),
    )(*arrays)  # fmt: skip
    _, *got = run(on_device(mesh, plan, empty_windows(plan, True)), *arrays)
    _, *want = plain
    for rank, mine in enumerate(rows_of):
        for index in (0, 3):
            np.testing.assert_array_equal(got[index][rank, 0, : len(mine)], want[index][rank, 0, : len(mine)])
    for index in (1, 4, 5):
        np.testing.assert_array_equal(got[index], want[index])


@pytest.mark.quick("padded")
@pytest.mark.parametrize("transport", EXCHANGES)
def test_a_donated_window_is_written_in_place(transport):
    """What an old step left in the window is never read: all of it may be NaN."""
    mesh, plan, run = window_program(8, 1, transport, transport == "padded", **WINDOWS[0][4])
    windows = empty_windows(plan, transport == "padded")
    dirty = np.full_like(windows.data.view(np.uint8), 255).view(windows.data.dtype)
    table = np.zeros(20, np.int32)
    steps = np.zeros((8, 1), int)
    arrays, rows_of, held = draw_step(np.random.default_rng(2), plan, table, steps)
    dirty = on_device(mesh, plan, moe.Window(data=dirty, counts=windows.counts + 77, step=windows.step))
    memory = run.lower(dirty, *on_device(mesh, plan, arrays)).compile().memory_analysis()
    per_rank = (windows.data.nbytes + windows.step.nbytes) // 8
    assert memory.alias_size_in_bytes >= per_rank
    check_step(plan, arrays, rows_of, held, steps, run(dirty, *arrays))


def test_windows_belong_to_exchanges():
    for transport in ("allgather", "hierarchy"):
        mesh, plan = make(4, 1, transport)
        _, padded = make(4, 1)
        window = empty_windows(padded)

        def shard(window, x, ids, plan=plan):
            return moe.dispatch(x, ids, plan, window=window).x

        arrays = (np.zeros((4, 1, T, H), np.float32), np.zeros((4, 1, T, K), np.int32))
        with pytest.raises(moe.errors.UnsupportedError, match="no exchange between pairs"):
            jax.eval_shape(over(mesh, plan, shard), window, *arrays)


def test_a_quantised_row_lies_in_the_window_as_it_travelled():
    mesh = mesh_of(4, 1)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=8, num_experts=4, top_k=K, dtype="bfloat16", quant="int8", transport="padded"
    )
    window = empty_windows(plan, with_weights=True)

    def shard(window, x, ids, weights):
        one = moe.dispatch(x, ids, plan, combine_weights=weights, window=window)
        two = moe.dispatch(x, ids, plan, combine_weights=weights)
        inside = jnp.arange(one.x.shape[0]) < jnp.sum(one.group_sizes)
        outs = [jnp.where(inside.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for d in (one, two)
                for a in (d.x, d.scales, d.row_weights, moe.dequantize(d))]  # fmt: skip
        return outs[:4], outs[4:], one.window

    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 1, T, 8)).astype(jnp.bfloat16)
    ids = np.broadcast_to(np.array([[0, 1], [1, 2], [0, 3]], np.int32), (4, 1, T, K))
    one, two, after = jax.jit(over_mesh(mesh, shard))(window, x, ids, small_integers(rng, (4, 1, T, K)))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(after.counts[:, 0], [[2] * 4, [2] * 4, [1] * 4, [1] * 4])
    assert np.asarray(after.data).any()
