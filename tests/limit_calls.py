"""Legal calls of every first phase, on every product: what the rows of ``limit_rows`` change."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax import _compat, aclnn
from moe_jax.hardware.ascend import lacking, newest_of

NULL, DTYPE, VALUE = 161001, 161002, 561002
MB = 2**20
GROUP_127, GROUP_128 = "g" * 127, "g" * 128

DISPATCH, COMBINE = "moe_distribute_dispatch_v4", "moe_distribute_combine_v4"
NORM = "moe_distribute_combine_add_rms_norm_v2"
DISPATCH_3, COMBINE_3 = "moe_distribute_dispatch_v3", "moe_distribute_combine_v3"  # unlike V4 they may be elastic
UPDATE, BARRIER, BARRIER_2 = "moe_update_expert", "distribute_barrier", "distribute_barrier_v2"
RESET = "moe_distribute_buffer_reset"
GA, AG = "grouped_mat_mul_allto_allv", "allto_allv_grouped_mat_mul"
QGA, QAG = "quant_grouped_mat_mul_allto_allv", "allto_allv_quant_grouped_mat_mul"
EXCHANGE, COMBINES = (DISPATCH, COMBINE, NORM), (COMBINE, NORM)
DISPATCH_COMBINE, FUSED, QUANTISED = (DISPATCH, COMBINE), (GA, AG), (QGA, QAG)
ALL_FUSED = FUSED + QUANTISED


def array(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


EXCHANGE_SIZES = {
    "a2": {"B": 8, "H": 64, "K": 2, "W": 16, "E": 32},
    "a3": {"B": 8, "H": 1024, "K": 4, "W": 8, "E": 32},
    "a5": {"B": 8, "H": 1024, "K": 4, "W": 8, "E": 32},
    None: {"B": 4, "H": 16, "K": 2, "W": 4, "E": 8},
}
CONST = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
NO_EXTRAS = {"S": 0, "NS": 1, "T": 0, "Z": 0, "CP": 0, "CC": 0, "BS": 0, "ALG": "", "DTYPE": "bfloat16"}


def exchange_call(operator, product, **changes):
    """A legal call of dispatch or a combine; every shape follows from the sizes."""
    n = {**EXCHANGE_SIZES[product], **NO_EXTRAS}
    one_each = changes.get("T") == 2 and "E" not in changes  # two tp ranks go with one expert per rank
    n.update({key: changes.pop(key) for key in list(changes) if key in n})
    n["E"] = max(n["W"] - n["S"], 1) if one_each else n["E"]
    B, H, K, W, E, S, T = (n[key] for key in ["B", "H", "K", "W", "E", "S", "T"])
    call = {
        "expert_ids": array((B, K), "int32"),
        "group_ep": "ep",
        "ep_world_size": W,
        "moe_expert_num": E,
        "group_tp": "tp" if T == 2 else "",
        "tp_world_size": T,
        "shared_expert_num": n["NS"],
        "shared_expert_rank_num": S,
        "global_bs": n["BS"],
        "comm_alg": n["ALG"],
        "zero_expert_num": n["Z"],
        "copy_expert_num": n["CP"],
        "const_expert_num": n["CC"],
        "product": product,
        "hccl_buffsize": 10**9,
    }
    local = E // (W - S) if W > S else 1
    rows = (n["BS"] // W if n["BS"] and W else B) * max(W, 0) * min(local, K)
    if S and n["NS"]:
        rows = max(rows, (n["BS"] // W if n["BS"] else B) * math.ceil(W * n["NS"] / S))
    if operator == DISPATCH:
        call["x"] = array((B, H), n["DTYPE"])
        if n["ALG"] == "hierarchy":
            call["expert_scales"] = array((B, K))
    else:
        call |= {
            "expand_x": array((rows * max(T, 1), H), n["DTYPE"]),
            "assist_info_for_combine": array((rows * 128,), "int32"),
            "ep_send_counts": array((max(W, 0) * local * max(T, 1),), "int32"),
            "expert_scales": array((B, K)),
            "tp_send_counts": array((2,), "int32") if T == 2 else None,
            "expand_scales": array((rows,)) if n["ALG"] == "hierarchy" else None,
        }
        if n["CP"] > 0 or n["CC"] > 0:
            call["ori_x"] = array((B, H), n["DTYPE"])
        if n["CC"] > 0:
            call |= {name: array((n["CC"], H), n["DTYPE"]) for name in CONST}
    if operator == NORM:
        call |= {"residual_x": array((B, 1, H), n["DTYPE"]), "gamma": array((H,), n["DTYPE"])}
    return {**call, **changes}


def update_call(operator, product, **changes):
    n = {"B": 8, "K": 2, "E": 8, "F": 3, "W": 4, "MODE": 0, "PRUNE": False}
    n.update({key: changes.pop(key) for key in list(changes) if key in n})
    call = {
        "expert_ids": array((n["B"], n["K"]), "int32"),
        "eplb_table": array((n["E"], n["F"]), "int32"),
        "world_size": n["W"],
        "balance_mode": n["MODE"],
        "product": product,
    }
    if n["PRUNE"]:
        call |= {"expert_scales": array((n["B"], n["K"])), "pruning_threshold": array((n["K"],))}
    return {**call, **changes}


def barrier_call(operator, product, **changes):
    return {"x_ref": array((3, 5)), "group": "sync", "world_size": 8, "product": product, **changes}


def reset_call(operator, product, **changes):
    world = changes.pop("W", 16)
    call = {"elastic_info": array((world,), "int32"), "window": array((64,), "int32"), "group_ep": "ep"}
    return {**call, "ep_world_size": world, "need_sync": 1, "product": product, **changes}


FUSED_SIZES = {
    "a3": {"R": 8, "e": 2, "H1": 8192, "N1": 64, "ROWS": 128},  # 2 * 128 * 8192 * 2 bytes = 4 MB per peer
    "a5": {"R": 8, "e": 2, "H1": 64, "N1": 64, "ROWS": 4},
    None: {"R": 2, "e": 2, "H1": 64, "N1": 16, "ROWS": 3},
}

FUSED_EXTRAS = {"MM": 0, "H2": 64, "N2": 16, "DTYPE": "bfloat16", "TRANS": False, "QMODE": 6, "COUNTS": None}
FUSED_EXTRAS |= {"GMM_NDIM": 2, "MM_NDIM": 2}


def fused_call(operator, product, **changes):
    """A legal call of a fused operator; ROWS per (peer, expert), MM the rows of mm_x where there are any."""
    n = {**FUSED_SIZES[product], **FUSED_EXTRAS}
    if operator in QUANTISED:
        n["DTYPE"] = "float8_e4m3fn"
    n.update({key: changes.pop(key) for key in list(changes) if key in n})
    R, e, H1, N1, H2, N2 = (n[key] for key in ["R", "e", "H1", "N1", "H2", "N2"])
    counts = n["COUNTS"] or [n["ROWS"]] * (max(R, 0) * e)
    call = {
        "gmm_x": array((sum(counts), H1, 1)[: n["GMM_NDIM"]], n["DTYPE"]),
        "gmm_weight": array((e, N1, H1) if n["TRANS"] else (e, H1, N1), n["DTYPE"]),
        "trans_gmm_weight": n["TRANS"],
        "group": "ep",
        "ep_world_size": R,
        "send_counts": counts,
        "recv_counts": counts,
        "product": product,
    }
    if n["MM"]:
        call |= {"mm_x": array((n["MM"], H2)[: n["MM_NDIM"]], n["DTYPE"]), "mm_weight": array((H2, N2), n["DTYPE"])}
    if operator in QUANTISED:
        call |= quantised_part(n, sum(counts))
    return {**call, **changes}


def quantised_part(n, rows):
    per_tensor = n["QMODE"] == 1
    pairs, mm_pairs, dtype = -(-n["H1"] // 64), -(-n["H2"] // 64), "float32" if per_tensor else "uint8"
    weight = (n["e"], n["N1"], pairs, 2) if n["TRANS"] else (n["e"], pairs, n["N1"], 2)
    part = {
        "gmm_x_scale": array((1,) if per_tensor else (rows, pairs, 2), dtype),
        "gmm_weight_scale": array((1,) if per_tensor else weight, dtype),
        "gmm_x_quant_mode": n["QMODE"],
        "gmm_weight_quant_mode": n["QMODE"],
    }
    if n["MM"]:
        part |= {
            "mm_x_scale": array((1,) if per_tensor else (n["MM"], mm_pairs, 2), dtype),
            "mm_weight_scale": array((1,) if per_tensor else (mm_pairs, n["N2"], 2), dtype),
            "mm_x_quant_mode": n["QMODE"],
            "mm_weight_quant_mode": n["QMODE"],
        }
    return part


BUILDERS = dict.fromkeys(EXCHANGE, exchange_call) | dict.fromkeys(ALL_FUSED, fused_call)
BUILDERS |= {UPDATE: update_call, BARRIER_2: barrier_call, RESET: reset_call}


def call_of(operator, product, changes):
    """The arguments of a call; None where an earlier version lacks a parameter that it needs."""
    changes = {name: change for name, change in changes.items() if name != "MESH"}
    chosen = {"product": changes.pop("product")} if "product" in changes else {}
    newest = newest_of(operator)
    call = BUILDERS[newest](newest, product, **changes) | chosen
    later = {name: call.pop(name) for name in lacking(operator) if name in call}
    return call if all(value is None or value == 0 for value in later.values()) else None


def first_phase(operator, product, changes):
    """What the first phase of the changed call returns; "MESH": the sizes of the axes that are bound meanwhile."""
    results, call = [], call_of(operator, product, changes)

    def check():
        results.append(getattr(aclnn, f"{operator}_get_workspace_size")(**call))

    if "MESH" in changes:
        mesh = AbstractMesh(tuple(changes["MESH"].values()), tuple(changes["MESH"]))
        jax.eval_shape(_compat.shard_map(check, mesh=mesh, in_specs=(), out_specs=None))
    else:
        check()
    return results[0]
