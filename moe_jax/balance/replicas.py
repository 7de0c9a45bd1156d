"""Training with replicas: they stay equal, since each gets the gradient of the tokens of all of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from moe_jax import _compat, collectives
from moe_jax.balance.leaves import belongs_to_slots, layers_of, missing_of, name_of
from moe_jax.balance.placement import Placement
from moe_jax.errors import MeshError, check_type, raise_all
from moe_jax.mesh import mesh_violations
from moe_jax.plan import Plan
from moe_jax.plan.axes import as_names

Array = jax.Array


def sum_replica_gradients(grads: Any, placement: Placement, mesh: Mesh | AbstractMesh, plan: Plan) -> Any:
    """Gradients in which every replica has the sum over all replicas of its expert: ``sum of g[q] with l[q] == l[p]``.

    With these gradients a training step is the same as for experts without replicas. Replicas that were equal stay
    equal, bit by bit, with any optimiser that works element by element. (A norm over all gradients, as for clipping,
    counts an expert once for each replica.) The sum is taken in fp32 and rounded once. Gradients of experts with one
    slot come back bit by bit, and all other leaves as they are. Call it in the jitted step: the placement is traced, so
    another one of these sizes compiles nothing.

    It costs an all-reduce of P - E slots in fp32 for every leaf, in which each device sends 2 (R - 1) / R times these
    bytes.

    Args:
      grads: a pytree in which gradients stand under the names of parameters. Which leaves are those of experts, and of
        which layer, is told as in ``migrate``.
      placement: of [P] or [X, P] slots.
      mesh: over which the experts lie.
      plan: made from that mesh, for P experts.

    Raises:
      InvalidArgumentError: lists all ways in which the placement, the plan and ``grads`` do not fit.
      MeshError: the mesh is not the plan's.

    >>> import jax.numpy as jnp, numpy as np, moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> slots = np.array([0, 1, 2, 0], np.int32)
    >>> placement = moe.Placement(physical_to_logical=slots, num_logical_experts=3, num_ranks=2)
    >>> grads = {"b_up": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
    >>> moe.sum_replica_gradients(grads, placement, mesh, plan)["b_up"][:, 0]
    Array([5., 2., 3., 5.], dtype=float32)
    """
    check_type("placement", placement, Placement, "make one with moe_jax.rebalance")
    check_type("plan", plan, Plan, "build one with moe_jax.make_plan(...)")
    for text in mesh_violations(mesh):
        raise MeshError(text)
    if dict(mesh.shape) != dict(plan.mesh_axes):
        raise MeshError(
            f"mesh has axes {dict(mesh.shape)} and the plan was made for {dict(plan.mesh_axes)}; pass that mesh"
        )
    num_slots, num_ranks = placement.num_physical_experts, placement.num_ranks
    paths, tree = jax.tree_util.tree_flatten_with_path(grads)
    leaves = [leaf for _, leaf in paths]
    ours = {i: path for i, (path, leaf) in enumerate(paths) if belongs_to_slots(path, leaf)}
    found = []
    if (num_slots, num_ranks) != (plan.num_experts, plan.ep_size):
        found.append(
            f"the placement has {num_slots} slots on {num_ranks} ranks, and the plan num_experts={plan.num_experts} on "
            f"{plan.ep_size}"
        )
    found += [
        f"{name_of('grads', path)} has shape {leaves[i].shape}; expected [{num_slots}, ...], a row for each slot"
        for i, path in ours.items()
        if leaves[i].shape[:1] != (num_slots,)
    ]
    if not ours:
        found.append(missing_of("grads"))
    layers = layers_of("grads", ours, placement, found)
    raise_all(found, "sum_replica_gradients")
    num_groups = num_slots - placement.num_logical_experts
    if not num_groups:
        return grads

    axes = as_names(plan.ep_axis)
    over_ranks = PartitionSpec(axes)

    def shard(leaf: Array, groups: Array) -> Array:
        # 1. The sum of each group over the slots of this rank, then over the ranks. Slots that are in no group are left
        #    out.
        sums = jnp.zeros((num_groups, *leaf.shape[1:]), jnp.float32)
        sums = _compat.as_varying_alike((sums, leaf), axes)[0].at[groups].add(leaf.astype(jnp.float32), mode="drop")
        sums = collectives.sum_over(sums, axes).astype(leaf.dtype)
        # 2. The sums go back to the slots of the groups.
        summed = jnp.take(sums, groups, axis=0, mode="clip")
        return jnp.where((groups < num_groups).reshape(-1, *(1,) * (leaf.ndim - 1)), summed, leaf)

    # Along other axes, such as tp, every device does the same with its part. Layouts along Auto axes are left to the
    # compiler; those along Explicit ones are in the types.
    explicit = _compat.explicit_axes(mesh)

    @jax.jit  # a shard_map that leaves axes to the compiler needs one
    def run(leaf: Array, groups: Array) -> Array:
        spec = PartitionSpec(axes, *_compat.only_axes(jax.typeof(leaf).sharding.spec, explicit)[1:])
        leaf, groups = _compat.lay_out(leaf, mesh, spec), _compat.lay_out(groups, mesh, over_ranks)
        mapped = _compat.shard_map(
            shard, mesh=mesh, in_specs=(spec, over_ranks), out_specs=spec, axis_names={*axes, *explicit}
        )
        return mapped(leaf, groups)

    experts = jnp.atleast_2d(jnp.asarray(placement.physical_to_logical))
    groups = jax.vmap(lambda row: _groups(row, placement.num_logical_experts))(experts)
    with jax.named_scope("sum_replica_gradients"):
        for i in ours:
            leaves[i] = run(leaves[i], groups[layers[i]])
    return jax.tree.unflatten(tree, leaves)


def _groups(experts: Array, num_experts: int) -> Array:
    """[P] i32 the number of the group that a slot belongs to, one for each expert that has replicas; else P - E."""
    counts = jnp.zeros(num_experts, jnp.int32).at[experts].add(1)
    number = jnp.cumsum(counts > 1) - 1
    return jnp.where(counts[experts] > 1, number[experts], len(experts) - num_experts).astype(jnp.int32)
