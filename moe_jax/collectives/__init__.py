"""The only callers of JAX's collectives.

``group`` is what the ranks of a plan gather, sum and tell each other, and ``exchange`` what moves rows between them.
They are made of ``ragged``, slices of unequal length on any back end; ``bits``, rows as integers where XLA would widen
them; and ``stopwatch``, one peer after the other with a clock. In ``rendezvous`` ranks meet on the host.
"""

from moe_jax.collectives.exchange import (
    Blocks,
    Chunks,
    Exchange,
    Receiving,
    Slices,
    TimedBlocks,
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
    "gather_counts",
    "gather_params",
    "gather_sizes",
    "gather_tokens",
    "gather_tp",
    "max_over",
    "ragged_all_to_all",
    "ragged_exchange",
    "reduce_scatter_tokens",
    "reduce_scatter_tp",
    "sum_over",
    "swap_with_peers",
    "tp_rank",
]
