"""How rows move between tokens and experts: one module per route, and the differentiable ways there and back."""

from moe_jax.transports.collect import collect_rows, collect_rows_timed, finish, together
from moe_jax.transports.picking import as_delivered, copy_weights, pick, rows_if, token_of
from moe_jax.transports.routes import RowOrder, arrival_order
from moe_jax.transports.send import Sent, carry_rows, dequantized, send_as_is, send_rows, smooth_rows

__all__ = [
    "RowOrder",
    "Sent",
    "arrival_order",
    "as_delivered",
    "carry_rows",
    "collect_rows",
    "collect_rows_timed",
    "copy_weights",
    "dequantized",
    "finish",
    "pick",
    "rows_if",
    "send_as_is",
    "send_rows",
    "smooth_rows",
    "together",
    "token_of",
]
