"""Training with replicas is training without them: the same losses and experts, and replicas that stay equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.errors import InvalidArgumentError, MeshError

EP, TP, EXPERTS, T, H, F = 2, 2, 4, 8, 8, 8
SLOTS = np.array([0, 1, 0, 2, 0, 3], np.int32)  # three replicas of expert 0, two of them on one rank
PLACEMENT = moe.Placement(physical_to_logical=SLOTS, num_logical_experts=EXPERTS, num_ranks=EP)
IDS = ("w_up", "w_gate", "w_down")


def plan_for(mesh, num_experts):
    sizes = {"tokens_per_rank": T * EP // mesh.size, "hidden": H, "num_experts": num_experts, "top_k": 2}
    return moe.make_plan(mesh, **sizes, dtype="float32", transport="padded")


def losses_of(mesh, params, placement, num_experts):
    """The losses of four steps of Adam, and what they make of ``params``; with a placement, on its replicas."""
    plan = plan_for(mesh, num_experts)
    params = moe.place(params, mesh, plan)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F, num_logical_experts=EXPERTS)
    table = None if placement is None else placement.table()
    rng = np.random.default_rng(1)
    x, target = (jnp.asarray(rng.normal(size=(T * EP, H)), jnp.float32) for _ in range(2))
    optimizer = optax.adam(1e-2, eps=1e-3)

    @functools.partial(jax.jit, static_argnames="summed")
    def step(params, state, placement, table, summed):
        def loss_of(params):
            y, _ = apply(params, x, table=table, balance="token")
            return jnp.mean((x + y - target) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(params)
        if summed:
            grads = moe.sum_replica_gradients(grads, placement, mesh, plan)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = step(params, state, placement, table, placement is not None)
        losses.append(float(loss))
    return losses, jax.tree.map(np.asarray, params)


def test_training_with_replicas_is_training_without_them():
    mesh, alone, rng = mesh_of(EP, 1), mesh_of(1, 1), np.random.default_rng(0)
    shapes = {"router": (H, EXPERTS), "w_up": (EXPERTS, H, F), "w_gate": (EXPERTS, H, F), "w_down": (EXPERTS, F, H)}
    params = {name: rng.normal(size=shape).astype(np.float32) / 3 for name, shape in shapes.items()}
    copies = {name: value[SLOTS] if name in IDS else value for name, value in params.items()}
    want, learnt = losses_of(alone, params, None, EXPERTS)
    got, replicas = losses_of(mesh, copies, PLACEMENT, len(SLOTS))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-1] < want[0] - 0.01
    for name in IDS:
        np.testing.assert_array_equal(replicas[name], replicas[name][[0, 1, 0, 3, 0, 5]], err_msg=name)
        np.testing.assert_allclose(replicas[name], learnt[name][SLOTS], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(replicas["router"], learnt["router"], rtol=0, atol=1e-5)


def test_the_wire_takes_the_redundant_slots_alone_and_tp_ranks_keep_their_parts():
    mesh = mesh_of(EP, TP)
    layout = NamedSharding(mesh, P("ep", None, "tp"))
    leaf = jax.ShapeDtypeStruct((len(SLOTS), H, F), jnp.bfloat16, sharding=layout)
    run = jax.jit(lambda grads: moe.sum_replica_gradients(grads, PLACEMENT, mesh, plan_for(mesh, len(SLOTS))))
    found = moe.hlo_contract(run, {"w_up": leaf})
    assert found.counts == {"all-reduce": 1}
    redundant = (len(SLOTS) - EXPERTS) * H * F // TP * 4
    assert found.wire_bytes == redundant * 2 * (EP - 1) // EP


def test_errors_list_all_that_is_wrong():
    mesh = mesh_of(EP, TP)
    plan = plan_for(mesh, 8)
    with pytest.raises(InvalidArgumentError) as caught:
        moe.sum_replica_gradients({"w_up": jnp.ones((5, 2))}, PLACEMENT, mesh, plan)
    assert "6 slots on 2 ranks, and the plan num_experts=8" in str(caught.value)
    assert "grads['w_up'] has shape (5, 2)" in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="grads has no leaf below the name"):
        moe.sum_replica_gradients({"router": jnp.ones((6, 2))}, PLACEMENT, mesh, plan_for(mesh, 6))
    with pytest.raises(MeshError, match="the plan was made for"):
        moe.sum_replica_gradients({}, PLACEMENT, mesh_of(4, 1), plan)
