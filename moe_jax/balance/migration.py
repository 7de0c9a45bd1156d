"""Weights from slot to slot, on the mesh: what an expert knows follows it to where a new placement puts it."""

from typing import Any

import jax
import jax.core
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import _compat
from moe_jax.balance.leaves import belongs_to_slots, layers_of, missing_of, name_of
from moe_jax.balance.moves import Moves, find_moves
from moe_jax.balance.placement import Placement
from moe_jax.collectives import fetch_slots
from moe_jax.errors import MeshError, check_flag, check_type, raise_all
from moe_jax.kernels.table import PLATFORMS, registrations, resolve_backend
from moe_jax.mesh import mesh_violations
from moe_jax.plan.axes import as_names

Array = jax.Array


def migrate(
    params: Any, old_placement: Placement, new_placement: Placement, mesh: Mesh, *, donate: bool = False
) -> Any:
    """Moves experts from the slots of one placement to those of another: ``new[p] = old[any slot of its expert]``.

    Bit by bit, of parameters and of optimiser state alike. A leaf is moved if a key on its path is the name of a routed
    expert's parameter (``w_up``, ``w_gate``, ``w_down``, ``b_up``, ``b_gate``, ``b_down``), as in the states of optax,
    which hold dicts of the same names. It must have a leading axis of the P slots, split over R devices of the mesh:
    so nothing else that happens to have such a name is taken for experts. All other leaves, those of a single number,
    and those of layers whose placement stays, come back as they are.

    A slot whose expert is on its own rank already takes it from there. Every other slot that changes gets its expert
    from one of the ranks that hold it, chosen such that the rank which sends most sends as few slots as possible. All
    of it stays on the mesh, and what goes over the wire is this:

    - On GPU and TPU exactly the slots whose expert their rank did not hold, each once, from where it is to where it
      belongs: one ragged all-to-all, without a buffer. A back end that brings a ragged exchange of its own carries the
      same slots in S of them, S being the slots of a rank.
    - On CPU, where XLA has no ragged exchange, about twice as much: there are as many turns as the busiest rank has
      slots to send, or to receive, and each takes 2 (R - 1) / R slots of every device's wire, whoever talks to whom.

    Leaves are moved one after the other. Beside a device's part of one leaf and of its result, GPUs need no memory;
    TPUs make one more copy of that part, and CPUs one and a half.

    There is one program for each shape, dtype and layout of leaves. Which slots move is traced, so further placements
    of these sizes compile nothing.

    Args:
      params: any pytree, such as ``{"params": ..., "opt_state": ...}``, of arrays on the mesh; not traced. With
        placements of X layers the layer of a leaf is told by the last key before its name that ends in a number, as
        ``"3"`` or ``"layer_3"`` or an index of a list: row x is for the x-th of those numbers, in ascending order.
      old_placement: where the experts lie in ``params``: [P] or [X, P]. With [P] all layers in ``params`` lie so.
      new_placement: where they shall lie; of the same P, E, R and X.
      mesh: whose devices hold ``params``.
      donate: whether the memory of moved leaves is reused for the result; ``params`` must then not be read again, and
        no array of experts may stand in it twice.

    Returns:
      A pytree as ``params``, with the same layouts.

    Raises:
      InvalidArgumentError: lists all ways in which placements, mesh and ``params`` do not fit; nothing was moved then.
      MeshError: there is no mesh with devices.

    >>> import numpy as np, moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> slots = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((4, 32, 8), np.float32)
    >>> params = moe.place({"w_down": slots}, mesh, plan)
    >>> old, new = (
    ...     moe.Placement(physical_to_logical=np.array(experts, np.int32), num_logical_experts=4, num_ranks=2)
    ...     for experts in ([0, 1, 2, 3], [0, 3, 2, 1])
    ... )
    >>> moe.migrate(params, old, new, mesh)["w_down"][:, 0, 0]
    Array([0., 3., 2., 1.], dtype=float32)
    """
    for name, placement in (("old_placement", old_placement), ("new_placement", new_placement)):
        check_type(name, placement, Placement, "make one with moe_jax.rebalance")
    for text in mesh_violations(mesh):
        raise MeshError(text)
    if not isinstance(mesh, Mesh):
        raise MeshError("mesh is an AbstractMesh, whose devices hold nothing to move; pass the jax.sharding.Mesh")
    check_flag("donate", donate)
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    found = _disagreements(old_placement, new_placement)
    specs = {
        i: _spec_of(path, leaf, old_placement, mesh, found)
        for i, (path, leaf) in enumerate(paths)
        if belongs_to_slots(path, leaf)
    }
    if not specs:
        found.append(missing_of("params"))
    layers = layers_of("params", {i: paths[i][0] for i in specs}, old_placement, found)
    found += _not_to_be_donated({name_of("params", paths[i][0]): leaves[i] for i in specs}) if donate else []
    raise_all(found, "migrate")

    old, new = (np.atleast_2d(placement.physical_to_logical) for placement in (old_placement, new_placement))
    everywhere = NamedSharding(mesh, PartitionSpec())
    moves = {
        x: jax.device_put(find_moves(old[x], new[x], old_placement.num_ranks), everywhere)
        for x in range(len(old))
        if (old[x] != new[x]).any()
    }
    move, kernels = _move_in_place if donate else _move, _kernels_of(mesh)
    for i, spec in specs.items():
        if layers[i] in moves:
            leaves[i] = move(leaves[i], moves[layers[i]], mesh=mesh, spec=spec, kernels=kernels)
    return jax.tree.unflatten(tree, leaves)


def _moved(leaf: Array, moves: Moves, *, mesh: Mesh, spec: PartitionSpec, kernels: tuple[str, ...]) -> Array:
    """One leaf [P, ...], laid out by ``spec``, of which the first entry names the expert-parallel axes."""
    axes, everywhere = as_names(spec[0]) if spec else (), PartitionSpec()

    def shard(leaf: Array, moves: Any) -> Array:
        return fetch_slots(leaf, moves.sources, moves.turns, moves.num_turns, axes=axes, kernels=kernels)

    given = _compat.lay_out(leaf, mesh, spec), jax.tree.map(lambda ints: _compat.lay_out(ints, mesh, everywhere), moves)
    with jax.named_scope("migrate"):
        return _compat.shard_map(shard, mesh=mesh, in_specs=(spec, everywhere), out_specs=spec)(*given)


_move = jax.jit(_moved, static_argnames=("mesh", "spec", "kernels"))
_move_in_place = jax.jit(_moved, static_argnames=("mesh", "spec", "kernels"), donate_argnums=0)


def _kernels_of(mesh: Mesh) -> tuple[str, ...]:
    """The back end that "auto" takes for ragged exchanges on these devices, as a registration."""
    device = mesh.devices.flat[0]
    known = device.platform in PLATFORMS
    chosen = resolve_backend("ragged", platform=device.platform, device_kind=device.device_kind) if known else None
    return registrations(chosen.name if chosen else "xla")


def _disagreements(old: Placement, new: Placement) -> list[str]:
    """What of two placements differs that must not."""
    found = [
        f"{name} is {getattr(old, name)} in old_placement and {getattr(new, name)} in new_placement"
        for name in ("num_logical_experts", "num_ranks", "num_physical_experts")
        if getattr(old, name) != getattr(new, name)
    ]
    layers = [placement.physical_to_logical.shape[:-1] for placement in (old, new)]
    if layers[0] != layers[1]:
        found.append(
            f"old_placement has layers {layers[0]} and new_placement {layers[1]}; pass the same layers in both"
        )
    return found


def _not_to_be_donated(leaves: dict[str, Any]) -> list[str]:
    """Which leaves are an array that another one is too: its memory can become a result only once."""
    first, found = {}, []
    for name, leaf in leaves.items():
        other = first.setdefault(id(leaf), name)
        if other != name:
            found.append(f"{name} is the same array as {other}, and donated once only; copy it, or pass donate=False")
    return found


def _spec_of(path: tuple[Any, ...], leaf: Any, placement: Placement, mesh: Mesh, found: list[str]) -> PartitionSpec:
    """How a leaf that moves lies on the mesh; ``found`` gets what is wrong with it."""
    name = name_of("params", path)
    num_slots, num_ranks = placement.num_physical_experts, placement.num_ranks
    if not isinstance(leaf, Array) or isinstance(leaf, jax.core.Tracer):
        traced = isinstance(leaf, jax.core.Tracer)
        remedy = "call migrate outside jax.jit" if traced else "lay it out with moe_jax.place"
        found.append(f"{name} is a {type(leaf).__name__}, not an array on devices; {remedy}")
        return PartitionSpec()
    if leaf.is_deleted():
        found.append(f"{name} was donated before, and its memory is gone; pass what that call returned")
        return PartitionSpec()
    if leaf.ndim < 1 or leaf.shape[0] != num_slots:
        found.append(
            f"{name} has shape {leaf.shape}; expected [{num_slots}, ...], a row for each slot of the placements; pass "
            "the part of the tree that holds routed experts"
        )
    sharding = leaf.sharding
    named = isinstance(sharding, NamedSharding) and _same(sharding.mesh, mesh)
    if not named and not (mesh.size == 1 and sharding.device_set == set(mesh.devices.flat)):
        found.append(f"{name} lies on {sharding}, not over mesh {dict(mesh.shape)}; lay it out with moe_jax.place")
        return PartitionSpec()
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    split = int(np.prod([mesh.shape[axis] for axis in as_names(spec[0] if spec else None)]))
    if split != num_ranks:
        found.append(
            f"{name} is split over {split} ranks by {spec}, and the placements have num_ranks={num_ranks}; lay it out "
            "with moe_jax.place, or make the placements for these ranks"
        )
    return spec


def _same(mesh: Any, other: Mesh) -> bool:
    """Whether two meshes have the same axes and devices, of whatever types the axes are."""
    return (
        isinstance(mesh, Mesh) and mesh.axis_names == other.axis_names and np.array_equal(mesh.devices, other.devices)
    )
