"""update_expert against the oracle, and every place where its document and the kernel differ, checked by hand."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax import _compat, errors, reference

WEIGHT_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def random_table(rng, num_experts, width):
    """Distinct instances in a random order; what stands behind them is no instance."""
    table = rng.integers(10_000, 20_000, (num_experts, width))
    table[:, 0] = rng.integers(1, width, num_experts)
    start = 0
    for row in table:
        row[1 : row[0] + 1] = rng.permutation(np.arange(start, start + row[0]))
        start += row[0]
    return table.astype(np.int32)


def random_case(seed, num_tokens=13, top_k=4, num_experts=9, width=6):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, num_experts, (num_tokens, top_k)).astype(np.int32)
    return ids, random_table(rng, num_experts, width), rng


def pruning(rng, shape, dtype, masked):
    """Weights and shares from few values, so that many pairs stand exactly on their threshold."""
    options = {
        "combine_weights": np.asarray(rng.integers(0, 5, shape) / 8).astype(dtype),
        "pruning_threshold": rng.choice([0.0, 0.125, 0.25, 0.5], shape[1]).astype(np.float32),
    }
    return options | ({"token_mask": rng.random(shape[0]) < 0.6} if masked else {})


def check(ids, table, **options):
    """The library, jitted with everything traced that may be, gives exactly the oracle's answer."""
    arrays = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in options.items() if k not in arrays}
    run = jax.jit(lambda ids, table, arrays: moe_jax.update_expert(ids, table, **arrays, **static))
    got = run(ids, table, arrays)
    expected = reference.update_expert(ids, table, **options)
    assert got[0].dtype == ids.dtype
    np.testing.assert_array_equal(got[0], expected[0])
    if expected[1] is None:
        assert got[1] is None
    else:
        assert got[1].dtype == bool
        np.testing.assert_array_equal(got[1], expected[1])
    return np.asarray(got[0]).tolist(), None if got[1] is None else np.asarray(got[1]).tolist()


# --- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.quick("rank-True-bfloat16", "token-False-float16")
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("balance", ["rank", "token"])
def test_every_option(balance, masked, dtype):
    for seed, ep_size in itertools.product(range(3), (2, 8)):
        ids, table, rng = random_case(seed)
        options = {"rank": int(rng.integers(ep_size)), "ep_size": ep_size, "balance": balance}
        check(ids, table, **options)
        mask = check(ids, table, **options, **pruning(rng, ids.shape, dtype, masked))[1]
        assert 0 < np.sum(mask) < np.size(mask)


@hypothesis.given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 9), st.sampled_from(["rank", "token"]), st.data()
)
def test_any_table_and_rank(seed, ep_size, width, balance, data):
    ids, table, _ = random_case(seed, width=width)
    rank = data.draw(st.integers(0, ep_size - 1))
    got = moe_jax.update_expert(ids, table, rank=rank, ep_size=ep_size, balance=balance)[0]
    expected = reference.update_expert(ids, table, rank=rank, ep_size=ep_size, balance=balance)[0]
    np.testing.assert_array_equal(got, expected)
    for (t, k), e in np.ndenumerate(ids):  # an instance of that very expert
        assert got[t, k] == -1 if e == -1 else got[t, k] in table[e, 1 : table[e, 0] + 1]


@hypothesis.given(st.integers(0, 2**31), st.sampled_from(WEIGHT_DTYPES))
def test_pruning_of_any_weights(seed, dtype):
    """Weights without structure: the order of the sum and the rounding of the product decide."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(64, 5)).astype(dtype)
    total = functools.reduce(np.add, weights.astype(np.float32).T)  # ascending k
    threshold = (weights[7].astype(np.float32) / total[7]).astype(np.float32)  # one row on its thresholds, or next to
    options = {"rank": 0, "ep_size": 2, "combine_weights": weights, "pruning_threshold": threshold}
    got = moe_jax.update_expert(np.zeros((64, 5), np.int32), np.array([[1, 0]], np.int32), **options)[1]
    expected = reference.update_expert(np.zeros((64, 5), np.int32), np.array([[1, 0]], np.int32), **options)[1]
    np.testing.assert_array_equal(got, expected)


def test_threshold_of_shape_1_k():
    ids, table, rng = random_case(0)
    options = {"rank": 0, "ep_size": 2} | pruning(rng, ids.shape, np.float32, True)
    flat = check(ids, table, **options)
    assert check(ids, table, **options | {"pruning_threshold": options["pruning_threshold"][None]}) == flat


def test_int64_ids():
    ids, table, _ = random_case(0)
    with jax.enable_x64(True):
        for balance in ("rank", "token", "load"):
            check(ids.astype(np.int64), table, rank=3, ep_size=4, balance=balance)
    with pytest.raises(errors.DtypeError, match="jax_enable_x64"):
        moe_jax.update_expert(ids.astype(np.int64), table, rank=3, ep_size=4)


def test_no_tokens():
    check(np.zeros((0, 2), np.int32), np.array([[1, 0]], np.int32), rank=0, ep_size=2)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_sample_of_the_document():
    """W = 8, BS = 8, K = 3, eight experts of one instance each: nothing changes, on any rank."""
    ids = np.tile(np.arange(3, dtype=np.int32), (8, 1))
    table = np.stack([np.ones(8), np.arange(8)], axis=1).astype(np.int32)
    for rank in range(8):
        assert check(ids, table, rank=rank, ep_size=8) == (ids.tolist(), None)


def by_rank(table, ep_size):
    """The instance that each rank's tokens of expert 0 go to."""
    ids, table = np.zeros((1, 1), np.int32), np.array([table], np.int32)
    return [check(ids, table, rank=r, ep_size=ep_size)[0][0][0] for r in range(ep_size)]


def test_disagreement_1_ranks_per_instance_is_the_ceiling_of_a_quotient():
    assert by_rank([2, 70, 71, -1], 8) == [70] * 4 + [71] * 4
    assert by_rank([2, 70, 71, -1], 5) == [70] * 3 + [71] * 2


def test_disagreement_2_by_token_counts_modulo_the_instances_and_skips_the_first_column():
    ids, table = np.zeros((5, 1), np.int32), np.array([[2, 70, 71, 99]], np.int32)
    assert check(ids, table, rank=0, ep_size=8, balance="token")[0] == [[70], [71], [70], [71], [70]]


def test_disagreement_3_by_token_counts_tokens_and_not_pairs():
    ids, table = np.zeros((2, 3), np.int32), np.array([[2, 70, 71]], np.int32)
    assert check(ids, table, rank=0, ep_size=8, balance="token")[0] == [[70, 70, 70], [71, 71, 71]]


def test_disagreement_4_pairs_at_or_above_the_threshold_stay_and_the_sum_is_of_weights_alone():
    weights = np.array([[0.5, 0.25, 0.25]], np.float32)
    options = {"rank": 0, "ep_size": 2, "combine_weights": weights}
    ids, table = np.zeros((1, 3), np.int32), np.array([[1, 0]], np.int32)
    for threshold, mask in [
        ([0.5, 0.25, 0.25], [True, True, True]),  # all exactly on their thresholds
        ([0.5, 0.2500001, 0.1], [True, False, True]),
        ([0.6, 0.0, 0.0], [False, True, True]),  # with sum(w * threshold) = 0.3 the first would stay
        ([1.0, 1.0, 1.0], [False, False, False]),  # nobody is spared
    ]:
        assert check(ids, table, **options, pruning_threshold=np.array(threshold, np.float32))[1] == [mask]


def test_disagreement_5_the_ceiling_can_leave_instances_idle():
    assert by_rank([3, 70, 71, 72], 8) == [70] * 3 + [71] * 3 + [72] * 2
    assert by_rank([5, 70, 71, 72, 73, 74], 8) == [70, 70, 71, 71, 72, 72, 73, 73]  # 74 serves nobody


def test_a_mask_is_read_token_by_token_and_not_as_a_prefix():
    ids, table = np.zeros((3, 2), np.int32), np.array([[1, 5]], np.int32)
    keep_all = {"combine_weights": np.ones((3, 2), np.float32), "pruning_threshold": np.zeros(2, np.float32)}
    mask = np.array([False, True, False])
    got = check(ids, table, rank=0, ep_size=2, token_mask=mask, **keep_all)
    assert got == ([[5, 5]] * 3, [[False] * 2, [True] * 2, [False] * 2])


@pytest.mark.parametrize("balance", ["rank", "token", "load"])
def test_ids_without_an_instance_never_become_a_neighbours(balance):
    table = np.array([[1, 4, 0], [0, 7, 7], [3, 8, 9], [-1, 7, 7]], np.int32)
    ids = np.array([[-1, 0, 1], [2, 3, 4], [-2, -100, 2**31 - 1]], np.int32)
    assert check(ids, table, rank=1, ep_size=2, balance=balance)[0] == [[-1, 4, -2], [-2, -2, -2], [-2, -2, -2]]


# --- by load ---------------------------------------------------------------------------------------------------------

EIGHTHS = np.arange(9) / 8  # shares that are read as they are


@functools.cache
def by_load(size, with_shares):
    """The ids of all ranks at once, with tables, shares and masks as data."""

    def run(ids, table, shares, mask, rank):
        options = {"balance": "load", "shares": shares, "token_mask": mask}
        return moe_jax.update_expert(ids, table, rank=rank, ep_size=size, **options)[0]

    axes = (0, None, None, 0, 0) if with_shares else (0, None, None, None, 0)
    return jax.jit(jax.vmap(run, axes))


def shares_of(table, shares):
    """[E, F - 1] f64 that sum to 1, zeros behind the instances."""
    is_instance = np.arange(table.shape[1] - 1) < table[:, :1]
    weights = np.where(is_instance, is_instance if shares is None else shares, 0.0)
    weights = np.where(weights.sum(1, keepdims=True) > 0, weights, is_instance)
    return weights / weights.sum(1, keepdims=True)


@hypothesis.given(st.integers(0, 2**31), st.sampled_from([1, 6, 8]))
def test_by_load_each_instance_gets_its_share(seed, size):
    """On every rank rounded up or down; and of all ranks within 1 of it where they have equally many pairs."""
    rng, top_k, width = np.random.default_rng(seed), 2, 5
    table = random_table(rng, 6, width)
    chances = rng.dirichlet(np.full(6, 0.5))
    ids = rng.choice(6, (24, top_k), p=chances).astype(np.int32)
    ids = np.stack([rng.permutation(ids.ravel()).reshape(ids.shape) for _ in range(size)])  # the same counts everywhere
    shares = rng.choice(EIGHTHS, (6, width - 1)).astype(np.float32) if size == 8 else None
    mask = rng.random((size, 24)) < 0.7 if size == 8 else None
    got = np.asarray(by_load(size, shares is not None)(ids, table, shares, mask, np.arange(size, dtype=np.int32)))
    counted = np.ones(ids.shape, bool) if mask is None else np.repeat(mask[..., None], top_k, 2)
    wanted, total = shares_of(table, shares), np.zeros((6, width - 1))
    for rank in range(size):
        given = {"rank": rank, "ep_size": size, "balance": "load", "shares": shares}
        given["token_mask"] = None if mask is None else mask[rank]
        np.testing.assert_array_equal(got[rank], reference.update_expert(ids[rank], table, **given)[0])
        for e, row in enumerate(table):
            mine = got[rank][(ids[rank] == e) & counted[rank]]
            instances = row[1 : row[0] + 1]
            found = (mine[:, None] == instances).sum(0)
            assert found.sum() == len(mine), "an instance of another expert"
            assert (np.abs(found - len(mine) * wanted[e, : row[0]]) < 1).all()
            total[e, : row[0]] += found
    if mask is None:
        load = np.bincount(ids.ravel(), minlength=6)[:, None]
        assert (np.abs(total - load * wanted) <= 1).all()


def test_by_load_splits_what_by_token_sends_to_one_instance():
    """Every second token wants the hot expert, as where documents and padding take turns, or two kinds of tokens."""
    ids, table = np.array([[0], [1]] * 8, np.int32), np.array([[2, 70, 71], [1, 72, -1]], np.int32)
    hot = {}
    for balance in ("token", "load"):
        hot[balance] = check(ids, table, rank=0, ep_size=4, balance=balance)[0][::2]
    assert hot == {"token": [[70]] * 8, "load": [[70]] * 4 + [[71]] * 4}


def test_by_load_single_pairs_of_many_ranks_are_spread_too():
    """One pair on each rank cannot be split, but the ranks choose all instances equally often."""
    size, instances = 24, 8
    table = np.array([[instances, *range(instances)]] * 3, np.int32)
    ids = np.tile(np.array([[0], [1], [2]], np.int32), (size, 1, 1))
    got = np.asarray(by_load(size, False)(ids, table, None, None, np.arange(size, dtype=np.int32)))
    for expert in range(3):
        assert (np.bincount(got[:, expert, 0]) == size // instances).all()
    assert len(set(got[0].ravel().tolist())) == 3, "experts of one rank take turns as well"


def test_by_load_shares_by_hand():
    """On rank 1 of 3 the phase is 1/2: g is 1, and m = 1."""
    ids, mask, rank = np.zeros((1, 8, 1), np.int32), np.ones((1, 8), bool), np.array([1], np.int32)
    table = np.array([[3, 70, 71, 72, 99]], np.int32)
    for shares, counts in (
        ([0.25, 0.5, 0.25, 0], [2, 4, 2]),
        ([0.125, 0.25, 0.125, 0.5], [2, 4, 2]),  # only their proportion counts, and the last is no instance
        ([0.5, 0, 0.5, 0], [4, 0, 4]),
        ([0, 0, 1, 0], [0, 0, 8]),
        ([np.nan, -1, np.inf, 0], [0, 0, 8]),
        ([2, 1, 2, 1], [3, 2, 3]),  # what is above 1 is read as 1
        ([0, 0, 0, 1], [3, 2, 3]),
    ):
        given = np.array([shares], np.float32)
        got = np.ravel(by_load(3, True)(ids, table, given, mask, rank))
        assert np.repeat([70, 71, 72], counts).tolist() == got.tolist(), shares
        wanted = reference.update_expert(ids[0], table, rank=1, ep_size=3, balance="load", shares=given)[0]
        assert np.ravel(wanted).tolist() == got.tolist(), shares


def test_by_load_pairs_that_do_not_count_take_no_share():
    """Masked and pruned pairs go to instance 0, whatever its share, and the others are split as if they were alone."""
    table, mask = np.array([[2, 70, 71]], np.int32), np.array([True, False, False, True])
    for shares, wanted in (([1, 1], [70, 70, 70, 71]), ([0, 1], [71, 70, 70, 71])):
        given = np.array([shares], np.float32)
        got = by_load(1, True)(np.zeros((1, 4, 1), np.int32), table, given, mask[None], np.zeros(1, np.int32))
        assert np.ravel(got).tolist() == wanted
    options = {"balance": "load", "token_mask": mask, "shares": given}
    options["combine_weights"] = np.array([[0.5, 0.5], [1, 0]] * 2, np.float32)
    options["pruning_threshold"] = np.array([0.25, 0.25], np.float32)
    got = check(np.zeros((4, 2), np.int32), table, rank=0, ep_size=1, **options)
    assert got == ([[71, 71], [70, 70], [70, 70], [71, 70]], [[True] * 2, [False] * 2, [False] * 2, [True, False]])


def test_by_load_counts_beyond_what_a_product_of_32_bits_holds():
    """200,000 pairs of one expert, times shares in steps of 2^-15, are far above 2^31."""
    shares, many = np.array([[0.3, 0.45, 0.25]], np.float32), 200_000
    ids, table = np.zeros((1, many, 1), np.int32), np.array([[3, 0, 1, 2]], np.int32)
    got = by_load(64, True)(ids, table, shares, np.ones((1, many), bool), np.array([5], np.int32))
    wanted = many * np.rint(shares[0] * 2.0**15) / np.rint(shares * 2.0**15).sum()
    assert (np.abs(np.bincount(np.ravel(got)) - wanted) < 1).all()


# --- traced ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["rank", "token", "load"])
def test_new_tables_masks_and_ranks_do_not_retrace(balance):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(ids, table, rank, options):
        return moe_jax.update_expert(ids, table, rank=rank, ep_size=8, balance=balance, **options)

    for seed in range(4):
        ids, table, rng = random_case(seed)
        options = pruning(rng, ids.shape, np.float32, True)
        if balance == "load":
            options["shares"] = rng.integers(0, 5, (len(table), table.shape[1] - 1)).astype(np.float32) / 8
        got = run(ids, table, np.int32(seed), options)
        chex.assert_trees_all_equal(
            got, reference.update_expert(ids, table, rank=seed, ep_size=8, balance=balance, **options)
        )


def test_the_rank_of_a_shard():
    """Inside shard_map the axis index is the rank; nothing travels."""
    mesh, table = moe_jax.make_mesh(ep=8), np.array([[3, 70, 71, 72]], np.int32)

    def shard(ids, table):
        return moe_jax.update_expert(ids, table, rank=jax.lax.axis_index("ep"), ep_size=8)[0]

    run = jax.jit(_compat.shard_map(shard, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep")))
    ids = np.zeros((8, 1), np.int32)
    assert np.ravel(run(ids, table)).tolist() == [70] * 3 + [71] * 3 + [72] * 2
    text = run.lower(ids, table).compile().as_text()
    assert "all-" not in text and "collective" not in text


def test_works_under_differentiation():
    def loss(weights):
        ids, table = jnp.zeros((2, 2), jnp.int32), jnp.array([[1, 0]])
        threshold = jnp.full(2, 0.3)
        ids, mask = moe_jax.update_expert(
            ids, table, rank=0, ep_size=2, combine_weights=weights, pruning_threshold=threshold
        )
        return jnp.sum(jnp.where(mask, weights, 0.0)) + jnp.sum(ids)

    gradient = jax.grad(loss)(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    assert gradient.tolist() == [[1.0, 0.0], [1.0, 1.0]]


# --- what is refused -------------------------------------------------------------------------------------------------

T, K, E, F = 4, 2, 3, 3
WEIGHTS = np.ones((T, K), np.float32)
SHARES = np.ones((E, F - 1), np.float32)
BY_LOAD = {"balance": "load"}
PRUNED = {"combine_weights": WEIGHTS, "pruning_threshold": np.zeros(K, np.float32)}


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"expert_ids": None}, errors.MissingArgumentError, "expert_ids"),
        ({"expert_ids": np.zeros(T, np.int32)}, errors.ShapeError, "expert_ids"),
        ({"expert_ids": np.zeros((T, 0), np.int32)}, errors.ShapeError, "expert_ids"),
        ({"expert_ids": np.zeros((T, K), np.float32)}, errors.DtypeError, "expert_ids"),
        ({"expert_ids": np.zeros((T, K), np.int16)}, errors.DtypeError, "expert_ids"),
        ({"table": None}, errors.MissingArgumentError, "table"),
        ({"table": np.zeros(F, np.int32)}, errors.ShapeError, "table"),
        ({"table": np.zeros((E, 1), np.int32)}, errors.ShapeError, "table"),
        ({"table": np.zeros((0, F), np.int32)}, errors.ShapeError, "table"),
        ({"table": np.zeros((E, F), np.float32)}, errors.DtypeError, "table"),
        ({"balance": "ranks"}, errors.InvalidArgumentError, "balance='ranks'.*'rank'"),
        ({"balance": 0}, errors.InvalidArgumentError, "balance=0"),
        ({"ep_size": 0}, errors.InvalidArgumentError, "ep_size=0"),
        ({"rank": 8, "balance": "load"}, errors.InvalidArgumentError, "rank=8.*ep_size=8"),
        ({"shares": SHARES}, errors.UnexpectedArgumentError, 'balance=.rank.*only balance="load" reads shares'),
        (BY_LOAD | {"shares": SHARES[:, 1:]}, errors.ShapeError, "shares"),
        (BY_LOAD | {"shares": SHARES.astype(np.float16)}, errors.DtypeError, "shares"),
        (BY_LOAD | {"token_mask": np.ones(T + 1, bool)}, errors.ShapeError, "token_mask"),
        ({"rank": -1}, errors.InvalidArgumentError, "rank=-1"),
        ({"rank": 8}, errors.InvalidArgumentError, "rank=8.*ep_size=8"),
        ({"rank": 1.0}, errors.InvalidArgumentError, "rank=1.0"),
        ({"rank": None}, errors.InvalidArgumentError, "rank=None"),
        ({"rank": np.zeros(1, np.int32)}, errors.ShapeError, "rank"),
        ({"rank": np.zeros((), np.float32)}, errors.DtypeError, "rank"),
        ({"combine_weights": WEIGHTS}, errors.MissingArgumentError, "pruning_threshold"),
        ({"pruning_threshold": np.zeros(K, np.float32)}, errors.MissingArgumentError, "combine_weights"),
        ({"token_mask": np.ones(T, bool)}, errors.InvalidArgumentError, "token_mask.*dispatch"),
        (PRUNED | {"combine_weights": np.ones((T, K + 1), np.float32)}, errors.ShapeError, "combine_weights"),
        (PRUNED | {"combine_weights": np.ones((T, K), np.int32)}, errors.DtypeError, "combine_weights"),
        (PRUNED | {"pruning_threshold": np.zeros((K, 1), np.float32)}, errors.ShapeError, "pruning_threshold"),
        (PRUNED | {"pruning_threshold": np.zeros(K + 1, np.float32)}, errors.ShapeError, "pruning_threshold"),
        (PRUNED | {"pruning_threshold": 0.5}, errors.DtypeError, "pruning_threshold"),
        (PRUNED | {"pruning_threshold": np.zeros(K, jnp.bfloat16)}, errors.DtypeError, "pruning_threshold"),
        (PRUNED | {"token_mask": np.ones((T, K), bool)}, errors.ShapeError, "token_mask"),
        (PRUNED | {"token_mask": np.ones(T, np.float32)}, errors.DtypeError, "token_mask"),
    ],
)
def test_wrong_arguments_are_named(changes, error, names):
    given = {"expert_ids": np.zeros((T, K), np.int32), "table": np.ones((E, F), np.int32), "rank": 0, "ep_size": 8}
    given |= changes
    with pytest.raises(error, match=names):
        moe_jax.update_expert(given.pop("expert_ids"), given.pop("table"), **given)


def test_by_token_reads_neither_rank_nor_ep_size():
    ids, table = np.zeros((2, 1), np.int32), np.array([[2, 70, 71]], np.int32)
    assert check(ids, table, rank=99, ep_size=0, balance="token")[0] == [[70], [71]]
