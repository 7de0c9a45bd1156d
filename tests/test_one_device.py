"""The layer of a device that holds all experts: exact values and gradients, and a program without any exchange.

Gates are multiples of 128, for which the sigmoid is 0, 1/2 or 1 in fp32, so that SwiGLU maps whole numbers to halves of
whole numbers, and so does its derivative: sums are exact, and comparisons are for equality.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivative_laws import holds
from helpers import PATTERNS, expert_ids, mesh_of, over_mesh
from layer_cases import compare, make, make_params, steered_tokens, value_and_grads

import moe_jax as moe
from moe_jax import errors, reference
from moe_jax.hlo.contract import contract_of
from moe_jax.layer.grouping import feed_forward
from moe_jax.layer.rounds import routed_sum
from moe_jax.layer.weightless import Constants
from moe_jax.tools.bench.programs import with_backward

T, H, F, K, E = 8, 8, 4, 2, 6
TOLERANCE = 1e-5  # of the largest entry, where recipes leave numbers that are not whole


def make_plan(**options):
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32", "poison": True}
    return moe.make_plan(mesh_of(1, 1), **{**sizes, **options})


class Case(NamedTuple):
    """Whole numbers for a device."""

    ids: np.ndarray  # [T, K]
    experts: dict[str, np.ndarray]
    x: np.ndarray
    weights: np.ndarray
    ct: np.ndarray


def draw(pattern, rng):
    def whole(*shape, most=1):
        return rng.integers(-most, most + 1, shape).astype(np.float32)

    experts = {"w_gate": 128 * whole(E, H, F), "w_up": whole(E, H, F), "w_down": whole(E, F, H)}
    experts |= {"b_gate": 128 * whole(E, F), "b_up": whole(E, F), "b_down": whole(E, H)}
    ids = expert_ids(pattern, rng, (T, K), E, 1)
    ids[rng.random((T, K)) < 0.1] = E + 3  # no expert's; as one that is gone
    return Case(ids, experts, whole(T, H, most=2), whole(T, K, most=3), whole(T, H, most=2))


def program(plan, chunks):
    """The sum, what was dropped, the rounds, and the gradients."""

    def device(ids, experts, x, weights, ct):
        def added(experts, x, weights):
            kind, options = feed_forward("swiglu"), {"rank_table": None, "chunks": chunks}
            y, *counts = routed_sum(ids, experts, constants, x, weights, plan, kind, **options)
            return y, counts

        constants = Constants(None, None, None)
        y, pull, counts = jax.vjp(added, experts, x, weights, has_aux=True)
        return y, counts, pull(ct)

    run = jax.jit(over_mesh(mesh_of(1, 1), device))

    def on_device(*case):
        return jax.tree.map(lambda a: a[0, 0], run(*jax.tree.map(lambda a: a[None, None], case)))

    return on_device


def rounding(name):
    """[n, H] -> what a recipe leaves of it."""
    if name == "none":
        return lambda rows: rows
    return lambda rows: reference.quant.dequantize(name, *reference.quant.quantize(name, rows.astype(np.float32)))


def oracle(case, plan, chunks):
    """Pair by pair, in float64: (y, dropped, gradients of experts, x and weights)."""
    out, back, ct_wire = map(rounding, (plan.quant, plan.combine_quant, plan.backward_quant))
    _ids, experts, x, weights, ct = (jax.tree.map(lambda a: np.asarray(a, np.float64), part) for part in case)
    y, d_x, d_weights = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weights.shape)
    d_experts, num_dropped = jax.tree.map(np.zeros_like, experts), 0
    capacity = -(-plan.pair_capacity // chunks)
    for tokens in np.split(np.arange(T), chunks):
        pairs = sorted((case.ids[t, k], t, k) for t in tokens for k in range(K) if 0 <= case.ids[t, k] < E)
        kept = pairs[:capacity] if plan.overflow == "drop" else pairs
        num_dropped += len(pairs) - len(kept)
        for e, t, k in kept:
            one = {name: value[e] for name, value in experts.items()}
            row = out(x[t : t + 1])
            made = back(reference.expert_ffn(row, one, "swiglu"))[0]
            y[t] += weights[t, k] * made
            d_weights[t, k] = ct[t] @ made
            d_row, d_one = reference.expert_ffn_vjp(ct_wire(weights[t, k] * ct[t : t + 1]), row, one, "swiglu")
            d_x[t] += ct_wire(d_row)[0]
            for name in experts:
                d_experts[name][e] += d_one[name]
    return y, num_dropped, (d_experts, d_x, d_weights)


CODED = ({"quant": "int8"}, {"combine_quant": "fp8_e4m3", "backward_quant": "int8"})
FORMS = [
    ({}, 1),
    ({"overflow": "drop", "capacity_factor": 0.6}, 2),
    ({"transport": "allgather", "backend": "xla", "capacity_factor": 0.1, "poison": False}, 1),
    *((coded, 1) for coded in CODED),
]


@pytest.mark.quick("allgather", "coded results")
@pytest.mark.parametrize("options,chunks", FORMS, ids=["dropless", "drop", "allgather", "coded rows", "coded results"])
def test_equals_a_loop_over_pairs(options, chunks):
    plan, rng, dropped = make_plan(**options), np.random.default_rng(0), []
    run = program(plan, chunks)
    for pattern in PATTERNS:
        case = draw(pattern, rng)
        y, (num_dropped, num_rounds), grads = run(*case)
        want, want_dropped, want_grads = oracle(case, plan, chunks)
        assert (int(num_dropped), int(num_rounds)) == (want_dropped, 1), pattern
        dropped.append(want_dropped)
        for got, wanted in zip(jax.tree.leaves((y, grads)), jax.tree.leaves((want, want_grads)), strict=True):
            if options in CODED:
                assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max(), pattern
            else:  # in float64 a sigmoid far out is 1e-56
                np.testing.assert_array_equal(got, wanted.astype(np.float32), err_msg=pattern)
    assert any(dropped) == ("overflow" in options)


@pytest.mark.slow
def test_second_derivatives_read_no_row_that_is_not_there():
    """A polynomial of degree 3; some pairs have no row, and what stands for one is NaN."""
    plan, rng = make_plan(), np.random.default_rng(3)
    ids, experts, x, *drawn = draw("zipf", rng)
    params = dict(zip(("weights", "ct"), drawn, strict=True), w_down=experts.pop("w_down"))

    def device(ids, experts, x, weights, w_down):
        constants, options = Constants(None, None, None), {"rank_table": None}
        experts = experts | {"w_down": w_down}
        return routed_sum(ids, experts, constants, x, weights, plan, feed_forward("swiglu"), chunks=1, **options)[0]

    run = over_mesh(mesh_of(1, 1), device)
    fixed = jax.tree.map(lambda a: a[None, None], (ids, experts, x))

    def loss(params):
        return jnp.sum(run(*fixed, params["weights"][None, None], params["w_down"][None, None])[0, 0] * params["ct"])

    def formula(params):
        case = Case(ids, experts | {"w_down": params["w_down"]}, x, params["weights"], params["ct"])
        return np.sum(oracle(case, plan, 1)[0] * params["ct"])

    assert (ids >= E).any() and plan.poison
    holds(loss, formula, params, rng)


def test_one_round_whatever_the_capacity():
    """A plan of one device has room for all pairs, unless overflow is dropped."""
    plan = make_plan(capacity_factor=0.1)
    assert not plan.exchanges and plan.max_rounds == 1 and plan.pair_capacity == T * K
    assert make_plan(overflow="drop", capacity_factor=0.5).pair_capacity == T * K // 2
    assert moe.make_plan(mesh_of(1, 2), tokens_per_rank=T, hidden=H, num_experts=E, top_k=K).exchanges


def test_a_rank_table_of_one_rank_changes_nothing_and_is_checked():
    _, init, apply = make(1, 1)
    rng = np.random.default_rng(1)
    params, (x, mask) = make_params(init, rng), steered_tokens("zipf", rng, 8, 1)
    tables = (None, moe.make_rank_table(1, num_experts=8))
    plain, given = (jax.jit(apply)(params, x, mask, rank_table=table)[0] for table in tables)
    np.testing.assert_array_equal(plain, given)
    with pytest.raises(errors.ShapeError, match="rank_table"):
        apply(params, x, rank_table=moe.make_rank_table(2, num_experts=8))


def test_no_tokens():
    _, init, apply = make(1, 1, tokens_per_rank=0)
    x, ct = np.zeros((2, 0, 16), np.float32)
    (_, (y, stats)), (d_params, d_x) = value_and_grads(apply)(
        make_params(init, np.random.default_rng(0)), x, np.zeros(0, bool), ct
    )
    assert y.shape == d_x.shape == (0, 16) and int(stats.num_rounds) == 1 and int(stats.load.sum()) == 0
    assert not any(np.asarray(value).any() for value in d_params.values())


# --- the compiled program ---------------------------------------------------------------------------------------------

TOKENS, WIDTH = 64, 48


def compiled(gradient, num_replicas=1):
    mesh = moe.make_mesh(ep=1, tp=1, dp=num_replicas) if num_replicas > 1 else mesh_of(1, 1)
    plan = moe.make_plan(mesh, tokens_per_rank=TOKENS, hidden=WIDTH, num_experts=64, top_k=2, dtype="float32")
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=32)
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((TOKENS * mesh.size, WIDTH), "float32")
    run, given = (with_backward(apply), (params, x, x)) if gradient else (apply, (params, x))
    program = jax.jit(run).lower(*given).compile(compiler_options={"xla_backend_optimization_level": 0})
    return program.as_text(), contract_of(program)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_program_exchanges_nothing(gradient):
    """Rows are gathered there and, for each k, back, and their cotangents; loops are those of products; no scatter."""
    text, contract = compiled(gradient)
    assert contract.counts == {}
    assert contract.float_scatters == 0 and contract.int_scatters <= 1
    gathers = re.findall(rf" = f32\[([\d,]*),{WIDTH}\]\S* gather\(", text)
    gathers = sorted(math.prod(map(int, rows.split(","))) for rows in gathers)
    assert gathers == sorted([2 * TOKENS, TOKENS, TOKENS] * (2 if gradient else 1))
    loops = re.findall(r' while\(.*op_name="([^"]*)"', text)
    # Without its fusion emitters XLA:CPU makes a loop of the one scatter, of integers.
    assert any("/experts/" in loop for loop in loops)
    assert all("/experts/" in loop or loop.endswith("/layout/scatter") for loop in loops)
    assert max(int(n) for n in re.findall(r"f32\[(\d+),\d+,\d+\]\S* dot\(", text) or [0]) < 64


@pytest.mark.parametrize("transport", ["auto", "allgather"])
def test_dispatch_and_combine_exchange_nothing_either(transport):
    plan = make_plan(transport=transport)

    def there_and_back(x, ids, weights):
        sent = moe.dispatch(x, ids, plan)
        return moe.combine(sent.x, weights, sent.handle)

    arguments = [
        jax.ShapeDtypeStruct((1, 1, T, n), dtype) for n, dtype in ((H, "float32"), (K, "int32"), (K, "float32"))
    ]
    assert moe.hlo_contract(jax.jit(over_mesh(mesh_of(1, 1), there_and_back)), *arguments).counts == {}


@pytest.mark.slow
def test_replicas_exchange_only_sums():
    """Statistics forward; and backward the gradients of the parameters, which all replicas share."""
    for gradient in (False, True):
        _, contract = compiled(gradient, num_replicas=2)
        assert set(contract.counts) == {"all-reduce"} and {c.group_size for c in contract.collectives} == {2}
    _, init, apply = make(1, 1)
    mesh = moe.make_mesh(ep=1, tp=1, dp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=8, hidden=16, num_experts=8, top_k=2, dtype="float32", poison=True)
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=8, use_bias=True)
    rng = np.random.default_rng(2)
    for pattern in ("one_rank", "masked"):
        x, mask = steered_tokens(pattern, rng, 16, 1)
        compare(value_and_grads(apply), make_params(init, rng), x, mask, moe.RouterConfig(), rng)
