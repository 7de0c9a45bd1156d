"""The receive window of a dispatch: rows that arrive, kept from step to step where a program wants to clear them."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.aclnn.arguments import with_fewer_parameters
from moe_jax.aclnn.first_phase import checked_call
from moe_jax.aclnn.limits_dispatch import window_shape
from moe_jax.aclnn.workspace import moe_distribute_dispatch_v4_get_workspace_size
from moe_jax.recovery.window import Window, make_window

# The version whose rules hold: V3 takes all that a dispatch with a window may, elastic_info on a3 among it.
_DISPATCH = "moe_distribute_dispatch_v3"
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(moe_distribute_dispatch_v4_get_workspace_size).parameters.items()
}


def _make_window(given: Mapping[str, Any]) -> Window:
    shape = window_shape(checked_call(_DISPATCH, _DEFAULTS | given))
    window = jax.ShapeDtypeStruct(shape, "uint8")
    call = checked_call(_DISPATCH, _DEFAULTS | given | {"window": window})  # not every dispatch takes one
    return make_window(*window.shape, window.dtype, call["ep_world_size"])


make_receive_window = with_fewer_parameters(
    "make_receive_window",
    moe_distribute_dispatch_v4_get_workspace_size,
    ("performance_info", "window"),
    _make_window,
    """An empty window of one rank for ``moe_distribute_dispatch_v4(..., window=)`` and its earlier versions.

    It takes the arguments of the dispatch that it is for, arrays or their shapes, and raises what its first phase does.
    In CANN the window belongs to the communicator.
    """,
    returns=Window,
)
