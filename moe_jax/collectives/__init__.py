"""The only callers of JAX's collectives.

``group`` has what the ranks of a plan gather, sum and tell each other, and ``exchange`` what moves rows between them.
These two are made of three others: ``ragged`` moves slices of unequal length on any back end, ``bits`` moves rows as
integers where XLA would widen them, and ``stopwatch`` moves rows to one peer after the other with a clock. ``slots``
takes experts from rank to rank, and in ``rendezvous`` ranks meet on the host.
"""

from moe_jax.collectives.exchange import (
    Blocks,
    Chunks,
    Exchange,
    Receiving,
    Slices,
    TimedBlocks,
    group_size,
)
from moe_jax.collectives.group import (
    check_axes,
    ep_rank,
    exchange_counts,
    exchange_counts_timed,
    gather_counts,
    gather_params,
    gather_sizes,
    gather_tokens,
    gather_tp,
    max_over,
    reduce_scatter_tokens,
    reduce_scatter_tp,
    sum_over,
    swap_with_peers,
    tp_rank,
)
from moe_jax.collectives.ragged import ragged_all_to_all, ragged_exchange
from moe_jax.collectives.slots import fetch_slots

__all__ = [
    "Blocks",
    "Chunks",
    "Exchange",
    "Receiving",
    "Slices",
    "TimedBlocks",
    "check_axes",
    "ep_rank",
    "exchange_counts",
    "exchange_counts_timed",
    "fetch_slots",
    "gather_counts",
    "gather_params",
    "gather_sizes",
    "gather_tokens",
    "gather_tp",
    "group_size",
    "max_over",
    "ragged_all_to_all",
    "ragged_exchange",
    "reduce_scatter_tokens",
    "reduce_scatter_tp",
    "sum_over",
    "swap_with_peers",
    "tp_rank",
]
