"""The oracle of the CANN facade: the documents' sample, hand-made cases, laws, and other formulations."""

import dataclasses
import doctest
import inspect

import family_cases as fc
import ml_dtypes
import numpy as np
import oracle
import pytest

from moe_jax import errors, reference
from moe_jax.reference import quant as number_by_number

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))]


def dispatch(config, drawn, **changes):
    arrays = fc.dispatch_arrays(config, drawn) | changes
    return oracle.moe_distribute_dispatch(drawn["x"], drawn["expert_ids"], **arrays, **config.dispatch)


def combine(config, drawn, result, expand_x, **changes):
    arrays = fc.combine_arrays(drawn) | {"expert_scales": drawn["expert_scales"]} | changes
    weights = arrays.pop("expert_scales")
    return oracle.moe_distribute_combine(expand_x, drawn["expert_ids"], result, weights, **arrays, **config.combine)


def draws(seed, keep=lambda config: True, per_config=2, **changes):
    """Ten configurations of a seed that pass ``keep``, changed, with data for each."""
    rng, found = np.random.default_rng(seed), 0
    while found < 10:
        (config,) = fc.static_configs(rng, 1)
        config = dataclasses.replace(config, **changes)
        if keep(config):
            found += 1
            yield from ((config, fc.data(rng, config)) for _ in range(per_config))


def active_pairs(config, drawn):
    """bool [.., B, K]: stated again, by token."""
    mask, active = drawn["x_active_mask"], np.ones(drawn["expert_ids"].shape, bool)
    for rank in np.ndindex(config.lead):
        if config.mask == "pairs":
            active[rank] = mask[rank]
        elif config.mask == "tokens":
            active[rank][mask[rank].sum() :] = False
    return active


def world_of(config, drawn):
    """(W, S, E, original ranks by logical rank), stated again."""
    info = drawn["elastic_info"]
    if info is None or info[0] == 0:
        return config.world, config.shared_ranks, config.experts, list(range(config.world))
    return int(info[1]), int(info[2]), int(info[3]), info[4 + config.world :][: info[1]].tolist()


def pairs_of(result, rank, count):
    return [tuple(triple) for triple in result.assist_info_for_combine[rank][: 3 * count].reshape(-1, 3).tolist()]


def own_counts(config, drawn, result):
    """By original rank [and tp rank]: the rows that came over the expert-parallel group."""
    size, shared, _, physical = world_of(config, drawn)
    last = {w: size * (1 if d < shared else config.local_experts) - 1 for d, w in enumerate(physical)}
    return {
        rank: int(result.ep_recv_counts[rank][last[rank[0]]]) for rank in np.ndindex(config.lead) if rank[0] in last
    }


def with_poison(expand_x, result):
    """``expand_x`` with NaN in every row that dispatch did not write."""
    poisoned = expand_x.copy()
    for rank in np.ndindex(result.num_rows.shape):
        poisoned[rank][result.num_rows[rank] :] = np.nan
    return poisoned


# The documents' sample.


def test_document_sample():
    config = fc.Config(world=8, tokens=8, top_k=3, hidden=16, shared_ranks=1, num_zero=1, num_copy=1, num_const=1)
    x = np.full((8, 8, 16), 1, np.uint16).view(ml_dtypes.bfloat16)
    zeros = np.zeros((8, 1), ml_dtypes.bfloat16)
    drawn = {
        "x": x,
        "expert_ids": np.broadcast_to(np.arange(3, dtype=np.int32), (8, 8, 3)),
        "scales": None,
        "x_active_mask": None,
        "elastic_info": None,
        "expert_scales": np.full((8, 8, 3), 0.1, np.float32),
        "shared_expert_x": None,
        "ori_x": x,
        "const_expert_alpha_1": zeros,
        "const_expert_alpha_2": zeros,
        "const_expert_v": np.zeros((8, 1, 16), ml_dtypes.bfloat16),
    }
    result = dispatch(config, drawn)
    assert result.expand_x.shape == (8, 64, 16) and result.assist_info_for_combine.shape == (8, 64 * 128)
    assert result.num_rows.tolist() == [64] * 4 + [0] * 4
    assert result.expert_token_nums.tolist() == [[64]] * 4 + [[0]] * 4
    assert result.ep_recv_counts.tolist() == [list(range(8, 65, 8))] * 4 + [[0] * 8] * 4
    for rank, k in enumerate([3, 0, 1, 2]):
        assert pairs_of(result, rank, 64) == [(j // 8, j % 8, k) for j in range(64)]
        assert not result.assist_info_for_combine[rank, 3 * 64 :].any()
    combined = combine(config, drawn, result, result.expand_x)
    np.testing.assert_array_equal(combined.x_out.view(np.uint16), 1)
    np.testing.assert_allclose(combined.unrounded, 1.3 * 2.0**-133, rtol=1e-4)


# Dispatch.


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_a_stable_sort_of_all_copies(seed):
    for config, drawn in draws(seed, lambda c: not c.quant_mode):
        result, active = dispatch(config, drawn), active_pairs(config, drawn)
        _size, shared, experts, physical = world_of(config, drawn)
        copies = config.num_shared if shared else 0
        for lane in np.ndindex(config.lead[1:]):
            ids = np.stack([drawn["expert_ids"][(w, *lane)] for w in physical])
            keys = np.where(np.stack([active[(w, *lane)] for w in physical]), ids, experts)
            source, token, k = (index.ravel() for index in np.indices(keys.shape))
            keys = keys.ravel()
            # Shared expert s of residue class q sits before all routed experts, as "expert" -S + rank.
            for s in range(copies):
                per = shared // config.num_shared
                where = np.stack([active[(w, *lane)].any(axis=1) for w in physical])
                d, i = np.indices(where.shape)
                rank = (d % per + s * per) - shared
                keys = np.concatenate([keys, np.where(where, rank, experts).ravel()])
                source, token = np.concatenate([source, d.ravel()]), np.concatenate([token, i.ravel()])
                k = np.concatenate([k, np.full(d.size, config.top_k + s)])
            order = np.argsort(keys, kind="stable")
            for d, w in enumerate(physical):
                low = d - shared if d < shared else (d - shared) * config.local_experts
                high = low + (1 if d < shared else config.local_experts)
                mine = [j for j in order if low <= keys[j] < high and keys[j] < experts]
                assert pairs_of(result, (w, *lane), len(mine)) == [(source[j], token[j], k[j]) for j in mine]
                expected = [drawn["x"][(physical[source[j]], *lane, token[j])] for j in mine]
                found = result.expand_x[(w, *lane)][: len(mine)]
                np.testing.assert_array_equal(found, np.array(expected, found.dtype).reshape(found.shape))
                assert own_counts(config, drawn, result)[(w, *lane)] == len(mine)


@pytest.mark.parametrize("seed", SEEDS)
def test_same_rows_as_the_library_oracle(seed):
    for config, drawn in draws(seed, lambda c: c.tp < 2 and not (c.quant_mode or c.elastic)):
        ids = np.where(active_pairs(config, drawn), drawn["expert_ids"], -1)
        ids = np.where(ids < config.experts, ids, -1)[:, None]
        expected = reference.dispatch(
            drawn["x"][:, None],
            ids,
            num_experts=config.experts,
            token_mask=active_pairs(config, drawn)[:, None],
            num_shared_experts=config.num_shared,
            num_shared_ranks=config.shared_ranks,
        )
        result = dispatch(config, drawn)
        for w in range(config.world):
            rows, origins = expected.rows[w][0], expected.origins[w][0]
            assert result.num_rows[w] == len(rows)
            np.testing.assert_array_equal(result.expand_x[w][: len(rows)], rows)
            assert pairs_of(result, w, len(rows)) == [tuple(origin) for origin in origins[:, 1:].tolist()]
            nums = np.diff(result.expert_token_nums[w], prepend=0) if config.token_nums_type == 0 else None
            sizes = expected.group_sizes[w, 0]
            if w >= config.shared_ranks:
                np.testing.assert_array_equal(result.expert_token_nums[w] if nums is None else nums, sizes)
            else:
                assert result.expert_token_nums[w].tolist() == [len(rows)] + [0] * (config.local_experts - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_and_cover(seed):
    for config, drawn in draws(seed, token_nums_type=1):
        result, active = dispatch(config, drawn), active_pairs(config, drawn)
        size, shared, experts, physical = world_of(config, drawn)
        own, seen = own_counts(config, drawn, result), {lane: [] for lane in np.ndindex(config.lead[1:])}
        for rank, count in own.items():
            peers = own[rank[0], 1 - rank[1]] if config.tp == 2 else 0
            assert result.num_rows[rank] == result.expert_token_nums[rank].sum() == count + peers
            seen[rank[1:]] += pairs_of(result, rank, count)
            counts = result.ep_recv_counts[rank]
            used = size * (1 if physical.index(rank[0]) < shared else config.local_experts)
            assert (np.diff(counts[:used]) >= 0).all()
            assert config.tp == 2 or not counts[used:].any()
            behind = [result.expand_x[rank][count + peers :], result.assist_info_for_combine[rank][3 * count :]]
            if result.dynamic_scales is not None:
                behind.append(result.dynamic_scales[rank][count + peers :])
            assert not any(rows.any() for rows in behind)
        for lane, pairs in seen.items():
            expected = []
            for d, w in enumerate(physical):
                ids = drawn["expert_ids"][(w, *lane)]
                expected += [(d, i, k) for i, k in np.argwhere(active[(w, *lane)] & (ids < experts))]
                tokens = np.flatnonzero(active[(w, *lane)].any(axis=1))
                expected += [(d, i, config.top_k + s) for i in tokens for s in range(config.num_shared * (shared > 0))]
            assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_sums_of_rows_by_expert(seed):
    for config, drawn in draws(seed, lambda c: c.local_experts > 1, token_nums_type=0):
        prefix = dispatch(config, drawn).expert_token_nums
        plain = dispatch(dataclasses.replace(config, token_nums_type=1), drawn).expert_token_nums
        _, shared, _, physical = world_of(config, drawn)
        for d, w in enumerate(physical):
            expected = [plain[w, 0]] + [0] * (config.local_experts - 1) if d < shared else np.cumsum(plain[w])
            np.testing.assert_array_equal(prefix[w], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_follow_from_the_configuration(seed):
    for config, drawn in draws(seed, per_config=1):
        again = fc.data(np.random.default_rng(seed + 100), config)
        shapes = {name: None if a is None else (a.shape, a.dtype) for name, a in drawn.items()}
        assert shapes == {name: None if a is None else (a.shape, a.dtype) for name, a in again.items()}
        result, other = dispatch(config, drawn), dispatch(config, again)
        for field in dataclasses.fields(result):
            one, two = getattr(result, field.name), getattr(other, field.name)
            assert (one is None) == (two is None)
            assert one is None or (one.shape, one.dtype) == (two.shape, two.dtype)
        assert result.expand_x.shape[: len(config.lead) + 1] == (*config.lead, config.capacity * max(config.tp, 1))
        rows, hidden = config.capacity * max(config.tp, 1), config.hidden
        tails = {2: (rows,), 3: (rows, -(-hidden // 128)), 4: (rows, -(-hidden // 64) * 2)}
        tails[5] = tails[4]
        assert result.dynamic_scales is None or result.dynamic_scales.shape == (*config.lead, *tails[config.quant_mode])
        assert (result.dynamic_scales is None) == (config.quant_mode < 2)


def test_generated_data_is_legal():
    rng, features = np.random.default_rng(5), set()
    for config in fc.static_configs(rng, 150):
        drawn = fc.data(rng, config)
        _, _, experts, _ = world_of(config, drawn)
        ids = np.sort(drawn["expert_ids"], axis=-1)
        assert (ids >= 0).all() and (ids < experts + config.num_special).all() and (np.diff(ids) > 0).all()
        features |= {(name, value) for name, value in dataclasses.asdict(config).items() if name != "global_bs"}
    values = {name: sorted({str(v) for n, v in features if n == name}) for name in fc.Config.__dataclass_fields__}
    assert values["world"] == ["1", "2", "4", "8"] and values["nodes"] == ["1", "2", "4"]
    assert values["quant_mode"] == ["0", "1", "2", "3", "4", "5"] and values["comm_quant_mode"] == ["0", "2", "3", "4"]
    assert values["mask"] == ["None", "pairs", "tokens"] and values["elastic"] == ["False", "True"]
    assert values["smooth"] == ["None", "experts", "one", "row"] and values["tokens"][:2] == ["0", "1"]


@pytest.mark.parametrize("seed", SEEDS)
def test_token_mask_is_a_shorter_batch(seed):
    for config, drawn in draws(seed, lambda c: c.tp < 2 and c.tokens and not c.elastic, mask="tokens"):
        n = int(drawn["x_active_mask"][0].sum())
        drawn["x_active_mask"][:] = drawn["x_active_mask"][:1]
        short = drawn | {name: drawn[name][:, :n] for name in ("x", "expert_ids", "expert_scales")}
        short["x_active_mask"] = None
        cut = dataclasses.replace(config, tokens=n, mask=None, global_bs=config.world * config.capacity)
        masked, plain = dispatch(config, drawn), dispatch(cut, short)
        for name in ("expert_token_nums", "ep_recv_counts", "num_rows"):
            np.testing.assert_array_equal(getattr(masked, name), getattr(plain, name))
        rows = masked.expand_x.shape[1]
        np.testing.assert_array_equal(masked.expand_x, plain.expand_x[:, :rows])
        if drawn["ori_x"] is not None:
            short["ori_x"] = drawn["ori_x"][:, :n]
        without = {"shared_expert_x": None}
        whole = combine(config, drawn, masked, with_poison(drawn["expand_x"], masked), **without)
        part = combine(cut, short, plain, drawn["expand_x"], **without)
        np.testing.assert_array_equal(whole.x_out[:, :n], part.x_out)
        assert not whole.x_out[:, n:].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_shrunken_world_is_a_smaller_world(seed):
    for config, drawn in draws(seed, lambda c: c.tp < 2 and c.nodes == 1, elastic=True):
        size, shared, experts, physical = world_of(config, drawn)
        small = {n: None if a is None else a[physical] if n != "elastic_info" else None for n, a in drawn.items()}
        if config.smooth == "experts":
            first = config.num_shared if config.shared_ranks else 0
            small["scales"] = small["scales"][:, : first + experts]
        less = dataclasses.replace(config, world=size, shared_ranks=shared, elastic=False, global_bs=0)
        shrunken, expected = dispatch(config, drawn), dispatch(less, small)
        removed = sorted(set(range(config.world)) - set(physical))
        for field in dataclasses.fields(shrunken):
            one, two = getattr(shrunken, field.name), getattr(expected, field.name)
            assert (one is None) == (two is None)
            if one is not None:
                assert not one[removed].any()
                one, common = one[physical], (slice(None), slice(min(one.shape[1:2] + two.shape[1:2], default=None)))
                common = common[: one.ndim]
                np.testing.assert_array_equal(one[common], two[common])
                assert one.ndim == 1 or not (one[:, common[1].stop :].any() or two[:, common[1].stop :].any())
        one = combine(config, drawn, shrunken, with_poison(drawn["expand_x"], shrunken))
        two = combine(less, small, expected, small["expand_x"])
        np.testing.assert_array_equal(one.x_out[physical], two.x_out)
        assert not one.x_out[removed].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_both_tp_ranks_hold_own_rows_then_the_peers(seed):
    for config, drawn in draws(seed, lambda c: c.tp == 2):
        result, alone = dispatch(config, drawn), []
        single = dataclasses.replace(config, tp=1)
        for p in range(2):
            lane = {name: a if a is None or name == "elastic_info" else a[:, p] for name, a in drawn.items()}
            alone.append(dispatch(single, lane))
        for w, p in np.ndindex(config.lead):
            own, peer = alone[p], alone[1 - p]
            n, m = int(own.num_rows[w]), int(peer.num_rows[w])
            for name in ("expand_x", "dynamic_scales"):
                if getattr(own, name) is not None:
                    expected = [getattr(own, name)[w][:n], getattr(peer, name)[w][:m]]
                    rows = getattr(result, name)[w, p]
                    np.testing.assert_array_equal(rows[: n + m], np.concatenate(expected))
                    assert not rows[n + m :].any()
            counts = np.concatenate([own.ep_recv_counts[w], peer.ep_recv_counts[w]])
            np.testing.assert_array_equal(result.ep_recv_counts[w, p], counts)
            np.testing.assert_array_equal(result.assist_info_for_combine[w, p], own.assist_info_for_combine[w])
            assert result.tp_recv_counts[w, p].tolist() == [[n, m], [m, n]][p]
            assert result.expert_token_nums[w, p].tolist() == [n + m]
            if config.expand_scales:
                np.testing.assert_array_equal(result.expand_scales[w, p], own.expand_scales[w])


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_scales_are_the_weights_of_the_rows(seed):
    for config, drawn in draws(seed, expand_scales=True):
        result = dispatch(config, drawn)
        _, _, _, physical = world_of(config, drawn)
        for rank, count in own_counts(config, drawn, result).items():
            expected = np.zeros(config.capacity, np.float32)
            for j, (source, i, k) in enumerate(pairs_of(result, rank, count)):
                if k < config.top_k:
                    expected[j] = drawn["expert_scales"][(physical[source], *rank[1:], i, k)]
            np.testing.assert_array_equal(result.expand_scales[rank], expected)


# Quantisation.


@pytest.mark.parametrize("kind", ["whole", "normal", "mixed"])
@pytest.mark.parametrize("dtype", fc.DTYPES)
@pytest.mark.parametrize("name", [oracle.dispatch_recipe(*mode) for mode in fc.QUANT] + ["int8_group8"])
def test_quantisation_agrees_with_the_one_that_goes_number_by_number(name, dtype, kind):
    rng = np.random.default_rng(3)
    for hidden in (8, 40, 130):
        x = fc.numbers(rng, kind, (5, hidden), dtype)
        x[0, 0] = np.nan if kind == "mixed" else x[0, 0]
        x[1] = fc.numbers(rng, "normal", (hidden,), dtype).astype(np.float32) * 2.0 ** (
            -133 if dtype != "float16" else -22
        )
        smooth = rng.uniform(0.1, 9, (5, hidden)).astype(np.float32)
        smooth = None if name.startswith("mx") or name == "int8_group8" else smooth
        values, scale = oracle.quantize(name, x, smooth=smooth)
        expected = number_by_number.quantize(name, x, smooth=smooth)
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(scale.astype(np.float64), expected[1].astype(np.float64))
        assert (values.dtype, scale.dtype) == (expected[0].dtype, expected[1].dtype)
        found, expected = oracle.dequantize(name, values, scale), number_by_number.dequantize(name, *expected)
        np.testing.assert_array_equal(found, expected)


def test_every_code_survives_and_ties_go_to_the_even_one():
    for name, codes in (("mx_e4m3", 0x7F), ("mx_e5m2", 0x7C), ("mx_e2m1", 8)):
        target = name[3:]
        grid = np.array([number_by_number.number(target, c) for c in range(codes)], np.float32)
        for row, expected in [
            (grid, range(codes)),
            ((grid[:-1] + grid[1:]) / 2, [c + c % 2 for c in range(codes - 1)]),
        ]:
            block = np.zeros((len(row), 32), np.float32)
            block[:, 0], block[:, 1] = row, -row
            block[:, 2] = grid[-1]  # sets the scale of the block to 1
            values, scale = oracle.quantize(name, block)
            assert (scale[:, 0] == 127).all()
            if target == "e2m1":
                values = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)
            assert values[:, 0].tolist() == list(expected)
            assert (values[:, 1] == values[:, 0] | (8 if target == "e2m1" else 128)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_quantised_rows_have_the_factors_of_their_expert(seed):
    for config, drawn in draws(seed, lambda c: c.quant_mode, hidden=8, per_config=1):
        result = dispatch(config, drawn)
        name = oracle.dispatch_recipe(config.quant_mode, config.y_dtype)
        _, shared, _, physical = world_of(config, drawn)
        for rank, count in own_counts(config, drawn, result).items():
            for j, (source, i, k) in enumerate(pairs_of(result, rank, count)):
                home = (physical[source], *rank[1:])
                smooth = None
                if config.smooth == "experts":
                    row = k - config.top_k if k >= config.top_k else drawn["expert_ids"][(*home, i, k)]
                    row = row + config.num_shared if shared and k < config.top_k else row
                    smooth = drawn["scales"][(*home, row)]
                elif config.smooth:
                    smooth = drawn["scales"][home]
                values, scale = number_by_number.quantize(name, drawn["x"][(*home, i)][None], smooth=smooth)
                np.testing.assert_array_equal(result.expand_x[rank][j], values[0])
                if config.quant_mode > 1:
                    np.testing.assert_array_equal(np.atleast_1d(result.dynamic_scales[rank][j]), scale[0])


def test_rows_that_are_quantised_already_travel_with_their_scales():
    rng = np.random.default_rng(0)
    x, scales = rng.integers(0, 255, (2, 3, 4)).astype(np.uint8), rng.random((2, 3, 2)).astype(np.float32)
    ids = np.array([[[0], [1], [1]], [[1], [1], [0]]])
    result = oracle.moe_distribute_dispatch(x, ids, moe_expert_num=2, scales=scales)
    np.testing.assert_array_equal(result.expand_x[1][:4], x[[0, 0, 1, 1], [1, 2, 0, 1]])
    np.testing.assert_array_equal(result.dynamic_scales[1][:4], scales[[0, 0, 1, 1], [1, 2, 0, 1]])
    assert not result.dynamic_scales[1][4:].any()


# Combine.


@pytest.mark.parametrize("seed", SEEDS)
def test_combine_brings_back_what_dispatch_sent(seed):
    no_specials = {"num_zero": 0, "num_copy": 0, "num_const": 0}

    def keep(config):
        return config.nodes == 1 and not config.quant_mode and config.top_k <= config.experts

    for config, drawn in draws(seed, keep, comm_quant_mode=0, elastic=False, **no_specials):
        drawn["x"] = fc.numbers(np.random.default_rng(seed), "whole", drawn["x"].shape, config.dtype)
        drawn["expert_scales"] = np.round(drawn["expert_scales"] * 4) / 4
        result, active = dispatch(config, drawn, expert_scales=drawn["expert_scales"]), active_pairs(config, drawn)
        found = combine(config, drawn, result, with_poison(result.expand_x, result), shared_expert_x=None).unrounded
        weights = np.where(active, drawn["expert_scales"], 0).astype(np.float64).sum(axis=-1)
        weights += (config.num_shared if config.shared_ranks else 0) * active.any(axis=-1)
        if config.tp == 2:
            # The peer's rows are this rank's own rows of the same batch: every value comes back doubled.
            weights = weights * 2
        np.testing.assert_array_equal(found, weights[..., None] * drawn["x"].astype(np.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_combine_against_a_float64_sum_over_triples(seed):
    for config, drawn in draws(seed, lambda c: c.nodes == 1):
        result, active = dispatch(config, drawn), active_pairs(config, drawn)
        found = combine(config, drawn, result, with_poison(drawn["expand_x"], result))
        _size, _shared, experts, physical = world_of(config, drawn)
        expected, bound = float_sum(config, drawn, result, active, (experts, physical))
        np.testing.assert_array_less(np.abs(found.unrounded - expected), bound * 2.0**-20 + 1e-35)
        written = active.any(axis=-1) & np.isin(np.arange(config.world), physical).reshape(-1, *[1] * (active.ndim - 2))
        assert not found.x_out[~written].any()
        np.testing.assert_array_equal(found.x_out, found.unrounded.astype(np.float32).astype(found.x_out.dtype))


def float_sum(config, drawn, result, active, world):
    """The sums in float64, without order or rounding, and the sums of the terms' sizes."""
    experts, physical = world
    total = np.zeros((*config.lead, config.tokens, config.hidden))
    size, own = np.zeros(total.shape), own_counts(config, drawn, result)
    wire = {0: None, 2: "int8_group8", 3: "mx_e5m2", 4: "mx_e4m3"}[config.comm_quant_mode]

    def add(token, term):
        total[token] += term
        size[token] += np.abs(term)

    for rank, count in own.items():
        rows = drawn["expand_x"][rank][:count]
        if config.tp == 2:
            peer = (rank[0], 1 - rank[1])
            other = drawn["expand_x"][peer][own[peer] : own[peer] + count]
            rows = (rows.astype(np.float32) + other.astype(np.float32)).astype(rows.dtype)
        if wire and count:
            rows = number_by_number.dequantize(wire, *number_by_number.quantize(wire, rows)).reshape(rows.shape)
        for row, (source, i, k) in zip(rows, pairs_of(result, rank, count), strict=True):
            home = (physical[source], *rank[1:], i)
            add(home, row.astype(np.float64) * (drawn["expert_scales"][(*home, k)] if k < config.top_k else 1.0))
    for rank in own:
        for i, k in np.argwhere(active[rank]):
            home, e = (*rank, i), int(drawn["expert_ids"][(*rank, i, k)]) - experts - config.num_zero
            weight = float(drawn["expert_scales"][(*rank, i, k)])
            if 0 <= e < config.num_copy:
                add(home, weight * drawn["ori_x"][home].astype(np.float64))
            elif e >= config.num_copy:
                special = reference.SpecialExperts(
                    num_experts=0,
                    num_const=config.num_const,
                    alpha1=drawn["const_expert_alpha_1"][rank].astype(np.float64),
                    alpha2=drawn["const_expert_alpha_2"][rank].astype(np.float64),
                    v=drawn["const_expert_v"][rank].astype(np.float64),
                )
                x = drawn["ori_x"][home].astype(np.float64)
                add(home, weight * reference.special_value(x, e - config.num_copy, special))
                size[home] += abs(weight) * 8 * (np.abs(x) + np.abs(special.v[e - config.num_copy]))
        if drawn["shared_expert_x"] is not None:
            shared = drawn["shared_expert_x"][rank].reshape(config.tokens, config.hidden).astype(np.float64)
            for i in np.flatnonzero(active[rank].any(axis=-1)):
                add((*rank, i), shared[i])
    return total, size


def test_products_are_rounded_before_they_are_added():
    # fp32(w * y) with y = 1 + 2^-7 and w = 1 + 2^-23 is y + 2^-23: a fused product would keep 2^-30.
    y, w = np.float32(1 + 2.0**-7), np.float32(1 + 2.0**-23)
    assert float(w) * float(y) != float(np.float32(w * y))
    x = np.full((1, 1, 1), y).astype(ml_dtypes.bfloat16)
    ids, weights = np.array([[[0, 1]]]), np.array([[[-1.0, w]]], np.float32)
    result = oracle.moe_distribute_dispatch(x, ids, moe_expert_num=2)
    found = oracle.moe_distribute_combine(result.expand_x, ids, result, weights, moe_expert_num=2)
    assert found.unrounded.item() == 2.0**-23


def test_sums_go_up_in_k():
    x = np.ones((1, 1, 1), np.float16)
    ids, weights = np.array([[[2, 0, 1]]]), np.array([[[2.0**24, 1.0, -(2.0**24)]]], np.float32)
    result = oracle.moe_distribute_dispatch(x, ids, moe_expert_num=3)
    found = oracle.moe_distribute_combine(result.expand_x, ids, result, weights, moe_expert_num=3)
    assert found.unrounded.item() == 0.0  # the 1 drowns in 2^24; k = 0, 2, 1 would keep it
    plain = oracle.moe_distribute_combine(result.expand_x, ids, result, weights[..., :0], moe_expert_num=3)
    assert plain.unrounded.item() == 3.0


@pytest.mark.parametrize("dtype", fc.DTYPES.values())
def test_tp_sums_are_rounded_before_they_travel(dtype):
    x = np.ones((1, 2, 1, 1), dtype)
    ids, numbers = np.zeros((1, 2, 1, 1), np.int32), {"moe_expert_num": 1, "tp_world_size": 2}
    result = oracle.moe_distribute_dispatch(x, ids, **numbers)
    small = float(ml_dtypes.finfo(dtype).eps) / 2
    rows = np.array([[[[1.0], [3.0]], [[5.0], [small]]]]).astype(dtype)  # own row, then the peer's
    found = oracle.moe_distribute_combine(rows, ids, result, np.ones((1, 2, 1, 1), np.float32), **numbers)
    assert found.unrounded[0, :, 0, 0].tolist() == [1.0, 8.0]  # 1 + eps / 2 is a tie and goes to the even 1


def test_special_experts_by_hand():
    numbers = {"moe_expert_num": 1, "zero_expert_num": 1, "copy_expert_num": 1, "const_expert_num": 2}
    x = np.array([[[1.0, 2.0]]], np.float16)
    ids, weights = np.array([[[4, 1, 2, 3, 0]]]), np.array([[[1, 50, 10, 2, 100]]], np.float32)
    v = np.array([[[1.0, 1.0], [3.0, 5.0]]], np.float16)
    result = oracle.moe_distribute_dispatch(x, ids, **numbers)
    assert result.num_rows.tolist() == [1]

    def combined(alpha_1, alpha_2):
        alphas = {"const_expert_alpha_1": np.array([alpha_1], np.float16)}
        alphas["const_expert_alpha_2"] = np.array([alpha_2], np.float16)
        return oracle.moe_distribute_combine(
            x, ids, result, weights, ori_x=x, const_expert_v=v, **alphas, **numbers
        ).unrounded[0, 0]

    # c = 1: 2 x + 4 v[1] = (14, 24); zero: 0; copy: 10 x; c = 0, weight 2: 3 x + 1 v[0] = (4, 7); routed: 100 x.
    assert combined([3.0, 2.0], [1.0, 4.0]).tolist() == [14 + 10 + 8 + 100, 24 + 20 + 14 + 200]
    # Gates: c = 0 is undecided, c = 1 is all x.
    gated = combined([[0, 0], [100, 100]], [[0, 0], [-100, -100]])
    assert gated.tolist() == [1 + 10 + 2 * 1.0 + 100, 2 + 20 + 2 * 1.5 + 200]


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_by_node_that_need_no_rounding_are_those_of_one_node(seed):
    """Whatever else a call has: shared ranks, special experts, masks, tables, two tp ranks."""
    found = 0
    kind = {"comm_quant_mode": 0, "dtype": "float16", "norm": False, "alpha_ndim": 1}
    for config, drawn in draws(seed, lambda c: c.nodes > 1, per_config=4, **kind):
        quarters = 4 * drawn["expert_scales"]
        if quarters.size and (quarters == np.rint(quarters)).all():  # the draws of whole numbers
            found += 1
            result, whole = dispatch(config, drawn), dataclasses.replace(config, nodes=1)
            sums = combine(config, drawn, result, with_poison(drawn["expand_x"], result))
            np.testing.assert_array_equal(sums.x_out, combine(whole, drawn, result, drawn["expand_x"]).x_out)
    assert found


def _only_rows(config):
    """Whether sums are of routed experts' rows alone, none of them quantised on its way."""
    extras = config.shared_ranks or config.num_special or config.comm_quant_mode or config.quant_mode
    return config.tp < 2 and not (extras or config.elastic or config.mask)


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_by_node(seed):
    plain = {"num_zero": 0, "num_copy": 0, "num_const": 0, "mask": None, "comm_quant_mode": 0}
    for config, drawn in draws(seed, lambda c: c.nodes > 1 and c.top_k <= c.experts and _only_rows(c), **plain):
        # Weights come from expand_scales, so those given here must not matter.
        result = dispatch(config, drawn)
        other = {"expert_scales": np.full_like(drawn["expert_scales"], np.nan), "shared_expert_x": None}
        found = combine(config, drawn, result, with_poison(drawn["expand_x"], result), **other)
        total = np.zeros(found.unrounded.shape, np.float32)
        parts = np.zeros((config.nodes, *total.shape), np.float32)
        for k in range(config.top_k):
            for w in range(config.world):
                for j, (source, i, column) in enumerate(pairs_of(result, w, int(result.num_rows[w]))):
                    if column == k:
                        term = drawn["expert_scales"][source, i, k] * drawn["expand_x"][w, j].astype(np.float32)
                        parts[w * config.nodes // config.world, source, i] += term
        for part in parts:
            total += part.astype(config.dtype).astype(np.float32)
        np.testing.assert_array_equal(found.unrounded, total)
        whole = combine(dataclasses.replace(config, nodes=1), drawn, result, drawn["expand_x"], shared_expert_x=None)
        roundoff = float(ml_dtypes.finfo(found.x_out.dtype).eps)
        size = np.abs(parts).sum(axis=0)
        assert (np.abs(found.unrounded - whole.unrounded) <= roundoff * size + 1e-6 * size + 1e-7).all()


# Combine, residual and RMSNorm.


@pytest.mark.parametrize("seed", SEEDS)
def test_add_rms_norm(seed):
    for config, drawn in draws(seed, lambda c: c.tp < 2, norm=True, dtype="bfloat16"):
        result, active = dispatch(config, drawn), active_pairs(config, drawn).any(axis=-1)
        rows = with_poison(drawn["expand_x"], result)
        combined = combine(config, drawn, result, rows)
        found = oracle.moe_distribute_combine_add_rms_norm(
            rows, drawn["expert_ids"], result, drawn["expert_scales"], drawn["residual_x"], drawn["gamma"],
            norm_eps=0.01, **fc.combine_arrays(drawn), **config.combine,
        )  # fmt: skip
        _, _, _, physical = world_of(config, drawn)
        for w in range(config.world):
            on = active[w] & (w in physical)
            residual, gamma = drawn["residual_x"][w][:, 0][on], drawn["gamma"][w].astype(np.float64)
            y, rstd, x = reference.add_rms_norm(combined.unrounded[w][on], residual.astype(np.float64), gamma, eps=0.01)
            np.testing.assert_array_equal(found.x[w][on][:, 0], x.astype(np.float32).astype(found.x.dtype))
            np.testing.assert_allclose(found.rstd[w][on][:, 0, 0], rstd, rtol=1e-6)
            np.testing.assert_allclose(found.y[w][on][:, 0].astype(np.float64), y, rtol=2.0**-7, atol=1e-30)
            for output in (found.x, found.y, found.rstd):
                assert not output[w][~on].any()


def test_add_rms_norm_by_hand():
    x = np.array([[[3.0, 4.0]]]).astype(ml_dtypes.bfloat16)
    ids, weights = np.zeros((1, 1, 1), np.int32), np.ones((1, 1, 1), np.float32)
    residual = np.full((1, 1, 1, 2), 2.0**-10).astype(ml_dtypes.bfloat16)
    gamma = np.array([[1.0, 1.75]]).astype(ml_dtypes.bfloat16)
    result = oracle.moe_distribute_dispatch(x, ids, moe_expert_num=1)
    found = oracle.moe_distribute_combine_add_rms_norm(
        result.expand_x, ids, result, weights, residual, gamma, norm_eps=0.0, moe_expert_num=1
    )
    acc = np.array([3 + 2.0**-10, 4 + 2.0**-10])
    assert found.unrounded.ravel().tolist() == acc.tolist() and found.x.astype(float).ravel().tolist() == [3.0, 4.0]
    rstd = 1 / np.sqrt((acc**2).mean())  # of the sum before rounding; that of (3, 4) differs
    assert found.rstd.shape == (1, 1, 1, 1) and found.rstd.item() == np.float32(rstd)
    # 4.001 * 0.2828 = 144.84 / 128, in bf16 145 / 128; times 1.75 = 253.75 / 128, in bf16 254 / 128. Unrounded: 253.
    assert (found.y.astype(float).ravel() * 128).tolist() == [np.rint(acc[0] * rstd * 256) / 2, 254.0]


# Mistakes.


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"moe_expert_num": 5}, "multiple of W - S"),
        ({"shared_expert_rank_num": 2}, "shared_expert_rank_num"),
        ({"shared_expert_num": 2}, "shared_expert_num"),
        ({"moe_expert_num": 2, "shared_expert_rank_num": 1, "shared_expert_num": 2}, "multiple of shared_expert_num"),
        ({"global_bs": 5}, "global_bs"),
        ({"global_bs": 2}, "global_bs"),
        ({"tp_world_size": 2}, "one expert per rank"),
        ({"quant_mode": 3, "y_dtype": "int8"}, "quant_mode"),
        ({"quant_mode": 1}, "scales is missing"),
        ({"quant_mode": 4, "y_dtype": "float8_e5m2", "scales": np.ones((2, 4, 2), np.float32)}, "takes none"),
        ({"scales": np.ones((2, 4, 2), np.float32)}, "quant_mode=0"),
        ({"moe_expert_num": 2}, "expert_ids"),
        ({"elastic_info": np.array([1, 1, 0, 4, 0, -1, 0, -1])}, "L must stay"),
        ({"elastic_info": np.array([1, 1, 0, 2, 0, -1, 1, -1])}, "contradict"),
        ({"elastic_info": np.array([1, 1, 0, 2, 0, -1, 0])}, "elastic_info"),
    ],
)
def test_contradictions_are_refused(changes, text):
    x, ids = np.ones((2, 2, 2), np.float16), np.full((2, 2, 1), 3)
    with pytest.raises(errors.MoEError, match=text):
        oracle.moe_distribute_dispatch(x, ids, **({"moe_expert_num": 4} | changes))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"copy_expert_num": 1}, "ori_x"),
        ({"const_expert_num": 1, "ori_x": np.ones((2, 2, 2), np.float16)}, "const_expert_alpha_1"),
        ({"comm_quant_mode": 1}, "comm_quant_mode"),
        ({"nodes": 3}, "nodes"),
    ],
)
def test_contradictions_in_combine_are_refused(changes, text):
    x, ids, weights = np.ones((2, 2, 2), np.float16), np.zeros((2, 2, 1), int), np.ones((2, 2, 1), np.float32)
    result = oracle.moe_distribute_dispatch(x, ids, moe_expert_num=2)
    with pytest.raises(errors.MoEError, match=text):
        oracle.moe_distribute_combine(result.expand_x, ids, result, weights, moe_expert_num=2, **changes)


def test_the_oracle_does_without_jax_and_its_examples_hold():
    modules = [oracle, oracle.combine, oracle.dispatch, oracle.numerics, oracle.world]
    assert not any("import jax" in inspect.getsource(module) for module in modules)
    assert doctest.testmod(oracle.numerics) == doctest.TestResults(failed=0, attempted=2)
