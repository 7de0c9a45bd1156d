"""The collectives of a plan: what its ranks gather, sum and tell each other."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.collectives.bits import gather_rows
from moe_jax.collectives.stopwatch import timed_all_to_all
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
    ep_size = _compat.group_size(plan.ep_axis)
    tp_size = _compat.group_size(plan.tp_axes)
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


def rank_along(axes: tuple[str, ...]) -> Array:
    """This device's index along mesh axes, traced."""
    return lax.axis_index(axes)


def max_over_ranks(x: Array, plan: "Plan") -> Array:
    """The largest ``x`` of the exchange group, so that all its devices take the same branch."""
    return _without_unit_axes(lax.pmax, x, plan.exchange_axes)


def max_over_replicas(x: Array, plan: "Plan") -> Array:
    """The largest ``x`` of the data-parallel replicas of the exchange group."""
    return _without_unit_axes(lax.pmax, x, plan.dp_axis)


def sum_over(tree: Any, axis_name: str | Sequence[str]) -> Any:
    """The sum of every leaf over the ranks along ``axis_name``."""
    return _without_unit_axes(lax.psum, tree, (axis_name,) if isinstance(axis_name, str) else tuple(axis_name))


def _without_unit_axes(collective: Callable, tree: Any, axes: tuple[str, ...]) -> Any:
    """``collective(tree, axes)``, the same on all devices along ``axes``; without those of size 1."""
    large = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    result = collective(_compat.as_varying(tree, large), large) if large else tree
    return _compat.drop_unit_axes(result, set(_compat.union_of_varying_axes(tree)) - set(axes))


def sum_over_tokens(x: Array, plan: "Plan") -> Array:
    """The sum of ``x`` over every device that holds tokens."""
    return sum_over(x, plan.token_axes)


def gather_counts(send_counts: Array, plan: "Plan") -> Array:
    """[W, L] pairs of this rank by destination -> [P, W, W, L] of all ranks of the group, which all know the same."""
    everyone = _without_unit_axes(functools.partial(lax.all_gather, to="invarying"), send_counts, _token_axes(plan))
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


def gather_tp(rows: Array, plan: "Plan") -> Array:
    """[A, ...] of each tp rank -> [P * A, ...] of all, in rank order."""
    return gather_rows(plan.tp_axes, True, rows) if plan.tp_size > 1 else rows


def reduce_scatter_tp(rows: Array, plan: "Plan") -> Array:
    """[P * A, H] partial sums -> this rank's [A, H], summed over tp."""
    return lax.psum_scatter(rows, plan.tp_axes, tiled=True) if plan.tp_size > 1 else rows


def gather_params(weights: Array, axis: int, plan: "Plan") -> Array:
    """Weights of which each replica has an equal part along ``axis`` -> the whole, on every one of them."""
    if plan.num_param_shards == 1:
        return weights
    return lax.all_gather(weights, plan.param_axes, axis=axis, tiled=True)


def gather_tokens(x: Array, plan: "Plan") -> Array:
    """[T, ...] of each device -> [P * W, T, ...] of all, tp rank first."""
    return gather_rows(_token_axes(plan), False, x) if plan.exchanges else x[None]


def reduce_scatter_tokens(x: Array, plan: "Plan") -> Array:
    """[P * W, T, ...] partial sums -> this device's [T, ...]."""
    return lax.psum_scatter(x, _token_axes(plan)) if plan.exchanges else x[0]


def _token_axes(plan: "Plan") -> tuple[str, ...]:
    return (*plan.tp_axes, *plan.ep_axis)
