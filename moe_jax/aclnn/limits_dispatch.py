"""What dispatch asks of its arguments, quantisation included. Letters as in ``limits_exchange``."""

import math

from moe_jax.aclnn.buffer_bytes import dispatch_row
from moe_jax.aclnn.limits import DTYPE, NULL, NULL_POINTER, Call, Rule, check_shape, dtype_name
from moe_jax.aclnn.limits_exchange import NEEDS, exchange_operator, hidden
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, ShapeError, UnsupportedError

_FP4 = ("float4_e2m1fn", "uint8")  # uint8: two values per byte
_CODES = ("float8_e4m3fn", "float8_e5m2", *_FP4)  # x that is quantised already
_E8M0 = ("float8_e8m0fnu", "uint8")


def pass_through(call: Call) -> bool:
    """Whether dispatch gets rows that are quantised already."""
    return call.dtype("x") in _CODES


def _scales_given(call):
    if call.given("scales") or not hasattr(call.arrays["x"], "dtype"):
        return
    if call["quant_mode"] == 1:
        raise MissingArgumentError("scales is None, but quant_mode=1 multiplies by scales that you choose; pass them")
    if call["quant_mode"] == 0 and pass_through(call):
        raise MissingArgumentError(f"scales is None, but x of dtype {call.dtype('x')} travels with its own; pass them")


def _unquantised_dtype(call):
    wanted = dtype_name("y_dtype", call["y_dtype"])
    if call["quant_mode"] == 0 and wanted not in (None, call.dtype("x")):
        raise DtypeError(f"y_dtype={wanted!r} must be that of x, {call.dtype('x')}, with quant_mode=0; leave it out")


def _scales_dtype(call):
    if not call.given("scales"):
        return
    dtype, x = call.dtype("scales"), call.dtype("x")
    legal = ("float32",) if not pass_through(call) else _E8M0 if x in _FP4 else ("float32", *_E8M0)
    if dtype not in legal:
        raise DtypeError(f"scales has dtype {dtype}; with x of dtype {x} it must be {' or '.join(legal)}")


def _scales_unused(call):
    mode = call["quant_mode"]
    if not call.given("scales"):
        return
    if mode in (4, 5) or (mode == 0 and not pass_through(call)):
        raise InvalidArgumentError(
            f"scales was given, but quant_mode={mode} takes none for x of dtype {call.dtype('x')}; pass None"
        )


def _quantised_input(call):
    if pass_through(call) and call["quant_mode"]:
        raise InvalidArgumentError(
            f"quant_mode={call['quant_mode']} must be 0 for x of dtype {call.dtype('x')}, which is quantised already"
        )


def _scales_shape(call):
    if not call.given("scales"):
        return
    shape, width, experts = call.shape("scales"), hidden(call), call["moe_expert_num"]
    if call["quant_mode"] == 0:
        check_shape("scales", shape, ((call.shape("x")[0], None),))
        if not 1 <= shape[1] <= width:
            raise ShapeError(f"scales has shape {shape}: {shape[1]} per token must be in [1, {width}], H being {width}")
        return
    rows = experts + (call["shared_expert_num"] if call["shared_expert_rank_num"] else 0)
    legal = ((rows, width),)
    check_shape("scales", shape, legal if call["quant_mode"] != 1 else ((1,), (width,), *legal))


def _even_width(call):
    if call.dtype("x") == "float4_e2m1fn" and hidden(call) % 2:
        raise ShapeError(f"x has shape {call.shape('x')}: H = {hidden(call)} must be even: two values share a byte")


def window_shape(call: Call) -> tuple[int, int]:
    """[W * B * K, bytes of a row]: each rank may send this one all choices of all its tokens."""
    return call["ep_world_size"] * max(1, math.prod(call.shape("expert_ids"))), dispatch_row(call)


def _window_by_rank(call):
    if call.given("window") and call["comm_alg"] == "hierarchy":
        raise UnsupportedError(
            "window was given, but comm_alg='hierarchy' has no exchange between pairs of ranks; pass None, or another "
            "comm_alg"
        )


def _window_or_clock(call):
    if call.given("window") and call.given("performance_info"):
        raise UnsupportedError("window and performance_info were given; a timed exchange writes no window, so pass one")


def _window_shape(call):
    if call.given("window") and call.shape("window") != window_shape(call):
        raise ShapeError(
            f"window has shape {call.shape('window')}; it must be {window_shape(call)} for this call; make it with "
            "moe_jax.aclnn.make_receive_window and the same arguments"
        )


DISPATCH = exchange_operator(
    "moe_distribute_dispatch_v4",
    ("x", "expert_ids", "scales", "x_active_mask", "expert_scales", "elastic_info", "performance_info", "window"),
    ("x", "expert_ids", *NEEDS),
    {
        "x": lambda call: ((None, None),),
        "expert_ids": lambda call: ((call.shape("x")[0], None),),
        "expert_scales": lambda call: (call.shape("expert_ids"),),
    },
    (
        Rule("scales_given", "3.2", _scales_given, NULL, depends_on="quant_mode"),
        Rule("unquantised_dtype", "3.2", _unquantised_dtype, DTYPE),
        Rule("scales_dtype", "3.2", _scales_dtype, DTYPE),
    ),
    (
        Rule("scales_unused", "3.2, 2.10", _scales_unused),
        Rule("quantised_input", "3.2", _quantised_input),
        Rule("scales_shape", "3.1, 3.2", _scales_shape),
        Rule("even_width", "3.2", _even_width),
        Rule("window_by_rank", "12.1", _window_by_rank),
        Rule("window_or_clock", "12.1", _window_or_clock, about="performance_info"),
        Rule("window_shape", "12.1", _window_shape),
    ),
    long_group=(NULL, NULL_POINTER),
    free=("y_dtype",),
)
