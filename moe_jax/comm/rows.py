"""Rows between ranks as bits: XLA:CPU would widen 16-bit floats for a collective, and move twice the bytes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def swap_blocks(blocks: Array, axes: tuple[str, ...]) -> Array:
    """[W, ...]: block j goes to rank j along ``axes``; block i of the result came from rank i."""
    return _as_bits(lambda bits: lax.all_to_all(bits, axes, 0, 0), blocks)


swap_blocks.defvjp(
    lambda blocks, axes: (swap_blocks(blocks, axes), None), lambda axes, _, ct: (swap_blocks(ct, axes),)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_rows(rows: Array, axes: str | tuple[str, ...], tiled: bool) -> Array:
    """[A, ...] of each rank along ``axes`` -> [W, A, ...], or [W * A, ...] if ``tiled``, in rank order."""
    return _as_bits(lambda bits: lax.all_gather(bits, axes, tiled=tiled), rows)


gather_rows.defvjp(
    lambda rows, axes, tiled: (gather_rows(rows, axes, tiled), None),
    lambda axes, tiled, _, ct: (lax.psum_scatter(ct, axes, tiled=tiled),),
)


def _as_bits(move, rows: Array) -> Array:
    if not (jnp.issubdtype(rows.dtype, jnp.floating) and rows.dtype.itemsize == 2):
        return move(rows)
    return lax.bitcast_convert_type(move(lax.bitcast_convert_type(rows, jnp.uint16)), rows.dtype)
