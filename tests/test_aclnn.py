"""The facade against its oracle: generated worlds, masks, elastic tables, wires and transports.

Counts, triples, rows and codes are exact; sums are within fp32 rounding of the oracle's unrounded ones, and exact where
the data are small whole numbers. A program is compiled once for a static configuration and runs on many draws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from aclnn_cases import groups, over_ranks, over_world
from family_cases import Config, combine_arrays, data, dispatch_arrays, static_configs

from moe_jax import aclnn

NORM = "moe_distribute_combine_add_rms_norm_v2"


@functools.lru_cache(maxsize=4)
def program(config):
    """Arrays over all ranks [W, P, ...] by name -> (dispatch's outputs, combine's)."""

    def shard(drawn):
        sent = aclnn.moe_distribute_dispatch_v4(
            drawn["x"], drawn["expert_ids"], **dispatch_arrays(config, drawn), **config.dispatch, **groups(config)
        )
        arrays = {
            "assist_info_for_combine": sent.assist_info_for_combine,
            "ep_send_counts": sent.ep_recv_counts,
            "tp_send_counts": sent.tp_recv_counts,
            "expand_scales": sent.expand_scales,
            **combine_arrays(drawn),
        }
        common = config.common | {"comm_quant_mode": config.comm_quant_mode, "global_bs": config.global_bs}
        operands = (drawn["expand_x"], drawn["expert_ids"])
        weights = {"expert_scales": drawn["expert_scales"]}
        if config.norm:
            norm = {"residual_x": drawn["residual_x"], "gamma": drawn["gamma"]}
            out = aclnn.moe_distribute_combine_add_rms_norm_v2(
                *operands, **weights, **norm, **arrays, **common, **groups(config)
            )
        else:
            out = aclnn.moe_distribute_combine_v4(*operands, **weights, **arrays, **common, **groups(config))
        return sent, out

    return over_world(config, shard)


def compare(config, rng):
    drawn = data(rng, config)
    sent, out = jax.tree.map(np.asarray, program(config)(over_ranks(config, drawn)))
    expected = oracle.moe_distribute_dispatch(
        drawn["x"], drawn["expert_ids"], **dispatch_arrays(config, drawn), **config.dispatch
    )
    for name in aclnn.DispatchOutput._fields:
        got, want = getattr(sent, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if got is not None:
            got = got.reshape(want.shape)
            if got.dtype.itemsize == 1:
                got, want = got.view(np.uint8), want.view(np.uint8)
            np.testing.assert_array_equal(got, want, err_msg=f"{name} of {config}")
    operands = (drawn["expand_x"], drawn["expert_ids"], expected, drawn["expert_scales"])
    if config.norm:
        want = oracle.moe_distribute_combine_add_rms_norm(
            *operands, drawn["residual_x"], drawn["gamma"], **combine_arrays(drawn), **config.combine
        )
        close(out.x_out, want.x, want.unrounded, config, drawn)
        np.testing.assert_allclose(out.rstd_out.reshape(want.rstd.shape), want.rstd, rtol=1e-5)
        y, w = (np.asarray(a, np.float64) for a in (out.y_out.reshape(want.y.shape), want.y))
        np.testing.assert_allclose(y, w, rtol=2**-7, atol=2**-7 * np.abs(w).max(initial=0))
    else:
        want = oracle.moe_distribute_combine(*operands, **combine_arrays(drawn), **config.combine)
        close(out.x_out, want.x_out, want.unrounded, config, drawn)


def close(got, rounded, unrounded, config, drawn):
    """Within the rounding to the output dtype of a sum that may be off by a few fp32 roundings of its largest term."""
    got = got.reshape(rounded.shape)
    roundoff = float(jnp.finfo(config.dtype).eps) / 2
    terms = [drawn["expand_x"], drawn["shared_expert_x"], drawn["ori_x"], drawn["const_expert_v"], drawn["residual_x"]]
    largest = max(np.abs(np.asarray(a, np.float64)).max(initial=0) for a in terms if a is not None)
    slack = 2e-6 * largest * (1 + np.abs(drawn["expert_scales"]).max(initial=0)) * (config.top_k + 2)
    slack = slack * (1 + max(config.tp, 1)) + (2.0**-24 if config.dtype == "float16" else 0)
    if config.nodes > 1 or config.tp > 1:  # a partial sum is rounded on its way, and a tie may fall either way
        slack += 2 * roundoff * largest * (1 + np.abs(drawn["expert_scales"]).max(initial=0)) * config.top_k
    error = np.abs(np.asarray(got, np.float64) - unrounded.reshape(got.shape))
    finite = np.isfinite(np.asarray(rounded, np.float64))
    limit = roundoff * np.abs(unrounded.reshape(got.shape)) * 1.01 + slack
    assert (error[finite] <= limit[finite]).all(), f"{error[finite].max()} for {config}"


# One configuration for each feature, then generated ones.
CHOSEN = [
    Config(world=8, shared_ranks=4, num_shared=2, local_experts=2, top_k=3, mask="pairs", expand_scales=True),
    Config(world=4, shared_ranks=1, quant_mode=2, y_dtype="int8", smooth="experts", hidden=40, mask="tokens"),
    Config(world=4, tp=2, local_experts=1, top_k=2, expand_scales=True, token_nums_type=0, norm=True),
    Config(world=8, elastic=True, shared_ranks=2, num_shared=1, local_experts=2, top_k=2, num_zero=1, num_copy=1),
    Config(world=4, local_experts=2, nodes=2, top_k=3, expand_scales=True, hidden=16),
    Config(world=2, local_experts=3, num_zero=1, num_copy=1, num_const=2, alpha_ndim=2, top_k=4, global_bs=12),
    Config(world=4, local_experts=1, quant_mode=4, y_dtype="float4_e2m1fn", comm_quant_mode=4, hidden=136),
    Config(world=1, local_experts=3, tokens=0, global_bs=2, quant_mode=3, y_dtype="float8_e5m2", hidden=136),
]


@pytest.mark.quick("6", "7")
@pytest.mark.parametrize("index", range(len(CHOSEN)))
def test_chosen(index):
    rng = np.random.default_rng(index)
    for _ in range(12):
        compare(CHOSEN[index], rng)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_generated(seed):
    for config in static_configs(np.random.default_rng(seed), 2):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            compare(config, rng)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 166))
def test_generated_many(seed):
    """66 configurations x 40 draws = 2640 cases."""
    (config,) = static_configs(np.random.default_rng(seed), 1)
    rng = np.random.default_rng(seed)
    for _ in range(40):
        compare(config, rng)
