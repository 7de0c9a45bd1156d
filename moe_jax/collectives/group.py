"""The collectives of a plan: what its ranks gather, sum and tell each other."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.collectives.bits import gather_bits
from moe_jax.collectives.stopwatch import timed_all_to_all
from moe_jax.derivatives import custom_gradient
from moe_jax.errors import MeshError

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

Array = jax.Array


def check_axes(plan: "Plan", *, replicas: bool = False) -> None:
    """Raises MeshError unless the plan's axes, with ``replicas`` the data-parallel ones too, fit the mesh here."""
    axes = plan.token_axes if replicas else plan.exchange_axes
    sizes = {axis: _compat.bound_axis_size(axis) for axis in axes}
    unbound = [axis for axis, size in sizes.items() if size is None]
    if unbound:
        raise MeshError(
            f"axis {unbound[0]!r} of the plan is not bound here; call this function inside jax.shard_map over a mesh "
            f"with axes {axes}, or use moe_jax.moe_on_mesh"
        )
    ep_size = lax.axis_size(plan.ep_axis)
    tp_size = lax.axis_size(plan.tp_axes)
    if (ep_size, tp_size) != (plan.ep_size, plan.tp_size):
        raise MeshError(
            f"the mesh has ep={ep_size}, tp={tp_size} and the plan was made for ep={plan.ep_size}, "
            f"tp={plan.tp_size}; make the plan from the mesh that runs it"
        )


def ep_rank(plan: "Plan") -> Array:
    """This device's expert-parallel rank, traced."""
    return lax.axis_index(plan.ep_axis)


def tp_rank(plan: "Plan") -> Array:
    """This device's tensor-parallel rank, traced."""
    return lax.axis_index(plan.tp_axes) if plan.tp_axes else jnp.int32(0)


def max_over(x: Array, axes: tuple[str, ...]) -> Array:
    """The largest ``x`` of the devices along ``axes``, so that all of them take the same branch."""
    return _without_unit_axes(lax.pmax, x, axes)


def sum_over(tree: Any, axis_name: str | Sequence[str]) -> Any:
    """The sum of every leaf over the ranks along ``axis_name``."""
    return _without_unit_axes(lax.psum, tree, (axis_name,) if isinstance(axis_name, str) else tuple(axis_name))


def _without_unit_axes(collective: Callable, tree: Any, axes: tuple[str, ...]) -> Any:
    """``collective(tree, axes)`` without axes of size 1. The result is the same on all devices along ``axes``."""
    large = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    result = collective(_compat.as_varying(tree, large), large) if large else tree
    return _compat.drop_unit_axes(result, set(_compat.union_of_varying_axes(tree)) - set(axes))


def gather_counts(send_counts: Array, plan: "Plan") -> Array:
    """[W, L] pairs of this rank by destination -> [P, W, W, L] of all ranks of the group, which all know the same."""
    gather, axes = functools.partial(lax.all_gather, to="invarying"), (*plan.tp_axes, *plan.ep_axis)
    everyone = _without_unit_axes(gather, send_counts, axes)
    return everyone.reshape(plan.tp_size, plan.ep_size, *send_counts.shape)


def exchange_counts(send_counts: Array, plan: "Plan") -> Array:
    """[W, L] pairs of this rank by destination -> [P, W, L] pairs for this rank's experts by source."""
    received = lax.all_to_all(send_counts, plan.ep_axis, 0, 0, tiled=True) if plan.ep_size > 1 else send_counts
    return lax.all_gather(received, plan.tp_axes) if plan.tp_size > 1 else received[None]


def exchange_counts_timed(send_counts: Array, plan: "Plan") -> tuple[Array, Array]:
    """As ``exchange_counts``, and [2, W] i32, the microseconds of ``timed_all_to_all``."""
    received, microseconds = timed_all_to_all(send_counts, plan.ep_axis)
    return lax.all_gather(received, plan.tp_axes) if plan.tp_size > 1 else received[None], microseconds


def swap_with_peers(entries: Array, axes: tuple[str, ...]) -> Array:
    """[R, ...] one entry for each rank along ``axes`` -> [R, ...] one entry from each rank."""
    return lax.all_to_all(entries, axes, 0, 0, tiled=True)


def gather_sizes(sizes: Array, axes: tuple[str, ...]) -> Array:
    """[R] rows for each rank along ``axes`` -> [R, R] rows from each to each."""
    return lax.all_gather(sizes, axes)


@functools.partial(custom_gradient, num_static=1)
def gather_tp(plan: "Plan", rows: Array) -> Array:
    """[A, ...] of each tp rank -> [P * A, ...] of all, in rank order."""
    return gather_bits(plan.tp_axes, rows.dtype, tiled=True)(rows) if plan.tp_size > 1 else rows


def reduce_scatter_tp(plan: "Plan", rows: Array) -> Array:
    """[P * A, H] partial sums -> this rank's [A, H], summed over tp."""
    return lax.psum_scatter(rows, plan.tp_axes, tiled=True) if plan.tp_size > 1 else rows


# d_rows = the sum of the cotangents that all tp ranks have for this rank's rows    # [A, ...] from [P * A, ...]
gather_tp.defvjp(lambda plan, rows: (gather_tp(plan, rows), None), lambda plan, _, ct: (reduce_scatter_tp(plan, ct),))


def gather_params(weights: Array, axis: int, plan: "Plan") -> Array:
    """Weights of which each replica has an equal part along ``axis`` -> the whole weights, on every replica."""
    return lax.all_gather(weights, plan.param_axes, axis=axis, tiled=True)


@functools.partial(custom_gradient, num_static=1)
def gather_tokens(plan: "Plan", x: Array) -> Array:
    """[T, ...] of each device -> [P * W, T, ...] of all, tp rank first."""
    return gather_bits((*plan.tp_axes, *plan.ep_axis), x.dtype)(x) if plan.exchanges else x[None]


def reduce_scatter_tokens(plan: "Plan", x: Array) -> Array:
    """[P * W, T, ...] partial sums -> this device's [T, ...]."""
    return lax.psum_scatter(x, (*plan.tp_axes, *plan.ep_axis)) if plan.exchanges else x[0]


# d_x = the sum of the cotangents that all devices have for this device's tokens    # [T, ...] from [P * W, T, ...]
gather_tokens.defvjp(
    lambda plan, x: (gather_tokens(plan, x), None), lambda plan, _, ct: (reduce_scatter_tokens(plan, ct),)
)
