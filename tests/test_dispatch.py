"""dispatch and combine against the oracle: exactly, for every mesh, transport and routing pattern.

Data are small integers, so that every sum is exact; unwritten rows and slots hold NaN (``poison``).
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MESHES, PATTERNS, TRANSPORTS, expert_ids, mesh_of, over_mesh, small_integers

import moe_jax as moe
from moe_jax import reference

H, K = 3, 2


def make_plan(ep, tp, transport, *, tokens=5, experts=None, **options):
    options = {"dtype": "float32", "poison": True, "capacity_factor": 0.6, "top_k": K, **options}
    experts = experts or 2 * ep + (2 if ep == 1 else 0)
    return moe.make_plan(
        mesh_of(ep, tp), tokens_per_rank=tokens, hidden=H, num_experts=experts, transport=transport, **options
    )


@functools.cache
def program(plan):
    """(x, ids, weights, mask, ct_rows, ct_y) -> everything that dispatch and combine give, and their adjoints."""

    def shard(x, ids, weights, mask, row_ct, ct_y):
        def rows(x):
            sent = moe.dispatch(x, ids, plan, token_mask=mask)
            return sent.x, sent.handle

        sent, pull_sent, handle = jax.vjp(rows, x, has_aux=True)
        tp_factor = (jax.lax.axis_index("tp") + 1).astype(jnp.float32)
        y, pull_y = jax.vjp(lambda rows, w: moe.combine(rows, w, handle), sent * tp_factor, weights)
        d_rows, d_weights = pull_y(ct_y)
        return sent, handle.group_sizes, y, pull_sent(row_ct)[0], d_rows, d_weights

    return jax.jit(over_mesh(mesh_of(plan.ep_size, plan.tp_size), shard))


def compare(plan, rng, pattern, mask_kind, ids=None):
    """One generated case through ``program`` and through the oracle; asserts equality of all results."""
    W, P, T, top_k = plan.ep_size, plan.tp_size, plan.tokens_per_rank, plan.top_k
    ids = expert_ids(pattern, rng, (W, P, T, top_k), plan.num_experts, W) if ids is None else ids
    mask = {
        "all": np.ones((W, P, T), bool),
        "1d": rng.random((W, P, T)) < 0.6,
        "2d": rng.random((W, P, T, top_k)) < 0.6,
    }[mask_kind]
    x, ct_y = small_integers(rng, (W, P, T, H)), small_integers(rng, (W, P, T, H))
    weights = small_integers(rng, (W, P, T, top_k))
    weights[(ids < 0) | ~np.broadcast_to(mask if mask.ndim == 4 else mask[..., None], ids.shape)] = np.nan
    num_rows = plan.num_rows(plan.max_pair_rows)
    row_ct = small_integers(rng, (W, P, num_rows, H))

    expected = reference.dispatch(
        x,
        ids,
        num_experts=plan.num_experts,
        token_mask=mask,
        num_shared_experts=plan.num_shared_experts,
        num_shared_ranks=plan.num_shared_ranks,
    )
    totals = expected.group_sizes.sum(-1)
    written = np.arange(num_rows) < totals[..., None]
    row_ct[~written] = np.nan  # nobody may read what nobody wrote
    got = program(plan)(x, ids, weights, mask, row_ct, ct_y)
    sent, group_sizes, y, d_x, d_rows, d_weights = (np.asarray(a) for a in got)

    np.testing.assert_array_equal(group_sizes, expected.group_sizes)
    assert np.isnan(sent[~written]).all()
    trimmed = [[row_ct[w, p, : totals[w, p]] for p in range(P)] for w in range(W)]
    np.testing.assert_array_equal(d_x, reference.dispatch_vjp(trimmed, expected, T))
    rows = [[expected.rows[w][p] * (p + 1.0) for p in range(P)] for w in range(W)]
    ct_rows, ct_weights = reference.combine_vjp(ct_y, rows, weights, expected)
    np.testing.assert_array_equal(y, reference.combine(rows, weights, expected))
    np.testing.assert_array_equal(d_weights, ct_weights)
    for w in range(W):
        for p in range(P):
            np.testing.assert_array_equal(sent[w, p, : totals[w, p]], expected.rows[w][p])
            np.testing.assert_array_equal(d_rows[w, p, : totals[w, p]], ct_rows[w][p])
    return sent


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_equals_oracle(transport):
    rng, plan = np.random.default_rng(42), make_plan(4, 2, transport)
    for pattern in PATTERNS:
        compare(plan, rng, pattern, "all")
    for mask_kind in ("1d", "2d"):
        compare(plan, rng, "random", mask_kind)


SHARED = [  # ep, tp, shared ranks and experts; several ranks for each expert are in test_elastic too
    *((4, 2, 2, 2, transport) for transport in TRANSPORTS),
    (2, 1, 1, 1, "padded"),
    (4, 1, 2, 1, "ragged"),
    (8, 1, 4, 2, "allgather"),
    (8, 1, 6, 3, "padded"),
]


@pytest.mark.quick("4-2-2-2-padded")
@pytest.mark.parametrize("ep,tp,ranks,shared,transport", SHARED)
def test_shared_experts_on_their_own_ranks(ep, tp, ranks, shared, transport):
    rng = np.random.default_rng([ep, tp, ranks])
    plan = make_plan(ep, tp, transport, experts=3 * (ep - ranks), num_shared_experts=shared, num_shared_ranks=ranks)
    for pattern, mask_kind in [("random", "all"), ("one_rank", "1d"), ("masked", "2d"), ("none", "all")]:
        compare(plan, rng, pattern, mask_kind)


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ep,tp", MESHES)
def test_equals_oracle_many(ep, tp, transport):
    """8 meshes x 3 transports x 63 = 1512 generated cases."""
    rng = np.random.default_rng([7, ep, tp])
    plan = make_plan(ep, tp, transport)
    for pattern in PATTERNS:
        for mask_kind in ("all", "1d", "2d"):
            for _ in range(3):
                compare(plan, rng, pattern, mask_kind)


def test_transports_agree_to_the_bit():
    rng = np.random.default_rng(0)
    for pattern in ("zipf", "one_rank"):
        ids = expert_ids(pattern, rng, (4, 2, 5, K), 8, 4)
        sent = [
            compare(make_plan(4, 2, transport), np.random.default_rng(1), pattern, "all", ids=ids)
            for transport in TRANSPORTS
        ]
        for other in sent[1:]:
            np.testing.assert_array_equal(sent[0].view(np.int32), other.view(np.int32))


ODD_SIZES = [  # each transport twice
    (1, 5, 8, "allgather"),
    (7, 8, 8, "padded"),
    (1, 1, 4, "ragged"),
    (3, 2, 12, "ragged"),
    (7, 8, 8, "allgather"),
    (1, 5, 8, "padded"),
]


@pytest.mark.quick("1-5-8-allgather", "7-8-8-padded")
@pytest.mark.parametrize("tokens,top_k,experts,transport", ODD_SIZES)
def test_odd_sizes(transport, tokens, top_k, experts):
    plan = make_plan(4, 2, transport, tokens=tokens, top_k=top_k, experts=experts)
    compare(plan, np.random.default_rng(tokens), "random", "all")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_tokens(transport):
    """Forward and backward of everything, in one program that has no input but empty ones."""
    plan = make_plan(4, 2, transport, tokens=0, experts=8)
    rows = plan.num_rows(plan.max_pair_rows)
    empty = np.zeros((4, 2, 0, H), np.float32)
    pairs = np.zeros((4, 2, 0, K), np.float32)
    mask = np.zeros((4, 2, 0), bool)
    got = program(plan)(empty, pairs.astype(np.int32), pairs, mask, np.zeros((4, 2, rows, H), np.float32), empty)
    sent, sizes, y, d_x, d_rows, d_weights = got
    assert sent.shape == d_rows.shape == (4, 2, rows, H)
    assert y.shape == d_x.shape == empty.shape and d_weights.shape == pairs.shape
    assert not np.asarray(sizes).any() and not np.asarray(d_rows).any()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_repeated_ids_are_copies(transport):
    ids = np.zeros((4, 2, 5, K), np.int32)  # every pair to expert 0: the worst skew there is
    compare(make_plan(4, 2, transport), np.random.default_rng(3), "all_to_one", "all", ids=ids)


@pytest.mark.quick("padded-bfloat16", "allgather-bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_dispatch_moves_bits(transport, dtype):
    """Subnormals, infinities and signed zeros arrive as they left (a NaN may lose its payload)."""
    plan = make_plan(4, 1, transport, dtype=dtype, poison=False)
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**16, (4, 1, 5, H)).astype(np.uint16)
    bits[np.isnan(np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.dtype(dtype)), np.float32))] = 1
    ids = expert_ids("random", rng, (4, 1, 5, K), plan.num_experts, 4)
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.dtype(dtype))
    rows, _sizes = jax.jit(
        over_mesh(mesh_of(4, 1), lambda x, ids: (lambda d: (d.x, d.group_sizes))(moe.dispatch(x, ids, plan)))
    )(x, ids)
    got = np.asarray(jax.lax.bitcast_convert_type(rows, jnp.uint16))
    expected = reference.dispatch(bits, ids, num_experts=plan.num_experts)
    for w in range(4):
        np.testing.assert_array_equal(got[w, 0, : expected.group_sizes[w, 0].sum()], expected.rows[w][0])


def test_ids_out_of_range_go_nowhere_and_are_counted():
    plan = make_plan(4, 1, "padded")
    ids = np.zeros((4, 1, 5, K), np.int32)
    ids[1, 0, :3, 0] = [plan.num_experts, 99, -2]
    mask = np.ones((4, 1, 5, K), bool)
    mask[1, 0, 1, 0] = False  # a masked pair is nobody's mistake

    def shard(ids, mask):
        sent = moe.dispatch(jnp.ones((5, H)), ids, plan, token_mask=mask)
        return sent.stats.num_invalid, sent.group_sizes

    invalid, sizes = jax.jit(over_mesh(mesh_of(4, 1), shard))(ids, mask)
    np.testing.assert_array_equal(invalid.ravel(), [0, 2, 0, 0])
    assert int(sizes.sum()) == ids.size - 3


@pytest.mark.quick("padded", "allgather")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_drop_counts_what_did_not_fit(transport):
    plan = make_plan(4, 2, transport, overflow="drop", capacity_factor=1.0)  # 3 rows per pair of ranks
    ids = np.zeros((4, 2, 5, K), np.int32)

    def shard(x, ids):
        sent = moe.dispatch(x, ids, plan)
        y = moe.combine(sent.x, jnp.ones((5, K)), sent.handle)
        return sent.group_sizes, sent.stats.num_dropped, y

    sizes, dropped, y = jax.jit(over_mesh(mesh_of(4, 2), shard))(np.ones((4, 2, 5, H), np.float32), ids)
    assert plan.pair_capacity == 3
    np.testing.assert_array_equal(dropped, np.full((4, 2, 1), 5 * K - 3))
    np.testing.assert_array_equal(sizes[0, :, 0], [3 * 4 * 2] * 2)
    # the first three pairs of each device fit; tp rows are partial sums of 2 ranks
    np.testing.assert_array_equal(y[..., 0], np.broadcast_to([4, 2, 0, 0, 0], (4, 2, 5)))


def test_shared_x_joins_the_sum_before_rounding():
    plan = make_plan(1, 1, "padded", dtype="bfloat16", tokens=1, top_k=2)

    def shard(x, shared):
        sent = moe.dispatch(x, jnp.array([[0, 1]], jnp.int32), plan)
        return moe.combine(sent.x, jnp.array([[256.0, 0.5]]), sent.handle, shared_x=shared)

    x = np.ones((1, 1, 1, H))
    y = jax.jit(over_mesh(mesh_of(1, 1), shard))(jnp.asarray(x, jnp.bfloat16), jnp.asarray(0.75 * x, jnp.bfloat16))
    # 256 + 0.5 + 0.75 = 257.25 -> 258 in bf16 (even); rounding 256.5 first would give 256, then 256.75 -> 256
    assert float(y.ravel()[0]) == 258.0


def test_changing_ids_and_masks_never_retraces():
    plan = make_plan(4, 2, "padded")
    traced = chex.assert_max_traces(lambda *a: moe.dispatch(a[0], a[1], plan, token_mask=a[2]).x, n=1)
    run = jax.jit(over_mesh(mesh_of(4, 2), traced))
    rng = np.random.default_rng(5)
    for pattern in PATTERNS:
        ids = expert_ids(pattern, rng, (4, 2, 5, K), plan.num_experts, 4)
        run(small_integers(rng, (4, 2, 5, H)), ids, rng.random((4, 2, 5)) < 0.5)


@pytest.mark.quick("padded", "allgather")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_mesh_that_is_manual_in_the_plans_axes_only(transport):
    """An Auto axis beside them: XLA shards over it as it likes."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    options = {"tokens_per_rank": 4, "hidden": H, "num_experts": 8, "top_k": K, "dtype": "float32"}
    plan = moe.make_plan(mesh, **options, transport=transport)

    def shard(x, ids):
        sent = moe.dispatch(x, ids, plan)
        return moe.combine(sent.x, jnp.ones(ids.shape), sent.handle)

    spec = jax.sharding.PartitionSpec(("ep", "tp"))
    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"ep", "tp"}))
    rng = np.random.default_rng(0)
    x, ids = small_integers(rng, (16, H)), expert_ids("masked", rng, (16, K), 8, 2)
    want = 2 * (ids >= 0).sum(1, keepdims=True) * x  # both tp ranks return every row
    np.testing.assert_array_equal(run(x, ids), want)
