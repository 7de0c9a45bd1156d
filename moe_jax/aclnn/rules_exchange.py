"""What dispatch, combine, and combine with add and RMSNorm ask of their arguments.

Letters: B tokens per rank, H hidden size, K choices, W ranks, S of them for Ns shared experts, E routed experts, L of
them per rank, T the tensor-parallel size. A rule begins with its name and the section of the CANN sheet that it is
from.
"""

import dataclasses
import math
from typing import Any

from moe_jax.aclnn.rules import (
    BAD_PARAMETER,
    DTYPE,
    GIVEN,
    NONZERO,
    NULL,
    NULL_POINTER,
    Call,
    Rule,
    Rules,
    at_least,
    check_shape,
    dtype_name,
    extent,
    forbids,
    group_size,
    one_of_dtypes,
    refuses,
    requires,
    same_dtype,
    shown,
)
from moe_jax.aclnn.workspace import dispatch_row, hidden, sizes, tokens
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, ShapeError, UnsupportedError
from moe_jax.hardware.ascend import E8M0, FLOATS, FP4, FP8

_MAX_IDS = 2**31 - 1  # ids are int32
_KINDS = ("moe_expert_num", "zero_expert_num", "copy_expert_num", "const_expert_num")


# What all three ask.


def _experts(call: Call) -> str:
    """Where the number of experts per rank follows from, in words."""
    names = ("moe_expert_num", "ep_world_size", "shared_expert_rank_num")
    return ", ".join(f"{name}={call[name]}" for name in names)


def _local_experts(call: Call) -> tuple[str, int]:
    return _experts(call), sizes(call).local_experts


def _num_ids(call: Call) -> int:
    """How many expert ids there are, routed and weightless."""
    return sum(call[name] for name in _KINDS)


def _shared_split(call: Call) -> None:
    ranks, experts = call["shared_expert_rank_num"], call["shared_expert_num"]
    if not ranks and experts > 1:
        raise InvalidArgumentError(
            f"shared_expert_num={experts} must be 0 or 1 with shared_expert_rank_num=0, where 1 means none; pass 1"
        )
    if ranks and (not experts or ranks % experts):
        raise InvalidArgumentError(
            f"shared_expert_num={experts} must divide shared_expert_rank_num={ranks}, so that each shared expert has "
            f"as many ranks; pass one of {[n for n in range(1, ranks + 1) if ranks % n == 0][:8]}"
        )


def _experts_split(call: Call) -> None:
    experts, ranks = call["moe_expert_num"], call["ep_world_size"] - call["shared_expert_rank_num"]
    if experts % ranks:
        below = experts - experts % ranks
        raise InvalidArgumentError(
            f"moe_expert_num={experts} must be a multiple of {ranks} = ep_world_size - shared_expert_rank_num; "
            f"the nearest legal value is {below if below and experts - below <= ranks // 2 else below + ranks}"
        )


def _global_bs(call: Call) -> None:
    value, world = call["global_bs"], call["ep_world_size"]
    least = tokens(call) * world
    if value and (value < least or value % world):
        raise InvalidArgumentError(
            f"global_bs={value} must be 0, or the most tokens of any rank times ep_world_size={world}: a multiple of "
            f"it, at least {least}; the nearest legal value is {max(least, round(value / world) * world)}"
        )


_RELATIONS = (
    at_least(
        "shared_below_world", "2.2",
        lambda call: call["ep_world_size"] - 1, lambda call: call["shared_expert_rank_num"],
        "shared_expert_rank_num={needed} must be below ep_world_size={ep_world_size}, since routed experts need ranks "
        "too; at most {found}",
    ),
    Rule("shared_split", "2.2", _shared_split),
    Rule("experts_split", "2.2", _experts_split),
    at_least(
        "ids_total", "1", lambda call: _MAX_IDS, _num_ids,
        " + ".join(f"{name}={{{name}}}" for name in _KINDS)
        + " = {needed} ids must be at most {found}, since ids are int32",
    ),
    at_least(
        "top_k_of_ids", "2.2", _num_ids, lambda call: call.shape("expert_ids")[1],
        "expert_ids has shape {expert_ids.shape}: K = {needed} choices per token, but there are only {found} ids "
        "(moe + zero + copy + const experts); K is at most {found}",
        error=ShapeError,
    ),
    Rule("global_bs_relation", "2.2", _global_bs),
    group_size("2.2", "group_ep", "ep_world_size"),
    group_size("2.2", "group_tp", "tp_world_size", lambda call: call["tp_world_size"] > 0),
    refuses(
        "groups_differ", "2.2, 15", lambda call: call["group_tp"] and call["group_tp"] == call["group_ep"],
        "group_tp={group_tp!r} must differ from group_ep; the two exchanges run over different axes",
        depends_on="tp_world_size",
    ),
    refuses(
        "groups_differ", "2.2, 15", {"tp_world_size": 2, "group_tp": ("", ())},
        "group_tp='' must name a mesh axis with tp_world_size=2; pass it",
        depends_on="tp_world_size",
    ),
    refuses(  # only without a product: products with two tp ranks have this in their own tables
        "local_experts_with_tp", "2.2, 2.9",
        lambda call: call.product is None and call["tp_world_size"] == 2 and sizes(call).local_experts != 1,
        "{experts}: {local} experts per rank must be 1 with tp_world_size=2, since own rows stand before the peer's "
        "and not expert by expert; moe_jax.dispatch takes more",
        ShapeError, words={"experts": _experts, "local": lambda call: sizes(call).local_experts},
    ),
    forbids(
        "performance_info_by_rank", "7", "performance_info", {"comm_alg": "hierarchy"},
        "performance_info was given, with shape {performance_info.shape}, but with comm_alg='hierarchy' rows come "
        "through another rank of the node, which hides whose they are; pass None, or comm_alg=''",
        error=UnsupportedError,
    ),
)  # fmt: skip
_LETTERS = {
    "W": lambda call: call["ep_world_size"],
    "4+2W": lambda call: 4 + 2 * call["ep_world_size"],
    "Cc": lambda call: call.attributes["const_expert_num"],
}
_SHAPES = {"x_active_mask": "B | B K", "elastic_info": "4+2W", "performance_info": "W"}
_QUANTITIES = {
    "tokens": ("B, tokens per rank", extent("expert_ids", 0)),
    "top_k": ("K, choices per token", extent("expert_ids", 1)),
    "local_experts": ("L, experts per rank", _local_experts),
    "local_experts_with_tp": (
        "L, experts per rank, with tp_world_size=2",
        lambda call: _local_experts(call) if call["tp_world_size"] == 2 else None,
    ),
    "experts_by_ranks": (
        "experts per rank times ranks",
        lambda call: (_experts(call), sizes(call).local_experts * call["ep_world_size"]),
    ),
    "mask_dims": (
        "dimensions of x_active_mask",
        lambda call: (
            (shown(call, "x_active_mask"), len(call.shape("x_active_mask"))) if call.given("x_active_mask") else None
        ),
    ),
    "tp_world_size_with_elastic": (
        "tp_world_size with elastic_info",
        lambda call: ("tp_world_size, elastic_info", call["tp_world_size"]) if call.given("elastic_info") else None,
    ),
}


# Dispatch.

_CODES = (*FP8, *FP4)  # dtypes of rows that are quantised already


def _scales_given(call: Call) -> None:
    if call.given("scales") or not hasattr(call.arrays["x"], "dtype"):
        return
    if call["quant_mode"] == 1:
        raise MissingArgumentError("scales is None, but quant_mode=1 multiplies by scales that you choose; pass them")
    if call["quant_mode"] == 0 and call.dtype("x") in _CODES:
        raise MissingArgumentError(f"scales is None, but x of dtype {call.dtype('x')} travels with its own; pass them")


def _wanted_dtype(call: Call) -> str | None:
    """The dtype of rows that y_dtype asks for. What is no dtype is refused here, whatever quant_mode is."""
    return dtype_name("y_dtype", call["y_dtype"])


def _dtypes_of_scales(call: Call) -> tuple[str, ...]:
    x = call.dtype("x")
    return ("float32",) if x not in _CODES else E8M0 if x in FP4 else ("float32", *E8M0)


def _scales_shape(call: Call) -> None:
    if not call.given("scales"):
        return
    shape, width = call.shape("scales"), hidden(call)
    if call["quant_mode"] == 0:
        check_shape("scales", shape, ((call.shape("x")[0], None),))
        if not 1 <= shape[1] <= width:
            raise ShapeError(f"scales has shape {shape}: {shape[1]} per token must be in [1, {width}], H being {width}")
        return
    shared = call["shared_expert_num"] if call["shared_expert_rank_num"] else 0
    legal = ((call["moe_expert_num"] + shared, width),)
    check_shape("scales", shape, legal if call["quant_mode"] != 1 else ((1,), (width,), *legal))


def window_shape(call: Call) -> tuple[int, int]:
    """[W * B * K, bytes of a row]: each rank may send this one all choices of all its tokens."""
    return call["ep_world_size"] * max(1, math.prod(call.shape("expert_ids"))), dispatch_row(call)


_SCALES_UNUSED = "scales was given, but quant_mode={quant_mode} takes none for x of dtype {x.dtype}; pass None"

DISPATCH = Rules(
    group="group_ep",
    long_group=(NULL, NULL_POINTER),
    more_arrays=("window",),
    letters=_LETTERS,
    shapes={"x": "B H", "expert_ids": "B K", "expert_scales": "B K", **_SHAPES},
    quantities={**_QUANTITIES, "hidden": ("H, the hidden size", lambda call: (shown(call, "x"), hidden(call)))},
    rules=(
        Rule("scales_given", "3.2", _scales_given, stage=NULL, depends_on="quant_mode"),
        refuses(
            "unquantised_dtype", "3.2",
            lambda call: _wanted_dtype(call) not in (None, call.dtype("x")) and call["quant_mode"] == 0,
            "y_dtype={wanted!r} must be that of x, {x.dtype}, with quant_mode=0; leave it out",
            DtypeError, words={"wanted": _wanted_dtype}, stage=DTYPE,
        ),
        one_of_dtypes(
            "scales_dtype", "3.2", ("scales",), _dtypes_of_scales, "with x of dtype {x.dtype} it must be {legal}"
        ),
        *_RELATIONS,
    ),
    last_rules=(
        forbids("scales_unused", "3.2, 2.10", "scales", {"quant_mode": (4, 5)}, _SCALES_UNUSED),
        forbids("scales_unused", "3.2, 2.10", "scales", {"quant_mode": 0, "x.dtype": FLOATS}, _SCALES_UNUSED),
        refuses(
            "quantised_input", "3.2", {"quant_mode": NONZERO, "x.dtype": _CODES},
            "quant_mode={quant_mode} must be 0 for x of dtype {x.dtype}, which is quantised already",
        ),
        Rule("scales_shape", "3.1, 3.2", _scales_shape),
        refuses(
            "even_width", "3.2", lambda call: call.dtype("x") == "float4_e2m1fn" and hidden(call) % 2,
            "x has shape {x.shape}: H = {hidden} must be even: two values share a byte",
            ShapeError, words={"hidden": hidden},
        ),
        forbids(
            "window_by_rank", "12.1", "window", {"comm_alg": "hierarchy"},
            "window was given, but comm_alg='hierarchy' has no exchange between pairs of ranks; pass None, or another "
            "comm_alg",
            error=UnsupportedError,
        ),
        forbids(
            "window_or_clock", "12.1", "window", {"performance_info": GIVEN},
            "window and performance_info were given; a timed exchange writes no window, so pass one",
            error=UnsupportedError,
        ),
        refuses(
            "window_shape", "12.1", lambda call: call.given("window") and call.shape("window") != window_shape(call),
            "window has shape {window.shape}; it must be {needed} for this call; make it with "
            "moe_jax.aclnn.make_receive_window and the same arguments",
            ShapeError, words={"needed": window_shape},
        ),
    ),
)  # fmt: skip


# Combine, without and with add and RMSNorm.

_ALPHAS = ("const_expert_alpha_1", "const_expert_alpha_2")
_CONST = (*_ALPHAS, "const_expert_v")


def _rows_of_lane(call: Call) -> int:
    """The number of rows of one tp rank."""
    return call.shape("expand_x")[0] // max(call["tp_world_size"], 1)


def _send_counts_size(call: Call) -> None:
    size, needed = call.shape("ep_send_counts")[0], call["ep_world_size"] * sizes(call).local_experts
    needed *= max(call["tp_world_size"], 1)
    exact = call.product in ("a3", "a5")  # elsewhere more may follow: the scratch of A2's hierarchy
    if size < needed or (exact and size != needed):
        raise ShapeError(
            f"ep_send_counts has shape {call.shape('ep_send_counts')}; it must have {'' if exact else 'at least '}"
            f"{needed} elements, one per rank and local expert; pass dispatch's ep_recv_counts"
        )


def _weights(call: Call) -> str:
    """[B, K], or any empty shape, with which the sum is unweighted."""
    shape = call.shape("expert_scales")
    return f"B K | {' '.join(map(str, shape))}" if 0 in shape else "B K"


def _is_tokens_by_hidden(call: Call) -> bool:
    """Whether shared_expert_x is [B, H], or [a, b, H] with a * b = B."""
    shape = call.shape("shared_expert_x")
    return len(shape) in (2, 3) and math.prod(shape[:-1]) == tokens(call) and shape[-1] == hidden(call)


def _const_shapes(call: Call) -> None:
    num, width = call["const_expert_num"], hidden(call)
    for name in filter(call.given, _ALPHAS):
        check_shape(name, call.shape(name), ((num,), (num, width)))
    first, second = _ALPHAS
    if call.given(first) and call.given(second) and call.shape(first) != call.shape(second):
        raise ShapeError(
            f"{second} has shape {call.shape(second)}; it must be {call.shape(first)}, as {first}: both plain or both "
            "gates"
        )


def _is_small_number(value: Any) -> bool:
    """Whether ``value`` may be added to a mean of squares: whether it is finite and at least 0."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < math.inf


_COMBINE_LAST = (
    at_least(
        "rows", "2.3", lambda call: call.shape("expand_x")[0],
        lambda call: sizes(call).capacity * max(call["tp_world_size"], 1),
        "expand_x has shape {expand_x.shape}: {found} rows must be at least {needed}, the capacity A of these sizes "
        "(times tp_world_size); pass the rows as dispatch laid them out",
        error=ShapeError,
    ),
    at_least(
        "assist_size", "2.2",
        lambda call: math.prod(call.shape("assist_info_for_combine")), lambda call: 3 * _rows_of_lane(call),
        "assist_info_for_combine has shape {assist_info_for_combine.shape}; it must have at least {needed} elements, "
        "three for each of {rows} rows; pass dispatch's",
        error=ShapeError, more_words={"rows": _rows_of_lane},
    ),
    Rule("send_counts_size", "2.2", _send_counts_size),
    refuses(
        "tp_counts_size", "9.1", lambda call: call["tp_world_size"] == 2 and call.shape("tp_send_counts") != (2,),
        "tp_send_counts has shape {tp_send_counts.shape}; it must be (2,), a count per tp rank; pass dispatch's",
        ShapeError,
    ),
    at_least(
        "expand_scales_size", "9.1", lambda call: call.shape("expand_scales")[0], lambda call: sizes(call).capacity,
        "expand_scales has shape {expand_scales.shape}; hierarchy weights each row, so it must have at least {needed} "
        "elements; pass dispatch's",
        error=ShapeError, when={"expand_scales": GIVEN, "comm_alg": "hierarchy"},
    ),
    refuses(
        "empty_weights", "9.1", lambda call: 0 in call.shape("expert_scales"),
        "expert_scales has shape {expert_scales.shape}; an empty one, a sum without weights, is not taken{on}; pass "
        "ones of shape {expert_ids.shape}",
        ShapeError, products=("a2", "a3"),
    ),
    forbids(
        "shared_x_without_ranks", "9.1, 9.5", "shared_expert_x", {"shared_expert_rank_num": NONZERO},
        "shared_expert_x was given with shared_expert_rank_num={shared_expert_rank_num}; it must be 0, since shared "
        "experts run either here or on ranks of their own; pass None",
    ),
    refuses(
        "shared_x_shape", "9.1", lambda call: call.given("shared_expert_x") and not _is_tokens_by_hidden(call),
        "shared_expert_x has shape {shared_expert_x.shape}; it must be ({tokens}, {hidden}), or (a, b, {hidden}), "
        "a * b = {tokens}",
        ShapeError, words={"tokens": tokens, "hidden": hidden},
    ),
    *(
        requires(
            "special_inputs", "5, 9.5", "ori_x", {number: NONZERO},
            f"ori_x is None, but {number}={{{number}}} experts read the tokens; pass them",
        )
        for number in ("copy_expert_num", "const_expert_num")
    ),
    *(
        requires(
            "special_inputs", "5, 9.5", name, {"const_expert_num": NONZERO},
            f"{name} is None, but const_expert_num={{const_expert_num}} needs it",
        )
        for name in _CONST
    ),
    Rule("const_shapes", "5", _const_shapes),
    refuses(
        "quantised_wire_without_tp", "9.5", {"comm_quant_mode": NONZERO, "tp_world_size": 2},
        "comm_quant_mode={comm_quant_mode} must be 0 with tp_world_size=2, where rows are added on the way",
    ),
)  # fmt: skip

COMBINE = Rules(
    group="group_ep",
    letters=_LETTERS,
    shapes={
        "expand_x": "A H",
        "expert_ids": "B K",
        "ep_send_counts": "counts",
        "expert_scales": _weights,
        "expand_scales": "weights",
        "ori_x": "B H",
        "const_expert_v": "Cc H",
        "residual_x": "B 1 H",
        "gamma": "H",
        **_SHAPES,
    },
    quantities={**_QUANTITIES, "hidden": ("H, the hidden size", extent("expand_x", 1))},
    rules=(
        requires(
            "tp_counts_given", "9.1", "tp_send_counts", {"tp_world_size": 2},
            "tp_send_counts is None, but tp_world_size=2 needs it; pass dispatch's",
            error=MissingArgumentError, stage=NULL, depends_on="tp_world_size",
        ),
        same_dtype("same_dtype", "9.1", ("shared_expert_x", "ori_x", *_CONST, "residual_x", "gamma"), "expand_x"),
        *_RELATIONS,
    ),
    last_rules=_COMBINE_LAST,
)  # fmt: skip
_NORM_EPS = refuses(
    "norm_eps", "10", lambda call: not _is_small_number(call["norm_eps"]),
    "norm_eps={norm_eps!r} must be a number of at least 0, such as 1e-6",
)  # fmt: skip
ADD_RMS_NORM = dataclasses.replace(COMBINE, last_rules=(*_COMBINE_LAST, _NORM_EPS), missing_product=BAD_PARAMETER)
