"""What a plan costs on the wire."""

import jax.numpy as jnp

from moe_jax.quant import recipe


def balanced_rows(tokens: int, top_k: int, ep_size: int, num_shared_ranks: int) -> float:
    """Rows that a rank sends another when routes are even; a rank of a shared expert gets every token it serves."""
    routed = tokens * top_k / (ep_size - num_shared_ranks)
    return max(routed, float(tokens)) if num_shared_ranks else routed


def row_bytes(name: str, hidden: int, dtype: str) -> int:
    """Bytes of a row on the wire under the recipe ``name``."""
    chosen = recipe(name, dtype)
    return hidden * jnp.dtype(dtype).itemsize if chosen is None else chosen.row_bytes(hidden)


def wire_bytes(
    *,
    ep_size: int,
    tp_size: int,
    tokens: int,
    hidden: int,
    balanced: float,
    pair_capacity: int,
    out: int,
    back: int,
) -> dict[str, float]:
    """Bytes that a device sends in a balanced forward pass, by transport.

    Args:
      ep_size, tp_size, tokens, hidden: W, P, T and H.
      balanced: rows for each rank under an even load; pair_capacity: slots for each rank in a block.
      out, back: bytes of a row on its way to the experts and back.
    """
    peers = ep_size - 1
    lanes = (tp_size - 1) * ep_size * (out + back)  # gathered over tp, and reduce-scattered, per slot of a pair
    everyone = ep_size * tp_size - 1
    return {
        "padded": pair_capacity * (peers * (out + back) + lanes),
        "ragged": balanced * peers * (out + back) + pair_capacity * lanes,
        "allgather": everyone * tokens * (out + 4 * hidden),  # sums travel in fp32
    }
