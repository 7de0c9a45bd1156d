"""The barrier: a value that no rank gets before every rank has come."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.collectives import rendezvous
from moe_jax.collectives.rendezvous import BarrierTimeoutError
from moe_jax.elastic.rank_table import read_rank_table
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, check_array, check_count

__all__ = ["BarrierTimeoutError", "barrier"]

_LONGEST_TIMEOUT_US = 2**31 - 1


def barrier(
    x: Any,
    axis_name: str | tuple[str, ...],
    *,
    rank_table: jax.Array | None = None,
    timeout_us: int | None = None,
) -> Any:
    """Returns ``x`` unchanged, on no rank before every rank along ``axis_name`` has computed its own ``x``.

    Use the result in place of ``x``: only what is computed from it waits, and a barrier whose result is not used is
    dropped by the compiler. Barriers may follow each other and need no group of their own. In both modes of
    differentiation a barrier is the identity: tangents and cotangents pass, and wait for nobody.

    Without ``timeout_us`` the wait is a collective, and lasts as long as it must. With it, each rank first announces
    itself on its host. If a live rank stays away for that long, all ranks fail together, none of them inside the
    collective. That costs a host callback, and between processes a few messages to the coordinator of jax.distributed.
    The collective itself takes in every rank of the mesh, removed ones too, as it must in an SPMD program; a process
    that is really gone can only be left out by a smaller mesh.

    Args:
      x: an array or a pytree of arrays, of any dtype; a leaf without elements waits but is not waited for.
      axis_name: one mesh axis, or several that are flattened in that order.
      rank_table: [4 + 2W] i32 of ``make_rank_table``, traced; with ``timeout_us``, ranks that it removes may be late.
      timeout_us: static; how long this rank waits for the others, in microseconds, the time that they compile included.
        None: for ever.

    Returns:
      ``x``, bit for bit, varying over the axes that it varied over.

    Raises:
      BarrierTimeoutError: on the host, when the program runs, as the text of a jax.errors.JaxRuntimeError; it lists the
        missing ranks.
      InvalidArgumentError, MissingArgumentError, ShapeError, DtypeError: an argument is not as above.
      MeshError: ``axis_name`` is not bound here.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> wait = lambda x: moe.barrier(x, "ep")
    >>> run = jax.jit(jax.shard_map(wait, mesh=moe.make_mesh(ep=2), in_specs=P("ep"), out_specs=P("ep")))
    >>> run(jnp.arange(4))
    Array([0, 1, 2, 3], dtype=int32)

    Source: DistributeBarrierV2 (xRef, elasticInfo, timeOut).
    """
    axes = _compat.bound_axes(axis_name)
    num_ranks = jax.lax.axis_size(axes)
    live = read_rank_table(rank_table, num_ranks, 0, 0).logical >= 0
    return wait_for_ranks(x, live, axes, timeout_us)


def wait_for_ranks(x: Any, live: jax.Array, axes: tuple[str, ...], timeout_us: int | None) -> Any:
    """``barrier`` with a mask of the ranks that must come, ``live`` [W] bool."""
    _check_timeout(timeout_us)
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise MissingArgumentError(f"x={x!r} holds no array; the barrier needs one whose users shall wait")
    for leaf in leaves:
        _check_leaf(leaf)
    x = jax.tree.map(jnp.asarray, x)
    with jax.named_scope("barrier"):
        moment = rendezvous.probe(x)
        if timeout_us is not None:
            moment = moment + rendezvous.await_live(x, live, axes, int(timeout_us))
        return rendezvous.hold(x, rendezvous.sum_of_arrivals(moment, x, axes))


def _check_leaf(leaf: Any) -> None:
    check_array("x", leaf)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise DtypeError(
            f"x has dtype {leaf.dtype}, but 64-bit types are off and JAX would narrow it; cast it, or enable them with "
            'jax.config.update("jax_enable_x64", True)'
        )


def _check_timeout(timeout_us: int | None) -> None:
    if timeout_us is None:
        return
    check_count("timeout_us", timeout_us)
    if timeout_us > _LONGEST_TIMEOUT_US:
        raise InvalidArgumentError(
            f"timeout_us={timeout_us} must be at most {_LONGEST_TIMEOUT_US}; None waits for ever"
        )
