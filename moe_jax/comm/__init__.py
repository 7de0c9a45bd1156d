"""The only caller of collectives."""

from moe_jax.comm.collectives import (
    all_send_sizes,
    check_axes,
    ep_rank,
    exchange_blocks,
    exchange_blocks_timed,
    exchange_compact,
    exchange_counts,
    exchange_counts_timed,
    gather_tokens,
    gather_tp,
    max_over_ranks,
    max_over_replicas,
    rank_along,
    reduce_scatter_tokens,
    reduce_scatter_tp,
    sum_over,
    sum_over_tokens,
    tp_rank,
)
from moe_jax.comm.ragged import ragged_all_to_all
from moe_jax.comm.rows import cut_pieces, join_pieces, to_bits

__all__ = [
    "all_send_sizes",
    "check_axes",
    "cut_pieces",
    "ep_rank",
    "exchange_blocks",
    "exchange_blocks_timed",
    "exchange_compact",
    "exchange_counts",
    "exchange_counts_timed",
    "gather_tokens",
    "gather_tp",
    "join_pieces",
    "max_over_ranks",
    "max_over_replicas",
    "ragged_all_to_all",
    "rank_along",
    "reduce_scatter_tokens",
    "reduce_scatter_tp",
    "sum_over",
    "sum_over_tokens",
    "to_bits",
    "tp_rank",
]
