"""Every derivative of the facade against differences of the oracle.

Data are small whole numbers and weights are powers of two. Where an operator is linear in an array, a central
difference of the oracle over a step of 1 is its derivative exactly, and so is the facade's, rounded once. Rows that
nobody may read hold NaN, in inputs and in cotangents.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from aclnn_cases import FLOATS, SPECIAL, draw, groups, over_ranks, over_world
from family_cases import DTYPES, QUANT, Config, combine_arrays, dispatch_arrays
from fused_cases import hashable, lists
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat, aclnn, reference
from moe_jax.recovery.window import make_window

H = 4
FED_THROUGH = ("assist_info_for_combine", "ep_recv_counts", "tp_recv_counts", "expand_scales")
ABSENT = ("x_active_mask", "elastic_info", "tp_recv_counts", *FLOATS)  # None where a case has none
NORM_EPS = 2.0  # keeps the norm of a row of zeros smooth


def differences(function, arrays, name, step=1.0):
    """The derivative of the scalar ``function(arrays)`` by every entry of one array, exact for polynomials to x^4."""
    wide = np.asarray(arrays[name], np.float64)
    slope = np.zeros(wide.shape)
    for index in np.ndindex(*wide.shape):
        for distance, factor in ((1, 8), (2, -1)):
            for sign in (1, -1):
                moved = wide.copy()
                moved[index] += sign * distance * step
                slope[index] += sign * factor * function(arrays | {name: moved.astype(np.float32)}) / (12 * step)
    return slope


def same(got, want, dtype, text):
    """Equal to the exact derivative, rounded once to the dtype of the array."""
    want = want.astype(DTYPES.get(str(dtype), np.float32))
    np.testing.assert_array_equal(np.asarray(got, np.float64).reshape(want.shape), want.astype(np.float64), text)


# --- dispatch ---------------------------------------------------------------------------------------------------------

DISPATCHES = [
    Config(world=4, shared_ranks=2, num_shared=2, local_experts=2, top_k=2, tokens=3, hidden=H, mask="pairs",
           expand_scales=True, num_copy=1),
    Config(world=2, tp=2, local_experts=1, top_k=2, tokens=3, hidden=H, mask="tokens", expand_scales=True,
           dtype="float16"),
    Config(world=4, elastic=True, shared_ranks=1, local_experts=2, top_k=2, tokens=3, hidden=H, expand_scales=True),
    Config(world=4, nodes=2, local_experts=2, top_k=2, tokens=3, hidden=H, expand_scales=True),
]  # fmt: skip


def poison_past(cts, expected, config):
    """``cts`` with NaN where no row was written: [W, P, rows, ...] of expand_x, and of expand_scales."""
    lead = (config.world, max(config.tp, 1))
    num_rows = expected.num_rows.reshape(lead)
    own = expected.ep_recv_counts.reshape(*lead, lead[1], -1)[:, :, 0].max(axis=-1)
    for index in np.ndindex(lead):
        cts[0][(*index, slice(num_rows[index], None))] = np.nan
        cts[1][(*index, slice(own[index], None))] = np.nan
    return cts


@pytest.mark.quick("config0", "config3")
@pytest.mark.parametrize("config", DISPATCHES)
def test_dispatch(config):
    def shard(given, cts):
        def run(x, weights):
            given_now = given | {"expert_scales": weights}
            sent = aclnn.moe_distribute_dispatch_v4(
                x, given["expert_ids"], **dispatch_arrays(config, given_now), **config.dispatch, **groups(config)
            )
            return sent.expand_x, sent.expand_scales

        return jax.vjp(run, given["x"], given["expert_scales"])[1](cts)

    program, seen = over_world(config, shard), np.zeros(2, bool)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        drawn = draw(rng, config)

        def run(arrays):
            return oracle.moe_distribute_dispatch(
                arrays["x"], arrays["expert_ids"], **dispatch_arrays(config, arrays), **config.dispatch
            )

        expected = run(drawn)
        cts = [rng.integers(-2, 3, a.shape).astype(np.float32) for a in (expected.expand_x, expected.expand_scales)]

        def loss(arrays):
            sent = run(arrays | {"x": arrays["x"].astype(drawn["x"].dtype)})
            return sum(np.sum(ct * np.asarray(a, np.float64))
                       for ct, a in zip(cts, (sent.expand_x, sent.expand_scales), strict=True))  # fmt: skip

        wants = [differences(loss, drawn, name) for name in ("x", "expert_scales")]
        lead = (config.world, max(config.tp, 1))
        poisoned = poison_past([ct.reshape(*lead, *ct.shape[len(config.lead) :]) for ct in cts], expected, config)
        d_x, d_weights = program(over_ranks(config, drawn), (poisoned[0].astype(drawn["x"].dtype), poisoned[1]))
        seen |= [np.any(want) for want in wants]
        same(d_x, wants[0], config.dtype, f"x, {seed}")
        same(d_weights, wants[1], "float32", f"expert_scales, {seed}")
    assert seen.all()


CODES = [(2, "int8"), (2, "float8_e4m3fn"), (3, "float8_e5m2"), (4, "float8_e4m3fn"), (5, "float8_e5m2")]


@pytest.mark.quick("3-float8_e5m2")
@pytest.mark.parametrize(("mode", "y_dtype"), CODES)
def test_a_derivative_through_codes_is_refused(mode, y_dtype):
    """That of the weights, which are no codes, is right all the same."""
    config = Config(world=2, local_experts=1, top_k=2, tokens=2, hidden=H, quant_mode=mode, y_dtype=y_dtype)

    def by_hand(use_codes, given):
        def loss(x, weights):
            sent = aclnn.moe_distribute_dispatch_v4(
                x, given["expert_ids"], expert_scales=weights, **config.dispatch, **groups(config)
            )
            rows = jnp.sum(sent.expand_x.astype(jnp.float32)) * jnp.sum(sent.dynamic_scales.astype(jnp.float32))
            return jnp.sum(sent.expand_scales * jnp.arange(1.0, 5.0)) + (rows if use_codes else 0.0)

        return jax.grad(loss, argnums=(0, 1))(given["x"], given["expert_scales"])

    ids = np.broadcast_to(np.arange(2, dtype=np.int32), (2, 1, 2, 2))
    x = np.ones((2, 1, 2, H), DTYPES["bfloat16"])
    given = {"x": x, "expert_ids": ids, "expert_scales": np.ones(ids.shape, np.float32)}
    with pytest.raises(moe.errors.UnsupportedError, match="moe_jax.aclnn.dequantize"):
        over_world(config, functools.partial(by_hand, True))(given)
    _, d_weights = over_world(config, functools.partial(by_hand, False))(given)
    # Rank e holds expert e: its row 2 r + t is token t of rank r.
    want = [[[[2 * r + t + 1] * 2 for t in range(2)]] for r in range(2)]
    np.testing.assert_array_equal(d_weights, want)


DEQUANTIZED = [
    Config(world=4, shared_ranks=2, num_shared=2, local_experts=2, top_k=2, tokens=3, hidden=H, mask="pairs",
           expand_scales=True, num_copy=1, quant_mode=2, y_dtype="int8"),
    Config(world=2, tp=2, local_experts=1, top_k=2, tokens=3, hidden=H, mask="tokens", quant_mode=4,
           y_dtype="float4_e2m1fn", dtype="float16"),
    Config(world=4, elastic=True, shared_ranks=1, local_experts=2, top_k=2, tokens=3, hidden=H, quant_mode=3,
           y_dtype="float8_e4m3fn"),
    *(pytest.param(Config(world=2, local_experts=2, top_k=2, tokens=3, hidden=H, quant_mode=mode, y_dtype=y_dtype),
                   marks=pytest.mark.slow)
      for mode, y_dtype in QUANT if mode > 1),
]  # fmt: skip


def dequantized(config, given, x, scales=None):
    """Rows of a dispatch [P * A, H], with its arrays and attributes; and the dispatch."""
    now = dict.fromkeys(ABSENT) | given | {"scales": scales}
    sent = aclnn.moe_distribute_dispatch_v4(
        x, given["expert_ids"], **dispatch_arrays(config, now), **config.dispatch, **groups(config)
    )
    attributes = {name: value for name, value in config.dispatch.items() if name != "expert_token_nums_type"}
    arrays = {name: now[name] for name in ("scales", "x_active_mask", "elastic_info")}
    return aclnn.dequantize(sent, x, given["expert_ids"], **arrays, **attributes, **groups(config))


@pytest.mark.quick("config1")
@pytest.mark.parametrize("config", DEQUANTIZED)
def test_dequantize(config):
    """About the rows of the same dispatch without quantisation, and exactly their gradient."""
    plain = dataclasses.replace(config, quant_mode=0, y_dtype=None)
    rng = np.random.default_rng(3)  # which draws masks that leave some, and removes ranks
    drawn = draw(rng, config)

    def shard(given, ct):
        rows, pull = jax.vjp(functools.partial(dequantized, config, given), given["x"])
        return rows, pull(ct)[0]

    def run(arrays):
        return oracle.moe_distribute_dispatch(
            arrays["x"], arrays["expert_ids"], **dispatch_arrays(plain, arrays), **plain.dispatch
        )

    def loss(arrays):
        rows = run(arrays | {"x": arrays["x"].astype(drawn["x"].dtype)}).expand_x
        return np.sum(ct * np.asarray(rows, np.float64))

    expected = run(drawn)
    ct = rng.integers(-2, 3, expected.expand_x.shape).astype(np.float32)
    want, lead = differences(loss, drawn, "x"), (config.world, max(config.tp, 1))
    poisoned, num_rows = ct.reshape(*lead, *ct.shape[len(config.lead) :]).copy(), expected.num_rows.reshape(lead)
    for index in np.ndindex(lead):
        poisoned[(*index, slice(num_rows[index], None))] = np.nan
    rows, d_x = over_world(config, shard)(over_ranks(config, drawn), poisoned.astype(drawn["x"].dtype))
    error = np.abs(np.asarray(rows, np.float64) - np.asarray(expected.expand_x, np.float64).reshape(rows.shape))
    assert error.max() <= 0.02, "whole numbers of at most 2 lose that much in int8, and nothing in narrow floats"
    assert np.any(want)
    same(d_x, want, config.dtype, "x")


@pytest.mark.quick("shape0", "shape2")
@pytest.mark.parametrize("shape", [(1,), (H,), (2, H)])
def test_dequantize_smoothed_rows(shape):
    """quant_mode=1: rows are ``x * scales``; scales are one number, one for each column, or those of the expert."""
    config = Config(world=2, local_experts=1, top_k=2, tokens=2, hidden=H, quant_mode=1)
    ids = np.array([[[[0, 1], [1, 0]]], [[[0, 1], [1, 0]]]], np.int32)
    x = (np.arange(2 * 2 * H) % 5 - 2).reshape(2, 1, 2, H).astype(DTYPES["bfloat16"])
    scales = np.broadcast_to(np.arange(1, 1 + np.prod(shape)).reshape(shape), (2, 1, *shape)).astype(np.float32)
    factor = np.array([1.0, 2.0, -1.0, 3.0], np.float32)

    def shard(x, ids, scales):
        def loss(x, scales):
            rows = dequantized(config, {"expert_ids": ids}, x, scales)
            return jnp.sum(rows.astype(jnp.float32) @ factor)

        return jax.value_and_grad(loss, argnums=(0, 1))(x, scales)

    value, (d_x, d_scales) = over_world(config, shard)(x, ids, scales)
    wide = np.asarray(x, np.float64)
    by_expert = [np.broadcast_to(scales[0, 0] if len(shape) < 2 else scales[0, 0, e], (H,)) for e in range(2)]
    assert np.sum(value) == sum(np.sum(wide @ (s * factor)) for s in by_expert)
    np.testing.assert_array_equal(np.asarray(d_x, np.float64), np.broadcast_to(sum(by_expert) * factor, wide.shape))
    columns = np.sum(wide, axis=(0, 1, 2)) * factor  # of one expert: every token has a pair for each
    want = np.array([2 * columns.sum()]) if shape == (1,) else 2 * columns if shape == (H,) else np.stack([columns] * 2)
    np.testing.assert_array_equal(np.sum(d_scales, axis=(0, 1)), want)


def test_dequantize_refuses_what_is_not_quantised():
    config = Config(world=2, local_experts=1, top_k=1, tokens=2, hidden=H)
    given = {"x": np.ones((2, 1, 2, H), DTYPES["bfloat16"]), "expert_ids": np.zeros((2, 1, 2, 1), np.int32)}
    with pytest.raises(moe.errors.InvalidArgumentError, match="quant_mode=0 quantises nothing"):
        over_world(config, lambda given: dequantized(config, given, given["x"]))(given)
    with pytest.raises(moe.errors.InvalidArgumentError, match="sent is a tuple"):
        x, ids = given["x"][0, 0], given["expert_ids"][0, 0]
        aclnn.dequantize((), x, ids, quant_mode=2, **config.common, **groups(config))
    with pytest.raises(moe.errors.UnexpectedArgumentError, match="ep_rank_id was given.*index along the mesh axis"):
        aclnn.dequantize((), x, ids, quant_mode=2, ep_rank_id=0, **config.common, **groups(config))


def test_derivatives_of_rows_that_were_quantised_before():
    """Of fp8 rows with scales and weights, all sent to rank 0: row 2 r + t there is token t of rank r.

    Each array that goes in has one that comes out, so one loss asks for all three derivatives.
    """
    config = Config(world=2, local_experts=1, top_k=1, tokens=2, hidden=H)

    def shard(x, ids, scales, weights):
        def loss(x, scales, weights):
            sent = aclnn.moe_distribute_dispatch_v4(
                x, ids, scales, expert_scales=weights, **config.dispatch, **groups(config)
            )
            rows = jnp.sum(sent.expand_x.astype(jnp.float32)) + jnp.sum(sent.dynamic_scales)
            return rows + jnp.sum(sent.expand_scales * jnp.arange(1.0, 5.0))

        return jax.grad(loss, argnums=(0, 1, 2))(x, scales, weights)

    ids, one = np.zeros((2, 1, 2, 1), np.int32), np.ones((2, 1, 2, 1), np.float32)
    x = np.ones((2, 1, 2, H)).astype(jnp.float8_e4m3fn)
    d_x, d_scales, d_weights = over_world(config, shard)(x, ids, 2 * one, 3 * one)
    np.testing.assert_array_equal(np.asarray(d_x, np.float32), np.ones(x.shape))
    np.testing.assert_array_equal(d_scales, one)
    np.testing.assert_array_equal(np.ravel(d_weights), [1, 2, 3, 4])


# --- combine ----------------------------------------------------------------------------------------------------------

COMBINES = {
    "specials": Config(world=2, local_experts=2, top_k=4, tokens=3, hidden=H, num_zero=1, num_copy=1, num_const=2,
                       shared_x="3d", mask="pairs"),
    "shared ranks": Config(world=4, shared_ranks=2, num_shared=2, local_experts=1, top_k=2, tokens=2, hidden=H,
                           mask="tokens", dtype="float16"),
    "tp": Config(world=2, tp=2, local_experts=1, top_k=2, tokens=2, hidden=H, shared_x="2d"),
    "nodes": Config(world=4, nodes=2, local_experts=1, top_k=2, tokens=2, hidden=H, expand_scales=True),
    "nodes shared": Config(world=4, nodes=2, shared_ranks=2, local_experts=1, top_k=2, tokens=2, hidden=H,
                           num_copy=1, mask="pairs", expand_scales=True),
    "nodes tp": Config(world=2, tp=2, nodes=2, local_experts=1, top_k=2, tokens=2, hidden=H, expand_scales=True),
    "elastic": Config(world=4, elastic=True, shared_ranks=1, local_experts=1, top_k=2, tokens=2, hidden=H, num_copy=1),
    "gate": Config(world=2, local_experts=1, top_k=3, tokens=2, hidden=H, num_copy=1, num_const=2, alpha_ndim=2,
                   dtype="float16"),
    "norm": Config(world=2, local_experts=2, top_k=3, tokens=4, hidden=H, num_copy=1, num_const=1, shared_x="2d",
                   mask="tokens", norm=True),
    "norm tp": Config(world=2, tp=2, local_experts=1, top_k=2, tokens=2, hidden=H, norm=True),
}  # fmt: skip


@functools.cache
def combine_program(config):
    """(arrays [W, P, ...] by name, cotangents) -> outputs, and the cotangents of the float arrays by name."""

    def shard(given, cts):
        floats = {name: given[name] for name in FLOATS if given.get(name) is not None}

        def run(floats):
            now = dict.fromkeys(ABSENT) | given | floats
            arrays = {
                "assist_info_for_combine": given["assist_info_for_combine"],
                "ep_send_counts": given["ep_recv_counts"],
                "tp_send_counts": now["tp_recv_counts"],
                "expand_scales": now["expand_scales"],
                **combine_arrays(now),
            }
            common = config.common | {"comm_quant_mode": config.comm_quant_mode, "global_bs": config.global_bs}
            operands = (now["expand_x"], now["expert_ids"])
            options = {"expert_scales": now["expert_scales"], **arrays, **common, **groups(config)}
            if config.norm:
                norm = {"residual_x": now["residual_x"], "gamma": now["gamma"], "norm_eps": NORM_EPS}
                return aclnn.moe_distribute_combine_add_rms_norm_v2(*operands, **norm, **options)
            return aclnn.moe_distribute_combine_v4(*operands, **options)

        out, pull = jax.vjp(run, floats)
        return out, pull(type(out)(*cts))[0]

    return over_world(config, shard)


class Case:
    """One draw for combine: its arrays with the ranks in front, and the oracle as a function of them."""

    def __init__(self, config, rng):
        self.config, self.drawn = config, draw(rng, config)
        drawn = self.drawn
        self.sent = oracle.moe_distribute_dispatch(
            drawn["x"], drawn["expert_ids"], **dispatch_arrays(config, drawn), **config.dispatch
        )
        self.arrays = drawn | {name: getattr(self.sent, name) for name in FED_THROUGH}

    def given(self):
        """What ``combine_program`` takes: rows that are not there hold NaN."""
        rows = np.array(self.drawn["expand_x"], np.float32)
        for index in np.ndindex(self.config.lead):
            rows[(*index, slice(int(self.sent.num_rows[index]), None))] = np.nan
        arrays = self.arrays | {"expand_x": rows.astype(self.drawn["expand_x"].dtype), "x": None, "scales": None}
        return {name: a for name, a in over_ranks(self.config, arrays).items() if a is not None}

    def __call__(self, arrays):
        """The oracle's fp32 sums, for arrays that may have moved."""
        sent = dataclasses.replace(self.sent, expand_scales=arrays["expand_scales"])
        rows = arrays["expand_x"].astype(self.drawn["expand_x"].dtype)
        operands = (rows, arrays["expert_ids"], sent, arrays["expert_scales"])
        options = {**combine_arrays(arrays), **self.config.combine}
        if self.config.norm:
            norm = (arrays["residual_x"], np.asarray(arrays["gamma"]))
            return oracle.moe_distribute_combine_add_rms_norm(*operands, *norm, **options).unrounded
        return oracle.moe_distribute_combine(*operands, **options).unrounded

    def floats(self):
        """The names of the arrays that combine may be differentiated in."""
        return [name for name in FLOATS if self.arrays.get(name) is not None]

    def read(self, name, gradient):
        """A cotangent from the facade as the oracle lays it out, without rows of ``expand_x`` that are not there."""
        gradient = np.array(gradient, np.float64).reshape(self.arrays[name].shape)
        for index in np.ndindex(self.config.lead) if name == "expand_x" else ():
            gradient[(*index, slice(int(self.sent.num_rows[index]), None))] = 0
        return gradient

    def split(self, array):
        """[W, P, ...]."""
        lead = (self.config.world, max(self.config.tp, 1))
        return array.reshape(*lead, *array.shape[len(self.config.lead) :])


LINEAR = [name for name in COMBINES if name not in ("gate", "norm", "norm tp")]


@pytest.mark.quick("shared ranks", "tp")
@pytest.mark.parametrize("name", LINEAR)
def test_combine(name):
    config, seen = COMBINES[name], set()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        case = Case(config, rng)
        sums = case(case.arrays)
        ct = rng.integers(-2, 3, sums.shape).astype(np.float32)
        out, gradients = combine_program(config)(case.given(), (case.split(ct.astype(DTYPES[config.dtype])),))
        same(out.x_out, sums, config.dtype, "x_out")
        assert sorted(gradients) == sorted(case.floats())
        for array in case.floats():
            want = differences(lambda moved: np.sum(ct * case(moved)), case.arrays, array)
            same(case.read(array, gradients[array]), want, case.arrays[array].dtype, f"{array} of {name}, {seed}")
            seen |= {array} if np.any(want) else set()
    unread = {"expand_scales"} & set(gradients)
    if config.nodes > 1:  # rows have the weights that came with them; special experts those of the tokens
        unread = set() if config.num_special else {"expert_scales"}
    assert seen == set(gradients) - unread


def test_rows_that_are_not_there_have_no_influence():
    """The result does not depend on rows past the true number: their cotangent is zero, whatever made them."""
    config = COMBINES["shared ranks"]
    case = Case(config, np.random.default_rng(0))
    ct = np.ones(case(case.arrays).shape, DTYPES[config.dtype])
    _, gradients = combine_program(config)(case.given(), (case.split(ct),))
    gradient = np.asarray(gradients["expand_x"], np.float64)
    assert case.sent.num_rows.max() < gradient.shape[2]
    for w, num_rows in enumerate(case.sent.num_rows):
        assert not np.any(gradient[w, 0, num_rows:]), gradient[w, 0, num_rows:]


def test_combine_with_a_gate():
    """Constant experts with alphas [Cc, H] weigh by a softmax: differences over a small step, and one rounding."""
    config = COMBINES["gate"]
    rng = np.random.default_rng(0)
    case = Case(config, rng)
    for name in SPECIAL[:2]:
        case.arrays[name] = (case.arrays[name].astype(np.float32) / 4).astype(np.float16)
    case.arrays["expert_ids"][:] = [[2, 3, 4], [4, 3, 0]]  # copy, both constant experts; both of them and a routed one
    case.sent = oracle.moe_distribute_dispatch(case.arrays["x"], case.arrays["expert_ids"], **config.dispatch)
    case.arrays |= {name: getattr(case.sent, name) for name in FED_THROUGH}
    ct = rng.integers(-2, 3, case(case.arrays).shape).astype(np.float32)
    _, gradients = combine_program(config)(case.given(), (case.split(ct.astype(np.float16)),))
    for name in ("ori_x", *SPECIAL):
        want = differences(lambda moved: np.sum(ct * case(moved)), case.arrays, name, step=2.0**-5)
        assert (np.abs(want) > 0.1).any(), name
        got = np.asarray(gradients[name], np.float64).reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=2**-11, atol=2e-4, err_msg=name)


@pytest.mark.quick("norm tp")
@pytest.mark.parametrize("name", ["norm", "norm tp"])
def test_add_rms_norm(name):
    """The oracle's own derivative of the norm, and differences for what lies before it.

    The cotangent of a row is rounded to bf16 on its way to the experts, weights and gamma are exact.
    """
    config, seen, bf16 = COMBINES[name], set(), DTYPES["bfloat16"]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        case = Case(config, rng)
        total = case(case.arrays)  # [.., B, 1, H], zero for masked tokens
        shapes = total.shape, (*total.shape[:-1], 1), total.shape
        cts = [rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes]
        ct_total, d_gamma = norm_adjoint(case, total, cts)
        given_cts = (cts[0].astype(bf16), cts[1], cts[2].astype(bf16))
        _, gradients = combine_program(config)(case.given(), tuple(case.split(ct) for ct in given_cts))
        assert sorted(gradients) == sorted(case.floats())
        for array in case.floats():
            want = d_gamma
            if array != "gamma":
                want = differences(lambda moved: np.sum(ct_total * case(moved)), case.arrays, array)
            seen |= {array} if np.any(want) else set()
            # Sums over h or tokens are of terms that are each off by a rounding of 2^-9.
            summed = 1.0 if array in ("expand_x", "residual_x", "shared_expert_x") else np.abs(want).max() + 16
            got = case.read(array, gradients[array])
            np.testing.assert_allclose(got, want, rtol=2**-8, atol=2**-8 * summed, err_msg=array)
    assert seen == set(gradients) - {"expand_scales"}


def norm_adjoint(case, total, cts):
    """The cotangents of the sums and of gamma, rank by rank."""
    ct_total, d_gamma = np.zeros(total.shape), np.zeros(case.arrays["gamma"].shape)
    for rank in np.ndindex(case.config.lead):
        ct_y, ct_rstd, ct_x = (ct[rank][:, 0].astype(np.float64) for ct in cts)
        sums, gamma = total[rank][:, 0], case.arrays["gamma"][rank].astype(np.float64)
        ct_total[rank][:, 0], d_gamma[rank] = reference.add_rms_norm_vjp(
            ct_y, ct_rstd[:, 0], ct_x, sums, np.zeros_like(ct_x), gamma, eps=NORM_EPS
        )
    return ct_total, d_gamma


@pytest.mark.quick("3")
@pytest.mark.parametrize("mode", [2, 3, 4])
def test_combine_over_a_quantised_wire_rounds_as_identity(mode):
    config = Config(world=2, local_experts=1, top_k=2, tokens=2, hidden=8, comm_quant_mode=mode)
    rng = np.random.default_rng(0)
    case = Case(config, rng)
    plain = dataclasses.replace(config, comm_quant_mode=0)
    ct = rng.integers(-2, 3, case(case.arrays).shape).astype(np.float32)
    _, gradients = combine_program(config)(case.given(), (case.split(ct.astype(DTYPES["bfloat16"])),))
    case.config = plain
    want = differences(lambda moved: np.sum(ct * case(moved)), case.arrays, "expand_x")
    assert np.any(want)
    same(gradients["expand_x"], want, "bfloat16", "expand_x")
    case.config = config  # the weights meet the rows as they arrived
    want = differences(lambda moved: np.sum(ct * case(moved)), case.arrays, "expert_scales")
    np.testing.assert_allclose(np.asarray(gradients["expert_scales"]).reshape(want.shape), want, rtol=1e-5, atol=1e-5)


def test_a_plain_sum_has_no_weights_to_differentiate():
    config = Config(world=2, local_experts=1, top_k=2, tokens=2, hidden=H)
    case = Case(config, np.random.default_rng(0))
    case.arrays["expert_scales"] = np.zeros((2, 0, 2), np.float32)
    ct = np.arange(16, dtype=np.float32).reshape(2, 2, H)
    _, gradients = combine_program(config)(case.given(), (case.split(ct.astype(DTYPES["bfloat16"])),))
    want = differences(lambda moved: np.sum(ct * case(moved)), case.arrays, "expand_x")
    same(gradients["expand_x"], want, "bfloat16", "expand_x")
    assert gradients["expert_scales"].shape == (2, 1, 0, 2)


# --- the grouped pair -------------------------------------------------------------------------------------------------

RANKS, LOCAL, WIDTH, OUT, DENSE = 4, 2, 3, 2, 2
PAIR = {
    "grouped_mat_mul_allto_allv": reference.grouped_matmul_all_to_allv,
    "allto_allv_grouped_mat_mul": reference.all_to_allv_grouped_matmul,
}


@pytest.mark.quick("allto_allv_grouped_mat_mul-False")
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", PAIR)
def test_grouped_pair(name, transpose):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 3, (RANKS, RANKS, LOCAL))
    send, recv = lists(sizes)
    weight = (OUT, WIDTH) if transpose else (WIDTH, OUT)
    shapes = {
        "gmm_x": (RANKS, send.sum(axis=1).max(), WIDTH),
        "gmm_weight": (RANKS, LOCAL, *weight),
        "mm_x": (RANKS, DENSE, WIDTH),
        "mm_weight": (RANKS, *weight),
    }
    arrays = {key: rng.integers(-2, 3, shape).astype(np.float32) for key, shape in shapes.items()}
    flags = {"trans_gmm_weight": transpose, "trans_mm_weight": transpose}
    if name == "allto_allv_grouped_mat_mul":
        flags["permute_out_flag"] = True
    tables = {"send_counts": hashable(send), "recv_counts": hashable(recv)}
    capacity = recv.sum(axis=1).max()
    cts = [rng.integers(-2, 3, (RANKS, n, w)).astype(np.float32) for n, w in ((capacity, OUT), (DENSE, OUT))]
    cts += [rng.integers(-2, 3, (RANKS, capacity, WIDTH)).astype(np.float32)] * (len(flags) == 3)

    def shard(given, cts):
        def run(given):
            out = getattr(aclnn, name)(**given, group="ep", ep_world_size=RANKS, **tables, **flags)
            return tuple(part for part in out if part is not None)

        return jax.vjp(run, given)[1](cts)[0]

    def local(*args):
        return jax.tree.map(lambda a: a[None], shard(*jax.tree.map(lambda a: a[0], args)))

    def loss(arrays):
        out = PAIR[name](
            **arrays, send_counts=send, recv_counts=recv, transpose_gmm_weight=transpose, transpose_mm_weight=transpose
        )
        return sum(np.sum(ct[: len(part)] * part) for cts_, parts in zip(cts, out, strict=True)
                   for ct, part in zip(cts_, parts, strict=True))  # fmt: skip

    program = jax.jit(_compat.shard_map(local, mesh=moe.make_mesh(ep=RANKS), in_specs=P("ep"), out_specs=P("ep")))
    given, poisoned = dict(arrays), [np.array(ct) for ct in cts]
    given["gmm_x"] = np.array(arrays["gmm_x"])
    for rank in range(RANKS):
        given["gmm_x"][rank, send[rank].sum() :] = np.nan
        for ct in (poisoned[0], *poisoned[2:]):
            ct[rank, recv[rank].sum() :] = np.nan
    got = program(*jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (given, tuple(poisoned))))
    for key in arrays:
        want = differences(loss, arrays, key)
        assert np.any(want), key
        same(got[key], want, "bfloat16", key)


# --- barrier and reset ------------------------------------------------------------------------------------------------


def test_barriers_pass_cotangents():
    table = moe.make_rank_table(4, np.array([True, True, False, True]), num_experts=4)

    def shard(x, ct):
        def run(x):
            x = aclnn.distribute_barrier(x, group="ep", world_size=4)
            limit = np.array([600_000_000], np.int32)
            return aclnn.distribute_barrier_v2(x, limit, jnp.asarray(table), group="ep", world_size=4)

        return jax.vjp(run, x)[1](ct)[0]

    x, ct = np.ones((4, 3), np.float32), np.arange(12, dtype=np.float32).reshape(4, 3)
    run = _compat.shard_map(shard, mesh=moe.make_mesh(ep=4), in_specs=P("ep"), out_specs=P("ep"))
    np.testing.assert_array_equal(jax.jit(run)(x, ct), ct)


def test_what_a_reset_clears_has_no_cotangent():
    def shard(rows, ct):
        def run(rows):
            window = dataclasses.replace(make_window(2, 3, jnp.float32, 4), data=rows)
            mask = jnp.array([1, 0, 1, 1], jnp.int32)
            return aclnn.moe_distribute_buffer_reset(mask, window, group_ep="ep", ep_world_size=4).data

        return jax.vjp(run, rows)[1](ct)[0]

    ct = np.arange(1, 25, dtype=np.float32).reshape(8, 3)
    run = _compat.shard_map(shard, mesh=moe.make_mesh(ep=4), in_specs=P("ep"), out_specs=P("ep"))
    want = ct * (np.arange(8) // 2 == 1)[:, None]
    np.testing.assert_array_equal(jax.jit(run)(np.ones((8, 3), np.float32), ct), want)
