"""The only module that knows which JAX it runs on (0.10 and 0.11)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import xla_bridge  # no public way to ask whether the back ends are up
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.errors import InvalidArgumentError, MeshError

shard_map = jax.shard_map


def backends_are_initialized() -> bool:
    """True once a device query has fixed the number of CPU devices."""
    return xla_bridge.backends_are_initialized()


def auto_mesh(devices: Any, axis_names: Sequence[str]) -> Mesh:
    """A mesh whose axes are all Auto (jax.make_mesh builds Explicit ones by default)."""
    return Mesh(devices, tuple(axis_names), axis_types=(AxisType.Auto,) * len(axis_names))


def spec_in_type(x: Any, mesh: Any) -> tuple | None:
    """How ``x`` is laid out, one entry per dimension, where that is part of its type: on meshes with Explicit axes."""
    if AxisType.Explicit not in mesh.axis_types:
        return None
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jax.typeof(x).ndim - len(spec))


def mesh_of_exported(exported: Any) -> AbstractMesh | None:
    """The mesh that an exported program's arguments are laid out over; None if none is."""
    for sharding in exported._in_named_shardings:  # the public in_shardings_hlo has lost the names
        if sharding is not None and sharding.mesh.size > 1:
            mesh = sharding.mesh
            return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=mesh.axis_types)
    return None


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which ``x`` is typed as varying; empty outside ``shard_map``."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def as_varying(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over ``axes`` too; the transpose of this step is the psum that sums replicas."""

    def widen(leaf):
        missing = tuple(a for a in axes if a not in varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(widen, tree)


def union_of_varying_axes(tree: Any) -> tuple[str, ...]:
    """Every axis over which some leaf of ``tree`` varies, in a fixed order."""
    return tuple(sorted(frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))))


def bound_axis_size(axis: str) -> int | None:
    """The size of a mesh axis inside ``shard_map``; None where that axis is not bound."""
    try:
        return lax.axis_size(axis)
    except NameError:
        return None


def bound_axes(axis_name: Any, argument: str = "axis_name") -> tuple[str, ...]:
    """The mesh axes that an argument names, as a tuple; raises where they cannot serve here."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    named = isinstance(axes, (tuple, list)) and all(isinstance(axis, str) for axis in axes)
    if not named or not axes or len(set(axes)) < len(axes):
        raise InvalidArgumentError(f"{argument}={axis_name!r} must be the name of a mesh axis, or a tuple of names")
    for axis in axes:
        if bound_axis_size(axis) is None:
            raise MeshError(f"{argument}={axis!r} is not bound here; call this inside jax.shard_map over that axis")
    return tuple(axes)


def late(turn: jax.Array, tree: Any) -> Any:
    """``tree`` as depending on the turn of a loop: XLA must do nothing with it ahead of a loop that seldom turns."""
    return lax.optimization_barrier((turn, tree))[1]


def searchsorted(ascending: jax.Array, values: jax.Array, *, side: str) -> jax.Array:
    """``jnp.searchsorted`` as i32. Its fast methods fail in JAX 0.10 where a mesh is manual in some axes only."""
    mesh = jax.sharding.get_abstract_mesh()
    partly = bool(mesh.manual_axes) and set(mesh.manual_axes) != set(mesh.axis_names)
    found = jnp.searchsorted(ascending, values, side=side, method="sort" if partly else "scan")
    return found.astype(jnp.int32)
