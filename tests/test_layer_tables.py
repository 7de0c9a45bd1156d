"""The layer with instances of experts, removed ranks, a quantised wire and nodes: against the float64 oracle.

The oracle knows logical experts alone; tables, wires and transports must not show in values or gradients.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOSTLY_PADDED, mesh_of
from layer_cases import BALANCE, EXPERTS, TOLERANCE, F, H, K, T, Z, assert_close, make_params, steered_tokens

import moe_jax as moe
from moe_jax import reference

EP, TP, INSTANCES = 4, 2, 16
LOCAL = INSTANCES // EP
EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def make(mesh, *, num_experts=INSTANCES, num_logical_experts=EXPERTS, dtype="float32", **options):
    size = mesh.devices.size
    plan = moe.make_plan(
        mesh, tokens_per_rank=T * EP * TP // size, hidden=H, num_experts=num_experts, top_k=K, dtype=dtype,
        num_shared_experts=1, poison=True, **options,
    )  # fmt: skip
    return moe.moe_on_mesh(
        mesh, plan, moe.RouterConfig(), ffn=F, use_bias=True, num_logical_experts=num_logical_experts
    )


def logical_params(rng):
    init, _ = make(mesh_of(EP, TP), num_experts=EXPERTS)
    return make_params(init, rng)


def on_instances(params, owner):
    """The parameters with a copy of the expert ``owner[i]`` at instance i."""
    return {name: value[owner] if name in EXPERT_WEIGHTS else value for name, value in params.items()}


def table_of(owner, num_ids=None):
    """[EXPERTS, F] the instances of every expert among the first ``num_ids``."""
    owner = owner[:num_ids]
    table = np.zeros((EXPERTS, 1 + len(owner)), np.int32)
    for e in range(EXPERTS):
        instances = np.flatnonzero(owner == e)
        table[e, 0], table[e, 1 : 1 + len(instances)] = len(instances), instances
    return table


def compare(run, params, owner, x, mask, rng, **tables):
    """Values and gradients of one case; those of an expert are summed over its instances."""
    ct = rng.normal(size=x.shape).astype(np.float32)
    (_, (y, stats)), (d_params, d_x) = run(on_instances(params, owner), x, mask, ct, tables)
    options = {"top_k": K, "token_mask": mask}
    expected, routing = reference.moe_layer(params, x, moe.RouterConfig(), **options)
    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct, moe.RouterConfig(), ct_balance=BALANCE, ct_z=Z, **options)
    assert_close("y", y, expected)
    assert_close("x", d_x, ct_x)
    for name, want in ct_params.items():
        got = np.asarray(d_params[name], np.float64)
        if name in EXPERT_WEIGHTS:
            summed = np.zeros(want.shape)
            np.add.at(summed, owner, got)
            got = summed
        assert_close(name, got, want)
    np.testing.assert_array_equal(stats.load, routing.load)
    assert stats.num_dropped == 0


def value_and_grads(apply):
    def loss(params, x, mask, ct, tables):
        y, stats = apply(params, x, mask, **tables)
        return jnp.sum(y * ct) + BALANCE * stats.losses["balance"] + Z * stats.losses["z"], (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
    "transport,balance", [("padded", "load"), pytest.param("allgather", "rank", marks=pytest.mark.slow)]
)
def test_tables_of_instances_change_nothing_and_never_retrace(transport, balance):
    rng = np.random.default_rng(0)
    _, apply = make(mesh_of(EP, TP), transport=transport)
    chex.clear_trace_counter()
    run = value_and_grads(chex.assert_max_traces(lambda *args, **kw: apply(*args, **kw, balance=balance), 1))
    params = logical_params(rng)
    width = None
    for pattern in ("random", "one_rank", "masked"):
        owner = np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, INSTANCES - EXPERTS)])
        owner = rng.permutation(owner)
        table = table_of(owner)
        assert width in (None, table.shape)
        width = table.shape
        x, mask = steered_tokens(pattern, rng, T * EP * TP, EP)
        shares = {"shares": rng.integers(0, 9, (EXPERTS, width[1] - 1)).astype(np.float32) / 8}
        compare(run, params, owner, x, mask, rng, table=table, **shares if balance == "load" else {})


@pytest.mark.slow
def test_choices_are_those_of_logical_experts_and_replay_under_any_table():
    """What was chosen under one table and split by load is the same sum under another one, split in another way."""
    rng = np.random.default_rng(5)
    _, apply = make(mesh_of(EP, TP))
    params = logical_params(rng)
    x, mask = steered_tokens("masked", rng, T * EP * TP, EP)
    run = jax.jit(apply, static_argnames=("balance", "return_routing"))
    given, results = {}, []
    for balance in ("load", "rank", "token"):
        owner = rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, INSTANCES - EXPERTS)]))
        y, stats = run(
            on_instances(params, owner), x, mask, table=table_of(owner), balance=balance, return_routing=True, **given
        )
        results.append((y, stats))
        given = {"routing": stats.routing}
    expected, routing = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K, token_mask=mask)
    for y, stats in results:
        assert_close("y", y, expected)
        np.testing.assert_array_equal(stats.load, routing.load)
        np.testing.assert_array_equal(stats.routing[0], np.where(mask[:, None], routing.expert_ids, -1))


def test_a_killed_rank_takes_no_expert_with_it():
    """Rank 1 is gone; every expert has an instance on another. Its own tokens get the shared expert alone."""
    rng = np.random.default_rng(1)
    _, apply = make(mesh_of(EP, TP))
    alive = np.array([True, False, True, True])
    rank_table = moe.make_rank_table(EP, alive, num_experts=INSTANCES)
    left = LOCAL * alive.sum()  # ids count the instances that are left
    owner_of_id = rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, left - EXPERTS)]))
    owner = np.zeros(INSTANCES, int)
    for place, rank in enumerate(np.flatnonzero(alive)):
        owner[rank * LOCAL : (rank + 1) * LOCAL] = owner_of_id[place * LOCAL : (place + 1) * LOCAL]
    params = logical_params(rng)
    x, mask = steered_tokens("random", rng, T * EP * TP, EP)
    y, stats = jax.jit(apply)(on_instances(params, owner), x, mask, table=table_of(owner_of_id), rank_table=rank_table)
    expected, _ = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K)
    shared = {name.replace("shared", "w"): params[name] for name in params if name.startswith("shared")}
    alone = reference.expert_ffn(x.astype(np.float64), shared, "swiglu")
    gone = np.repeat(~alive, T * TP)
    assert_close("y", np.asarray(y)[~gone], expected[~gone])
    assert_close("y of the killed rank", np.asarray(y)[gone], alone[gone])
    assert stats.num_dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("transport", MOSTLY_PADDED)
def test_a_quantised_wire_loses_nothing_of_what_it_can_hold(transport):
    """Rows and cotangents that the recipes represent exactly: the layer must agree with the oracle to fp32.

    One round holds every pair: that further rounds add up does not depend on the wire, and is shown without codes.
    """
    rng = np.random.default_rng(2)
    one_round = {"num_experts": EXPERTS, "num_logical_experts": None, "capacity_factor": float(EP)}
    _, apply = make(mesh_of(EP, TP), transport=transport, quant="int8", **one_round)
    params = logical_params(rng)
    x, mask = steered_tokens("random", rng, T * EP * TP, EP)
    x = np.clip(np.rint(x * 32), -127, 127)
    x[:, -1] = 127  # the largest of every row: the multiplier is exactly 1
    x = (x / 32).astype(np.float32)
    compare(value_and_grads(apply), params, np.arange(EXPERTS), x, mask, rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"combine_quant": "int8_group8"}, pytest.param({"backward_quant": "mx_e5m2"}, marks=pytest.mark.slow)],
)
def test_a_quantised_way_back_stays_within_its_error(options):
    rng, router = np.random.default_rng(3), moe.RouterConfig()
    params = logical_params(rng)
    x, mask = steered_tokens("random", rng, T * EP * TP, EP)
    ct = rng.normal(size=x.shape).astype(np.float32)
    _, apply = make(mesh_of(EP, TP), num_experts=EXPERTS, num_logical_experts=None, transport="padded", **options)
    (_, (y, _)), (_, d_x) = value_and_grads(apply)(params, x, mask, ct, {})
    want_y, _ = reference.moe_layer(params, x, router, top_k=K, token_mask=mask)
    _, want_d_x = reference.moe_layer_vjp(params, x, ct, router, ct_balance=BALANCE, ct_z=Z, top_k=K, token_mask=mask)
    bound = {"combine_quant": (1 / 127, 1 / 127), "backward_quant": (0, 0.25)}[next(iter(options))]
    errors = []
    for got, want, relative in ((y, want_y, bound[0]), (d_x, want_d_x, bound[1])):
        errors.append(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
        assert errors[-1] <= relative + TOLERANCE
    assert (errors[0] > TOLERANCE) == ("combine_quant" in options)
    assert errors[1] > TOLERANCE  # rows that come back make the gradient of their weights


@pytest.mark.slow
def test_over_nodes():
    """On the transport of nodes; everybody runs dispatch and combine of it, and its transport contract."""
    rng = np.random.default_rng(4)
    mesh = moe.make_mesh(ep=EP, nodes=2, tp=TP)
    _, apply = make(mesh, num_experts=EXPERTS, num_logical_experts=None, transport="hierarchy", capacity_factor=1.0)
    params = logical_params(rng)
    run = value_and_grads(apply)
    for pattern in ("random", "one_rank", "masked"):
        x, mask = steered_tokens(pattern, rng, T * EP * TP, EP)
        compare(run, params, np.arange(EXPERTS), x, mask, rng)


def test_bad_input():
    init, apply = make(mesh_of(EP, TP))
    params = make_params(init, np.random.default_rng(0))
    x = jnp.zeros((T * EP * TP, H))
    missing = r"table is missing: .* scores 8 experts.* num_experts=16.* table=placement.table\(\)"
    with pytest.raises(moe.errors.MissingArgumentError, match=missing):
        apply(params, x)  # its router scores logical experts, and no table says where they are
    with pytest.raises(moe.errors.ShapeError, match=r"table has shape \(7, 17\).* scores 8 experts"):
        apply(params, x, table=table_of(np.arange(INSTANCES) % EXPERTS)[1:])
    with pytest.raises(moe.MoEError, match="table"):
        apply(params, x, table=np.zeros(EXPERTS, np.int32))
    with pytest.raises(moe.MoEError, match="rank_table has shape"):
        apply(params, x, table=table_of(np.arange(INSTANCES) % EXPERTS), rank_table=np.zeros(3, np.int32))
    for given in ({"balance": "load"}, {"table": table_of(np.arange(INSTANCES) % EXPERTS)}):  # the other one is missing
        with pytest.raises(moe.errors.UnexpectedArgumentError, match="shares was given"):
            apply(params, x, shares=np.ones((EXPERTS, INSTANCES), np.float32), **given)
    with pytest.raises(moe.errors.UnsupportedError, match="int8_static"):
        make(mesh_of(EP, TP), quant="int8_static")
