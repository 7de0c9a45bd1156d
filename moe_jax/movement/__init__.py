"""How rows move between tokens and experts: one module per route, and the differentiable forms above them."""

from moe_jax.movement.differentiable import (
    Sent,
    collect_rows,
    collect_rows_timed,
    copy_weights,
    dequantized,
    finish,
    send_as_is,
    send_rows,
    smooth_rows,
)

__all__ = [
    "Sent",
    "collect_rows",
    "collect_rows_timed",
    "copy_weights",
    "dequantized",
    "finish",
    "send_as_is",
    "send_rows",
    "smooth_rows",
]
