"""What combine, and combine with add and RMSNorm, ask of their arguments. Letters as in ``limits_exchange``."""

import math

from moe_jax.aclnn.limits import BAD_PARAMETER, DTYPE, NULL, Rule, check_shape, where
from moe_jax.aclnn.limits_exchange import NEEDS, exchange_operator, hidden, sizes, tokens
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, ShapeError


def _tp_counts_given(call):
    if call["tp_world_size"] == 2 and not call.given("tp_send_counts"):
        raise MissingArgumentError("tp_send_counts is None, but tp_world_size=2 needs it; pass dispatch's")


def _same_dtype(call):
    names = ("shared_expert_x", "ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    dtype = call.dtype("expand_x")
    for name in (*names, "residual_x", "gamma"):
        if call.given(name) and call.dtype(name) != dtype:
            raise DtypeError(f"{name} has dtype {call.dtype(name)}; it must be {dtype}, as expand_x; cast it first")


def _rows(call):
    rows, needed = call.shape("expand_x")[0], sizes(call).capacity * max(call["tp_world_size"], 1)
    if rows < needed:
        raise ShapeError(
            f"expand_x has shape {call.shape('expand_x')}: {rows} rows must be at least {needed}, the capacity A of "
            "these sizes (times tp_world_size); pass the rows as dispatch laid them out"
        )


def _assist_size(call):
    rows = call.shape("expand_x")[0] // max(call["tp_world_size"], 1)
    if math.prod(call.shape("assist_info_for_combine")) < 3 * rows:
        raise ShapeError(
            f"assist_info_for_combine has shape {call.shape('assist_info_for_combine')}; it must have at least "
            f"{3 * rows} elements, three for each of {rows} rows; pass dispatch's"
        )


def _send_counts_size(call):
    size, needed = call.shape("ep_send_counts")[0], call["ep_world_size"] * sizes(call).local_experts
    needed *= max(call["tp_world_size"], 1)
    exact = call.on("a3", "a5")  # elsewhere a tail may follow: scratch of A2's hierarchy
    if size < needed or (exact and size != needed):
        raise ShapeError(
            f"ep_send_counts has shape {call.shape('ep_send_counts')}; it must have {'' if exact else 'at least '}"
            f"{needed} elements, one per rank and local expert; pass dispatch's ep_recv_counts"
        )


def _tp_counts_size(call):
    if call["tp_world_size"] == 2:
        check_shape("tp_send_counts", call.shape("tp_send_counts"), ((2,),))


def _expand_scales_size(call):
    rows = sizes(call).capacity
    if call.given("expand_scales") and call["comm_alg"] == "hierarchy" and call.shape("expand_scales")[0] < rows:
        raise ShapeError(
            f"expand_scales has shape {call.shape('expand_scales')}; hierarchy weights each row, so it must have at "
            f"least {rows} elements; pass dispatch's"
        )


def _empty_weights(call):
    if 0 in call.shape("expert_scales"):
        raise ShapeError(
            f"expert_scales has shape {call.shape('expert_scales')}; an empty one, a sum without weights, is not taken"
            f"{where(call.product)}; pass ones of shape {call.shape('expert_ids')}"
        )


def _weight_shapes(call):
    """[B, K], or empty: a plain sum."""
    shape = call.shape("expert_scales")
    return (call.shape("expert_ids"), shape) if 0 in shape else (call.shape("expert_ids"),)


def _shared_x_without_ranks(call):
    if call.given("shared_expert_x") and call["shared_expert_rank_num"]:
        raise InvalidArgumentError(
            f"shared_expert_x was given with shared_expert_rank_num={call['shared_expert_rank_num']}; it must be 0, "
            "since shared experts run either here or on ranks of their own; pass None"
        )


def _shared_x_shape(call):
    if not call.given("shared_expert_x"):
        return
    shape, num_tokens = call.shape("shared_expert_x"), tokens(call)
    if len(shape) not in (2, 3) or math.prod(shape[:-1]) != num_tokens or shape[-1] != hidden(call):
        raise ShapeError(
            f"shared_expert_x has shape {shape}; it must be {(num_tokens, hidden(call))}, or (a, b, {hidden(call)}), "
            f"a * b = {num_tokens}"
        )


def _special_inputs(call):
    if (call["copy_expert_num"] or call["const_expert_num"]) and not call.given("ori_x"):
        number = "copy_expert_num" if call["copy_expert_num"] else "const_expert_num"
        raise InvalidArgumentError(f"ori_x is None, but {number}={call[number]} experts read the tokens; pass them")
    for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
        if call["const_expert_num"] and not call.given(name):
            raise InvalidArgumentError(f"{name} is None, but const_expert_num={call['const_expert_num']} needs it")


def _const_shapes(call):
    num, width = call["const_expert_num"], hidden(call)
    names = ("const_expert_alpha_1", "const_expert_alpha_2")
    for name in filter(call.given, names):
        check_shape(name, call.shape(name), ((num,), (num, width)))
    if all(map(call.given, names)) and call.shape(names[0]) != call.shape(names[1]):
        raise ShapeError(
            f"const_expert_alpha_2 has shape {call.shape(names[1])}; it must be {call.shape(names[0])}, as "
            "const_expert_alpha_1: both plain or both gates"
        )


def _quantised_wire_without_tp(call):
    if call["comm_quant_mode"] and call["tp_world_size"] == 2:
        raise InvalidArgumentError(
            f"comm_quant_mode={call['comm_quant_mode']} must be 0 with tp_world_size=2, where rows are added on the way"
        )


def _norm_eps(call):
    eps = call["norm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not (0 <= eps < math.inf):
        raise InvalidArgumentError(f"norm_eps={eps!r} must be a number of at least 0, such as 1e-6")


_ROWS = ("expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales")
_OPTIONAL = (
    "tp_send_counts", "x_active_mask", "activation_scale", "weight_scale", "group_list", "expand_scales",
    "shared_expert_x", "elastic_info", "ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v",
)  # fmt: skip
_COMBINE_SHAPES = {
    "expand_x": lambda call: ((None, None),),
    "expert_ids": lambda call: ((None, None),),
    "ep_send_counts": lambda call: ((None,),),
    "expert_scales": _weight_shapes,
    "expand_scales": lambda call: ((None,),),
    "ori_x": lambda call: ((tokens(call), hidden(call)),),
    "const_expert_v": lambda call: ((call["const_expert_num"], hidden(call)),),
}
_COMBINE_BEFORE = (
    Rule("tp_counts_given", "9.1", _tp_counts_given, NULL, depends_on="tp_world_size"),
    Rule("same_dtype", "9.1", _same_dtype, DTYPE),
)
_COMBINE_AFTER = (
    Rule("rows", "2.3", _rows),
    Rule("assist_size", "2.2", _assist_size),
    Rule("send_counts_size", "2.2", _send_counts_size),
    Rule("tp_counts_size", "9.1", _tp_counts_size),
    Rule("expand_scales_size", "9.1", _expand_scales_size),
    Rule("empty_weights", "9.1", _empty_weights, products=("a2", "a3")),
    Rule("shared_x_without_ranks", "9.1, 9.5", _shared_x_without_ranks),
    Rule("shared_x_shape", "9.1", _shared_x_shape),
    Rule("special_inputs", "5, 9.5", _special_inputs, about="ori_x"),
    Rule("const_shapes", "5", _const_shapes, about="const_expert_v"),
    Rule("quantised_wire_without_tp", "9.5", _quantised_wire_without_tp),
)

COMBINE = exchange_operator(
    "moe_distribute_combine_v4",
    (*_ROWS, *_OPTIONAL, "performance_info"),
    (*_ROWS, *NEEDS),
    _COMBINE_SHAPES,
    _COMBINE_BEFORE,
    _COMBINE_AFTER,
)
ADD_RMS_NORM = exchange_operator(
    "moe_distribute_combine_add_rms_norm_v2",
    (*_ROWS, "residual_x", "gamma", *_OPTIONAL),
    (*_ROWS, "residual_x", "gamma", *NEEDS),
    {
        **_COMBINE_SHAPES,
        "residual_x": lambda call: ((tokens(call), 1, hidden(call)),),
        "gamma": lambda call: ((hidden(call),),),
    },
    _COMBINE_BEFORE,
    (
        *_COMBINE_AFTER[:5],
        Rule("empty_weights", "9.1", _empty_weights, products=("a3",)),
        *_COMBINE_AFTER[6:],
        Rule("norm_eps", "10", _norm_eps),
    ),
    free=("norm_eps",),
    missing_product=BAD_PARAMETER,
)
