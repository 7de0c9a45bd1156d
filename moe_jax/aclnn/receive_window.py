"""The receive window of a dispatch: rows that arrive, kept from step to step where a program wants to clear them."""

import inspect
from typing import Any

import jax

from moe_jax.aclnn.calls import bind, named, operator_of
from moe_jax.aclnn.dispatch import moe_distribute_dispatch_v4
from moe_jax.aclnn.first_phase import first_phase_of
from moe_jax.aclnn.rules_exchange import window_shape
from moe_jax.aclnn.versions import moe_distribute_dispatch_v3
from moe_jax.recovery.window import Window, make_window

_WHOLE = inspect.signature(first_phase_of(moe_distribute_dispatch_v4))
_SIGNATURE = _WHOLE.replace(
    parameters=[one for one in _WHOLE.parameters.values() if one.name not in ("performance_info", "window")],
    return_annotation=Window,
)


def _make_window(*args: Any, **kwargs: Any) -> Window:
    given = bind("make_receive_window", _SIGNATURE.parameters, args, kwargs)
    # The rules are those of V3, which takes all that any dispatch with a window takes, elastic_info on a3 included.
    dispatch = operator_of(moe_distribute_dispatch_v3)
    shape = window_shape(dispatch.call(given))
    call = dispatch.call({**given, "window": jax.ShapeDtypeStruct(shape, "uint8")})  # not every dispatch takes one
    return make_window(*shape, "uint8", call["ep_world_size"])


make_receive_window = named(
    _make_window,
    "make_receive_window",
    _SIGNATURE,
    """An empty window of one rank for ``moe_distribute_dispatch_v4(..., window=)`` and its earlier versions.

    It takes the arguments of the dispatch that it is for, arrays or their shapes, and raises what its first phase does.
    In CANN the window belongs to the communicator.
    """,
)
