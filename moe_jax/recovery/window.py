"""The receive window: the rows that a rank receives into, kept from step to step, and its recovery after a failure.

What to do after a failure: reset the window; call ``receivable_test`` for each server in turn, and then
``receivable_info_collect``, from whose matrix the host decides who survives. Reset the window again, with the mask of
the survivors, and give their rank table to the operators.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat, collectives
from moe_jax.collectives import rendezvous
from moe_jax.errors import (
    InvalidArgumentError,
    ShapeError,
    check_count,
    check_dtype,
    check_flag,
    check_rank,
    check_shape,
    check_type,
)
from moe_jax.recovery.barrier import wait_for_ranks
from moe_jax.types import DispatchHandle, pytree

Array = jax.Array


@pytree()
class Window:
    """What one rank received. Donate it (``jit(..., donate_argnums)``), and every step writes into the same memory.

    Attributes:
      data: [A, V] rows.
      counts: [W] i32, the rows that came from each source; after ``receivable_test`` source + 1 where it was heard,
        else 0.
      step: [1] i32, the number of the step that wrote the window.
    """

    data: Array
    counts: Array
    step: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``data``: a first phase of ``moe_jax.aclnn`` takes a window where CANN has a buffer."""
        return self.data.shape

    @property
    def dtype(self) -> Any:
        """The dtype of ``data``."""
        return self.data.dtype


def make_window(num_rows: int, width: int, dtype: Any, num_ranks: int) -> Window:
    """A window of zeros: data [num_rows, width] in ``dtype``, counts [num_ranks], step 0.

    Raises:
      InvalidArgumentError: a size is not a whole number of at least 1 (``num_rows``: 0).

    >>> import jax.numpy as jnp
    >>> from moe_jax.recovery.window import make_window
    >>> make_window(4, 2, jnp.bfloat16, num_ranks=2).counts
    Array([0, 0], dtype=int32)
    """
    check_count("num_rows", num_rows, low=0)
    check_count("width", width)
    check_count("num_ranks", num_ranks)
    return Window(
        data=jnp.zeros((num_rows, width), dtype),
        counts=jnp.zeros(num_ranks, jnp.int32),
        step=jnp.zeros(1, jnp.int32),
    )


@_compat.vary_as_operands()
def buffer_reset(
    window: Window,
    link_mask: Array,
    axis_name: str | tuple[str, ...],
    *,
    sync: bool = True,
    timeout_us: int | None = None,
) -> Window:
    """Zeroes the whole window of every rank that is not isolated. An isolated rank keeps its window as it is.

    Args:
      window: the window of this rank.
      link_mask: [W] i32 or bool, the same on all ranks; 0 = the links to that rank are broken, so it is isolated.
      axis_name: one mesh axis, or several that are flattened in that order.
      sync: whether no rank gets its window back before all ranks have zeroed theirs, as after ``barrier``.
      timeout_us: only with ``sync``; as for ``barrier``, where isolated ranks may be late.

    Returns:
      Window, in the memory of the old one where that is donated.

    Raises:
      BarrierTimeoutError: as ``barrier``, when the program runs.
      InvalidArgumentError, MissingArgumentError, ShapeError, DtypeError: an argument is not as above.
      MeshError: ``axis_name`` is not bound here.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> def used_and_reset(link_mask):
    ...     window = moe.Window(data=jnp.ones((2, 1)), counts=jnp.ones(2, jnp.int32), step=jnp.zeros(1, jnp.int32))
    ...     return moe.buffer_reset(window, link_mask, "ep").data
    >>> run = jax.jit(jax.shard_map(used_and_reset, mesh=moe.make_mesh(ep=2), in_specs=P(), out_specs=P("ep")))
    >>> run(jnp.array([1, 0])).ravel()  # rank 1 is isolated
    Array([0., 0., 1., 1.], dtype=float32)

    Source: MoeDistributeBufferReset (its elasticInfo is ``link_mask``, its needSync ``sync``).
    """
    axes, num_ranks = _bound(axis_name)
    check_window(window, num_ranks)
    _check_links("link_mask", link_mask, num_ranks)
    check_flag("sync", sync)
    if timeout_us is not None and not sync:
        raise InvalidArgumentError(f"timeout_us={timeout_us} limits a wait, and sync=False waits for nobody; drop one")
    linked = jnp.asarray(link_mask) != 0
    isolated = ~linked[jax.lax.axis_index(axes)]
    clean = jax.tree.map(lambda old: rendezvous.keep_where(isolated, old, jnp.zeros_like(old)), window)
    return wait_for_ranks(clean, linked, axes, timeout_us) if sync else clean


def received(window: Window, data: Array, handle: DispatchHandle, capacity: int) -> Window:
    """The window after one more step: ``data`` arrived, at most ``capacity`` rows from each source."""
    counts = jnp.sum(handle.recv_counts[collectives.tp_rank(handle.plan)], axis=-1, dtype=jnp.int32)
    return Window(data=data, counts=jnp.minimum(counts, capacity), step=window.step + 1)


def fresh_sources(step: Array, axis_name: str | tuple[str, ...]) -> Array:
    """[W] bool: the ranks whose ``step`` [1] is that of this rank, so that rows between the two belong to this step.

    Raises:
      ShapeError, DtypeError, MissingArgumentError: ``step`` is not [1] i32.
      InvalidArgumentError, MeshError: ``axis_name`` names no axes, or none that are bound here.
    """
    axes, _ = _bound(axis_name)
    check_shape("step", step, (1,), "[1], Window.step")
    check_dtype("step", step, ("int32",))
    return rendezvous.gather_ranks(step, axes)[:, 0] == step


@_compat.vary_as_operands()
def receivable_test(
    window: Window,
    pattern: Array,
    dst_ranks: Array,
    axis_name: str | tuple[str, ...],
    *,
    link_up: Array | None = None,
    ranks_per_server: int = 16,
) -> Window:
    """Sends ``pattern`` and the status rank + 1 to every rank of one server, over each link on its own.

    Args:
      window: this rank's, with A = W * R rows; rows [j * R, (j + 1) * R) are for rank j.
      pattern: [R, V] in the window's dtype, the same on all ranks.
      dst_ranks: [n] i32 with n of at least 1, traced; the server is ``dst_ranks[0] // ranks_per_server``.
      axis_name: one mesh axis, or several that are flattened in that order.
      link_up: [W] i32 or bool, 0 = nothing from that rank reaches this one. It simulates broken links on devices whose
        links are good; None: none is broken.
      ranks_per_server: ranks on one server, consecutive.

    Returns:
      The window with the rows and the status (in ``counts``) of every rank that sent here and was heard. The entries of
      other ranks stay as they were.

    Raises:
      InvalidArgumentError, MissingArgumentError, ShapeError, DtypeError: an argument is not as above.
      MeshError: ``axis_name`` is not bound here.

    Source: ElasticReceivableTest.
    """
    axes, num_ranks = _bound(axis_name)
    _check_patterned(window, pattern, num_ranks)
    check_rank("dst_ranks", dst_ranks, 1, "[n]")
    check_dtype("dst_ranks", dst_ranks, ("int32",), "cast it with .astype(jnp.int32)")
    if not dst_ranks.size:
        raise ShapeError("dst_ranks has shape (0,); expected [n] with the ranks of one server")
    check_count("ranks_per_server", ranks_per_server)
    hears = _links(link_up, num_ranks)
    # 1. What goes to each rank: the status and the pattern to those of the server, zeros to all others.
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)
    addressed = ranks // ranks_per_server == jnp.asarray(dst_ranks)[0] // ranks_per_server
    me = jax.lax.axis_index(axes)
    status = _compat.as_varying(jnp.where(addressed, me + 1, 0), axes)
    rows = _compat.as_varying(jnp.where(addressed[:, None, None], pattern, jnp.zeros_like(pattern)), axes)
    status, rows = collectives.swap_with_peers(status, axes), collectives.swap_with_peers(rows, axes)
    # 2. Only what came over a link that works, from a rank that sent here, is written.
    arrived = hears & (status > 0)
    old = window.data.reshape(rows.shape)
    return Window(
        data=jnp.where(arrived[:, None, None], rows, old).reshape(window.data.shape),
        counts=jnp.where(arrived, status, window.counts),
        step=window.step,
    )


@_compat.vary_as_operands()
def receivable_info_collect(
    window: Window, pattern: Array, axis_name: str | tuple[str, ...], *, link_up: Array | None = None
) -> Array:
    """Who hears whom, as far as this rank is told after ``receivable_test``.

    A rank counts as heard when its status stands in the window and its rows equal the pattern.

    Args:
      window: this rank's, as ``receivable_test`` returned it.
      pattern: [R, V] that was sent; NaN equals nothing.
      axis_name, link_up: as there; the reports travel over the same links.

    Returns:
      y [W, W] i32: y[i, j] = j + 1 where rank i received from rank j, else 0. Row i is zero where this rank cannot hear
      rank i, so the matrix may differ between ranks.

    Raises:
      InvalidArgumentError, MissingArgumentError, ShapeError, DtypeError: an argument is not as above.
      MeshError: ``axis_name`` is not bound here.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> from moe_jax.recovery.window import make_window
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> def who_hears_whom(pattern):
    ...     window = make_window(2, 1, jnp.float32, num_ranks=2)
    ...     window = moe.receivable_test(window, pattern, jnp.array([0]), "ep")  # all ranks are on server 0
    ...     return moe.receivable_info_collect(window, pattern, "ep")
    >>> run = jax.jit(jax.shard_map(who_hears_whom, mesh=moe.make_mesh(ep=2), in_specs=P(), out_specs=P("ep")))
    >>> run(jnp.array([[7.0]])).tolist()  # two rows of each rank
    [[1, 2], [1, 2], [1, 2], [1, 2]]

    Source: ElasticReceivableInfoCollect.
    """
    axes, num_ranks = _bound(axis_name)
    _check_patterned(window, pattern, num_ranks)
    hears = _links(link_up, num_ranks)
    rows = window.data.reshape(num_ranks, *pattern.shape)
    names = jnp.arange(1, num_ranks + 1, dtype=jnp.int32)
    # 1. Whom this rank heard: the status is right, and so is every number of the pattern.
    received = (window.counts == names) & jnp.all(rows == pattern, axis=(1, 2))
    # 2. What all ranks say of that, as far as their reports come through.
    reports = rendezvous.gather_ranks(jnp.where(received, names, 0), axes)
    return jnp.where(hears[:, None], reports, 0)


def _bound(axis_name: Any) -> tuple[tuple[str, ...], int]:
    axes = _compat.bound_axes(axis_name)
    return axes, jax.lax.axis_size(axes)


def _links(link_up: Array | None, num_ranks: int) -> Array:
    if link_up is None:
        return jnp.ones(num_ranks, bool)
    _check_links("link_up", link_up, num_ranks)
    return jnp.asarray(link_up) != 0


def _check_links(name: str, mask: Array, num_ranks: int) -> None:
    check_shape(name, mask, (num_ranks,), "[W], 0 = broken")
    check_dtype(name, mask, ("bool", "int32"), "cast it with .astype(bool)")


def check_window(window: Window, num_ranks: int) -> None:
    """Raises unless ``window`` is one of a group of ``num_ranks``."""
    check_type("window", window, Window, "build it with moe_jax.make_receive_window")
    check_rank("window.data", window.data, 2, "[A, V]")
    check_shape("window.counts", window.counts, (num_ranks,), "[W]")
    check_dtype("window.counts", window.counts, ("int32",))
    check_shape("window.step", window.step, (1,), "[1]")
    check_dtype("window.step", window.step, ("int32",))


def _check_patterned(window: Window, pattern: Array, num_ranks: int) -> None:
    check_window(window, num_ranks)
    check_rank("pattern", pattern, 2, "[R, V]")
    check_dtype("pattern", pattern, (np.dtype(window.data.dtype),), "the dtype of window.data")
    layout = f"[W * R, V] for a pattern [R, V] from each of {num_ranks} ranks"
    check_shape("window.data", window.data, (num_ranks * pattern.shape[0], pattern.shape[1]), layout)
