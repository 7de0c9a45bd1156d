"""What dispatch, combine and combine with add and RMSNorm all ask of their arguments.

B tokens per rank, H hidden, K choices, W ranks, S of them for Ns shared experts, E routed experts, L per rank, T the
tensor-parallel size. Sections are those of the reference sheet.
"""

from typing import Any

from moe_jax.aclnn.limits import Call, Operator, Rule, group_size_rule, where
from moe_jax.errors import InvalidArgumentError, ShapeError, UnsupportedError
from moe_jax.hardware.ascend import PRODUCTS, Sizes, megabytes

MAX_IDS = 2**31 - 1  # ids are int32
NEEDS = ("group_ep", "ep_world_size", "moe_expert_num")  # attributes without a default


def _rows_of(arrays):
    """The array that has H columns."""
    return "x" if "x" in arrays else "expand_x"


def tokens(call: Call) -> int:
    """B."""
    return call.shape("expert_ids")[0]


def hidden(call: Call) -> int:
    """H. Packed e2m1 has two columns per byte."""
    name = _rows_of(call.arrays)
    return call.shape(name)[1] * (2 if call.dtype(name) == "uint8" else 1)


def sizes(call: Call) -> Sizes:
    """The numbers of a call whose relations have been checked."""
    names = ("ep_world_size", "moe_expert_num", "shared_expert_num", "shared_expert_rank_num", "tp_world_size")
    num_tokens, top_k = call.shape("expert_ids")
    return Sizes(
        tokens=num_tokens,
        hidden=hidden(call),
        top_k=top_k,
        global_bs=call["global_bs"],
        **{name: call[name] for name in names},
    )


def _shared_below_world(call):
    ranks, world = call["shared_expert_rank_num"], call["ep_world_size"]
    if ranks >= world:
        raise InvalidArgumentError(
            f"shared_expert_rank_num={ranks} must be below ep_world_size={world}, since routed experts need ranks too; "
            f"at most {world - 1}"
        )


def _shared_split(call):
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


def _experts_split(call):
    experts, ranks = call["moe_expert_num"], call["ep_world_size"] - call["shared_expert_rank_num"]
    if experts % ranks:
        below = experts - experts % ranks
        raise InvalidArgumentError(
            f"moe_expert_num={experts} must be a multiple of {ranks} = ep_world_size - shared_expert_rank_num; "
            f"the nearest legal value is {below if below and experts - below <= ranks // 2 else below + ranks}"
        )


def _num_ids(call):
    return sum(call[f"{kind}_expert_num"] for kind in ("moe", "zero", "copy", "const"))


def _ids_total(call):
    total = _num_ids(call)
    if total > MAX_IDS:
        names = [f"{kind}_expert_num" for kind in ("moe", "zero", "copy", "const")]
        parts = " + ".join(f"{name}={call[name]}" for name in names)
        raise InvalidArgumentError(f"{parts} = {total} ids must be at most {MAX_IDS}, since ids are int32")


def _top_k_of_ids(call):
    top_k, total = call.shape("expert_ids")[1], _num_ids(call)
    if top_k > total:
        raise ShapeError(
            f"expert_ids has shape {call.shape('expert_ids')}: K = {top_k} choices per token, but there are only "
            f"{total} ids (moe + zero + copy + const experts); K is at most {total}"
        )


def _global_bs(call):
    value, tokens, world = call["global_bs"], call.shape("expert_ids")[0], call["ep_world_size"]
    if value and (value < tokens * world or value % world):
        nearest = max(tokens * world, round(value / world) * world)
        raise InvalidArgumentError(
            f"global_bs={value} must be 0, or the most tokens of any rank times ep_world_size={world}: a multiple of "
            f"it, at least {tokens * world}; the nearest legal value is {nearest}"
        )


def _groups_differ(call):
    if call["group_tp"] and call["group_tp"] == call["group_ep"]:
        raise InvalidArgumentError(
            f"group_tp={call['group_tp']!r} must differ from group_ep; the two exchanges run over different axes"
        )
    if call["tp_world_size"] == 2 and not call["group_tp"]:
        raise InvalidArgumentError("group_tp='' must name a mesh axis with tp_world_size=2; pass it")


def _one_expert_with_tp(call):
    """On every product with two tp ranks its own table says so."""
    if call.product is None and call["tp_world_size"] == 2 and sizes(call).local_experts != 1:
        raise ShapeError(
            f"{_experts(call)}: {sizes(call).local_experts} experts per rank must be 1 with tp_world_size=2, since own "
            "rows stand before the peer's and not expert by expert; moe_jax.dispatch takes more"
        )


def _performance_info_by_rank(call):
    if call.given("performance_info") and call["comm_alg"] == "hierarchy":
        raise UnsupportedError(
            f"performance_info was given, with shape {call.shape('performance_info')}, but with comm_alg='hierarchy' "
            "rows come through another rank of the node, which hides whose they are; pass None, or comm_alg=''"
        )


def _buffer(call):
    limits = PRODUCTS[call.product].operators[call.operator].under(call["comm_alg"])
    needed = megabytes(limits.buffer(sizes(call)))
    if call["hccl_buffsize"] < needed:
        raise InvalidArgumentError(
            f"hccl_buffsize={call['hccl_buffsize']} MB is too small for this call{where(call.product)}: it needs "
            f"{needed} MB; set HCCL_BUFFSIZE and hccl_buffsize to {needed}"
        )


def _buffer_rules(operator):
    """One per product and comm_alg that has a formula of its own."""
    rules = []
    for product in PRODUCTS.values():
        base = product.operators.get(operator)
        for alg, limits in {} if base is None else {"": base, **base.variants}.items():
            if not alg or limits.buffer is not base.buffer:
                rules.append(_buffer_rule(product.name, alg, tuple(base.variants)))
    return tuple(rules)


def _buffer_rule(product, alg, variants):
    def check(call):
        if (call["comm_alg"] if call["comm_alg"] in variants else "") == alg:
            _buffer(call)

    return Rule(f"buffer@{alg}" if alg else "buffer", "8", check, products=(product,))


def exchange_operator(name: str, arrays, needs, shapes, before, after, **others: Any) -> Operator:
    """One of the three: ``before`` are its rules on null pointers and dtypes, ``after`` those on everything else."""
    relations = (
        Rule("shared_below_world", "2.2", _shared_below_world),
        Rule("shared_split", "2.2", _shared_split),
        Rule("experts_split", "2.2", _experts_split),
        Rule("ids_total", "1", _ids_total),
        Rule("top_k_of_ids", "2.2", _top_k_of_ids),
        Rule("global_bs_relation", "2.2", _global_bs),
        group_size_rule("group_ep", "ep_world_size", "2.2"),
        group_size_rule("group_tp", "tp_world_size", "2.2", is_used=lambda call: call["tp_world_size"] > 0),
        Rule("groups_differ", "2.2, 15", _groups_differ, depends_on="tp_world_size"),
        Rule("local_experts_with_tp", "2.2, 2.9", _one_expert_with_tp),
    )
    performance = {}
    if "performance_info" in arrays:
        performance = {"performance_info": lambda call: ((call["ep_world_size"],),)}
        relations += (Rule("performance_info_by_rank", "7", _performance_info_by_rank, about="performance_info"),)
    width = _rows_of(arrays)
    return Operator(
        arrays=arrays,
        needs=needs,
        group="group_ep",
        shapes={
            **shapes,
            "x_active_mask": lambda call: ((tokens(call),), call.shape("expert_ids")),
            "elastic_info": lambda call: ((4 + 2 * call["ep_world_size"],),),
            **performance,
        },
        quantities={
            "tokens": lambda call: (f"expert_ids with shape {call.shape('expert_ids')}", tokens(call)),
            "top_k": lambda call: (f"expert_ids with shape {call.shape('expert_ids')}", call.shape("expert_ids")[1]),
            "hidden": lambda call: (f"{width} with shape {call.shape(width)}", hidden(call)),
            "local_experts": lambda call: (_experts(call), sizes(call).local_experts),
            "local_experts_with_tp": lambda call: (
                (_experts(call), sizes(call).local_experts) if call["tp_world_size"] == 2 else None
            ),
            "experts_by_ranks": lambda call: (_experts(call), sizes(call).local_experts * call["ep_world_size"]),
            "mask_dims": lambda call: (
                (f"x_active_mask with shape {call.shape('x_active_mask')}", len(call.shape("x_active_mask")))
                if call.given("x_active_mask")
                else None
            ),
            "tp_world_size_with_elastic": lambda call: (
                ("tp_world_size, elastic_info", call["tp_world_size"]) if call.given("elastic_info") else None
            ),
        },
        rules=(*before, *relations),
        last_rules=(*after, *_buffer_rules(name)),
        **others,
    )


def _experts(call):
    names = ("moe_expert_num", "ep_world_size", "shared_expert_rank_num")
    return ", ".join(f"{name}={call[name]}" for name in names)
