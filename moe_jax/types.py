"""The traced data that crosses layer borders, as frozen pytrees.

No leaf of what ``dispatch`` returns has rank 0: one ``PartitionSpec`` prefix such as ``P(("ep", "tp"))`` fits it all.
``LayerStats`` and ``Routing.losses`` are the same on every device, and hold scalars.
T tokens per device, K choices and C pairs per token, H hidden size, W expert-parallel ranks, P tensor-parallel ranks,
L local experts, M row capacity, S outbox slots, A inbox slots (rows that an exchange may deliver).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, dataclass_transform

import jax

from moe_jax import _compat

if TYPE_CHECKING:  # plans are made of what is above this file
    from moe_jax.plan.plan import Plan

Array = jax.Array


@dataclass_transform(kw_only_default=True, frozen_default=True)
def pytree(static: tuple[str, ...] = (), *, plain: bool = True) -> Callable[[_compat.Class], _compat.Class]:
    """A frozen, keyword-only dataclass that is a pytree; ``static`` names its compile-time fields.

    ``jax.export`` can write programs that take or return it if the static fields are plain values. Static values of
    other kinds are made exportable where their class is defined.

    Args:
      plain: whether the static fields are plain values, such as numbers and texts.
    """

    def decorate(cls: _compat.Class) -> _compat.Class:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        cls = jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))
        return _compat.exportable(cls) if plain else cls

    return decorate


@pytree(static=("plan",), plain=False)
class DispatchHandle:
    """Where every row came from and goes back to: integers only, so no gradient flows through it.

    Attributes:
      plan: the static Plan that made it.
      expert_ids: [T, K] i32, the choices that count; -1 for masked ones and ids out of range.
      group_sizes: [L] i32, rows per local expert in this round.
      send_counts: [W, L] i32, pairs of this rank by destination, over all rounds.
      recv_counts: [P, W, L] i32, pairs for this rank by source, over all rounds.
      maps: where each row lies: a pytree of the transport's own, see ``moe_jax.transports``.
    """

    plan: "Plan"
    expert_ids: Array
    group_sizes: Array
    send_counts: Array
    recv_counts: Array
    maps: Any


@pytree()
class DispatchStats:
    """What a dispatch did with this device's pairs.

    Attributes:
      num_dropped: [1] i32, pairs that had a destination and did not fit; 0 unless overflow="drop".
      num_invalid: [1] i32, unmasked pairs whose id lies outside -1 .. num_ids - 1; they go nowhere.
      num_stale: [1] i32, pairs not sent because the peer is at another step; 0 without a window.
    """

    num_dropped: Array
    num_invalid: Array
    num_stale: Array


@pytree()
class Dispatched:
    """Rows for this rank's experts, expert by expert; rows past ``sum(group_sizes)`` may hold anything.

    Quantised rows are constants to JAX; ``moe_jax.dequantize`` turns them into rows in ``plan.dtype`` that have a
    gradient. To ask for a gradient through the codes or scales themselves, where they are floats, raises an
    UnsupportedError.

    Attributes:
      x: [M, H] in ``plan.dtype``; with a quantised wire, codes [M, V].
      scales: [M, S] row scales of a quantised wire; None where rows travel unquantised.
      group_sizes: [L] i32, rows of each local expert.
      handle: what ``combine`` needs to bring rows back.
      stats: pairs that did not travel.
      row_weights: [M] f32, the combine weight of each row, if weights were given; 1 for shared experts.
      gradient: [M, H] zeros that carry the gradient of quantised rows; read by ``dequantize``.
      window: the receive window after this step, if one was given.
      performance_info: [W] or [2, W] microseconds waited per source, added to what was given.
    """

    x: Array
    scales: Array | None
    group_sizes: Array
    handle: DispatchHandle
    stats: DispatchStats
    row_weights: Array | None = None
    gradient: Array | None = None
    window: Any = None
    performance_info: Array | None = None


@pytree()
class Routing:
    """A router's choice for every token.

    Attributes:
      expert_ids: [T, K] i32, -1 = none.
      combine_weights: [T, K] f32.
      losses: "balance" and "z", and "sequence_balance" where sequences are known; f32 scalars.
      load: [E] i32, pairs per expert.
      mean_score: [E] f32, the mean over the tokens of their scores, where the scores of each token are first divided by
        their sum. None where the choices were not made by ``route`` and came without it.
    """

    expert_ids: Array
    combine_weights: Array
    losses: dict[str, Array]
    load: Array
    mean_score: Array | None = None


@pytree()
class LayerStats:
    """What one MoE layer did, summed over the whole mesh and the same on every device, but for ``routing``.

    Attributes:
      num_dropped: i32 scalar, pairs that did not fit, which there are with overflow="drop" alone, and pairs whose
        expert has no instance of the plan in its row of the table; none of them adds anything.
      num_rounds: i32 scalar, dispatch-compute-combine rounds executed, at least 1.
      load: [E] i32, pairs per expert.
      losses: the router's losses, f32 scalars.
      mean_score: [E] f32, as in ``Routing``; with ``load`` it is what ``balance_loss`` takes.
      routing: if it was asked for, (expert_ids [..., K] i32, combine_weights [..., K] f32), laid out like the tokens;
        else None. The ids are what the router chose, before any table; -1 and a weight of 0 where there is no choice.
        The argument ``routing`` of the layer takes it.
    """

    num_dropped: Array
    num_rounds: Array
    load: Array
    losses: dict[str, Array]
    mean_score: Array | None = None
    routing: tuple[Array, Array] | None = None
