"""The only caller of collectives."""

from moe_jax.collectives.bits import poison_of
from moe_jax.collectives.group import (
    check_axes,
    ep_rank,
    exchange_blocks,
    exchange_blocks_timed,
    exchange_compact,
    exchange_counts,
    exchange_counts_timed,
    gather_counts,
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
from moe_jax.collectives.ragged import ragged_all_to_all, ragged_exchange

__all__ = [
    "check_axes",
    "ep_rank",
    "exchange_blocks",
    "exchange_blocks_timed",
    "exchange_compact",
    "exchange_counts",
    "exchange_counts_timed",
    "gather_counts",
    "gather_tokens",
    "gather_tp",
    "max_over_ranks",
    "max_over_replicas",
    "poison_of",
    "ragged_all_to_all",
    "ragged_exchange",
    "rank_along",
    "reduce_scatter_tokens",
    "reduce_scatter_tp",
    "sum_over",
    "sum_over_tokens",
    "tp_rank",
]
