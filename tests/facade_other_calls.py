"""Generated calls of the small and of the fused operators, for the laws of ``facade_laws``.

A case starts from the legal call that ``limit_calls`` has for an operator and a product, with other sizes, and half of
the cases are changed in one or two places. Data are whole numbers, whose products and sums are exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facade_laws import lower, phases, same, trace
from jax.sharding import PartitionSpec as P
from limit_calls import ALL_FUSED, BARRIER, BARRIER_2, GA, QGA, QUANTISED, RESET, UPDATE, call_of

import moe_jax as moe
from moe_jax import reference
from moe_jax.hardware.ascend import PRODUCTS
from moe_jax.recovery.window import Window, make_window

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "bool", "uint8", "float8_e4m3fn")
AXIS = "the index along the mesh axis"  # a traced number
ATTRIBUTES = {
    UPDATE: {"balance_mode": (-1, 0, 1, 2), "local_rank_id": (None, -1, 0, 1, 3, 4, 2.0, AXIS),
             "world_size": (None, 0, True, 2, 4, 8)},
    BARRIER: {"group": ("", None, 3), "world_size": (4, 8, 16)},
    RESET: {"need_sync": (-1, 0, 1, 2), "group_ep": ("", None), "ep_world_size": (4, 8, 16)},
    GA: {
        "trans_gmm_weight": (True, False, 1), "trans_mm_weight": (True, False), "send_counts": (None, [], [1, 2]),
        "recv_counts": (None, [-1] * 4, [0.5] * 4), "y_dtype": ("float16", "float32", "no dtype"),
        "ep_world_size": (1, 2, 4, 8), "gmm_x_quant_mode": (0, 1, 6, None), "group_size": (0, 1),
        "permute_out_flag": (True, 1),
    },
}  # fmt: skip
ATTRIBUTES |= {BARRIER_2: ATTRIBUTES[BARRIER]} | dict.fromkeys(ALL_FUSED, ATTRIBUTES[GA])


@dataclasses.dataclass
class Case:
    """One call: its arrays as shapes, and what the host gives."""

    operator: str
    product: str | None
    ranks: int
    arrays: dict[str, Any]
    attributes: dict[str, Any]
    changes: tuple[str, ...] = ()


def one(rng: np.random.Generator) -> tuple[Case, Callable[[bool], str]]:
    """A case, and how to ask the laws of it: a function of whether to run it, which says what came of it."""
    case = legal(rng)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 3)):
            case.changes = (*case.changes, _change(rng, case))
    return case, lambda runs: check(rng, case, runs=runs)


def legal(rng: np.random.Generator) -> Case:
    """A call that its product takes."""
    operator = str(rng.choice([UPDATE, BARRIER, BARRIER_2, RESET, *ALL_FUSED]))
    products = [None, *(name for name, product in PRODUCTS.items() if operator in product)]
    product = products[rng.integers(len(products))]
    if operator == UPDATE:
        ranks, columns = 4, int(rng.integers(2, 5))
        sizes = {"B": int(rng.integers(1, 6)), "K": int(rng.integers(1, 4)), "E": int(rng.integers(3, 7)), "F": columns}
        sizes |= {"MODE": int(rng.integers(2)), "PRUNE": bool(rng.integers(2))}
        if sizes["PRUNE"] and rng.random() < 0.5:
            sizes["active_mask"] = jax.ShapeDtypeStruct((sizes["B"],), jnp.bool_)
        if rng.random() < 0.3:
            sizes["local_rank_id"] = [AXIS, *range(ranks)][rng.integers(ranks + 1)]
    elif operator in (BARRIER, BARRIER_2):
        ranks, sizes = 8, {"group": "ep"}
        sizes["x_ref"] = jax.ShapeDtypeStruct(
            (3, 2), jnp.dtype(str(rng.choice(["float32", "bfloat16", "int8", "bool"])))
        )
        if operator == BARRIER_2 and rng.random() < 0.4:
            sizes["time_out"] = jax.ShapeDtypeStruct((1,), jnp.int32)
        if operator == BARRIER_2 and product is None and rng.random() < 0.5:
            sizes["elastic_info"] = jax.ShapeDtypeStruct((4 + 2 * ranks,), jnp.int32)
    elif operator == RESET:
        ranks = 16 if product else 4
        sizes = {"W": ranks, "need_sync": int(rng.integers(2))}
    else:
        ranks, sizes = _fused_sizes(rng, operator, product)
    call = call_of(operator, product, sizes)
    call.pop("product")
    if operator == RESET:  # a window where the reference has a buffer
        call["window"] = jax.eval_shape(lambda: make_window(6, 3, jnp.int8, ranks))
    arrays = {name: value for name, value in call.items() if hasattr(value, "shape")}
    return Case(operator, product, ranks, arrays, {name: value for name, value in call.items() if name not in arrays})


def _fused_sizes(rng, operator, product):
    ranks = 8 if product == "a3" else int(rng.choice([2, 4]))
    sizes = {"R": ranks, "e": int(rng.integers(1, 3)), "TRANS": bool(rng.integers(2))}
    if product != "a3":
        sizes |= {"H1": 64 if operator in QUANTISED else int(rng.integers(2, 9)), "N1": int(rng.integers(1, 6))}
        sizes["ROWS"] = int(rng.integers(1, 4))
    if operator in QUANTISED:
        sizes["QMODE"] = 6 if product or rng.random() < 0.5 else 1
        if sizes["QMODE"] == 1:
            sizes["DTYPE"] = "int8"
    else:
        sizes["DTYPE"] = str(rng.choice(["bfloat16", "float16"] + ["float32"] * (product is None)))
    if rng.random() < 0.4 and product is None:
        sizes |= {"MM": int(rng.integers(1, 4)), "H2": 64 if operator in QUANTISED else 3, "N2": 2}
    if operator not in (GA, QGA) and rng.random() < 0.5:
        sizes["permute_out_flag"] = True
    if operator in QUANTISED:
        sizes["y_dtype"] = str(rng.choice(["float16", "bfloat16"]))
    return ranks, sizes


def _change(rng, case):
    table = ATTRIBUTES[case.operator]
    names = [name for name in table if name in case.attributes]
    kind = rng.integers(4)
    if kind == 0 and names:
        name = names[rng.integers(len(names))]
        case.attributes[name] = table[name][rng.integers(len(table[name]))]
        return f"{name}={case.attributes[name]!r}"
    name = sorted(case.arrays)[rng.integers(len(case.arrays))]
    if kind == 1 and len(case.arrays) > 1:
        del case.arrays[name]
        return f"no {name}"
    array = case.arrays[name]
    if not isinstance(array, jax.ShapeDtypeStruct):
        return "nothing"
    if kind == 2:
        case.arrays[name] = jax.ShapeDtypeStruct(array.shape, jnp.dtype(DTYPES[rng.integers(len(DTYPES))]))
        return f"{name} as {case.arrays[name].dtype}"
    axis = int(rng.integers(len(array.shape)))
    shapes = [
        (*array.shape[:axis], array.shape[axis] + 1, *array.shape[axis + 1 :]),
        (*array.shape, 1),
        array.shape[1:],
    ]
    case.arrays[name] = jax.ShapeDtypeStruct(shapes[rng.integers(3)], array.dtype)
    return f"{name} of shape {case.arrays[name].shape}"


# --- what comes of a case ---------------------------------------------------------------------------------------------


def check(rng: np.random.Generator, case: Case, *, runs: bool) -> str:
    """Raises ``Broken`` where a law is broken; else says what came of the case. The second law is asked if it runs."""
    drawn = draw(rng, case) if runs else _shapes(rng, case)
    host = {name: drawn.pop(name)[0] for name in ("time_out",) if name in drawn}  # what the host must know
    refused = []

    def shard(drawn):
        arrays = jax.tree.map(lambda a: a[0], drawn) | host
        index = jax.lax.axis_index("ep")
        attributes = {name: index if value is AXIS else value for name, value in case.attributes.items()}
        executor = phases(case.operator, arrays, attributes, case.product)
        if isinstance(executor, int):
            refused.append(executor)
            return None
        return jax.tree.map(lambda a: a[None], executor(**arrays))

    program = jax.jit(jax.shard_map(shard, mesh=moe.make_mesh(ep=case.ranks), in_specs=P("ep"), out_specs=P("ep")))
    lowered = lower(program, drawn) if runs else trace(program, drawn)
    if refused:
        return f"refused with {refused[0]}"
    if lowered is None:
        return "accepted"
    out = jax.tree.map(np.asarray, lowered.compile()(drawn))
    compare = {UPDATE: _update, RESET: _reset, BARRIER: _barrier, BARRIER_2: _barrier}.get(case.operator, _fused)
    compare(case, drawn, out)
    return "equal"


def draw(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Arrays over all ranks [R, ...]."""
    drawn = {}
    for name, array in case.arrays.items():
        if isinstance(array, Window):
            drawn[name] = jax.tree.map(
                lambda leaf: rng.integers(1, 9, (case.ranks, *leaf.shape)).astype(leaf.dtype), array
            )
        else:
            drawn[name] = _numbers(rng, name, (case.ranks, *array.shape), array.dtype)
    table = drawn.get("eplb_table")
    if table is not None and table.dtype == np.int32 and table.ndim == 3 and table.shape[2] > 1 and table.shape[1]:
        table[:, :, 0] = rng.integers(1, table.shape[2], table.shape[:2])
        if "expert_ids" in drawn and drawn["expert_ids"].dtype == np.int32:
            drawn["expert_ids"] = rng.integers(0, table.shape[1], drawn["expert_ids"].shape).astype(np.int32)
    for name in ("elastic_info", "time_out"):  # the same on all ranks
        if name in drawn and case.operator in (BARRIER_2, RESET):
            drawn[name] = np.broadcast_to(_host_value(rng, case, name, drawn[name][0]), drawn[name].shape).copy()
    return drawn


def _shapes(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """What a trace needs of ``draw``: shapes, and the value of what the host must know. Some operands are large."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct((case.ranks, *array.shape), array.dtype), case.arrays)
    of_host = {name: array for name, array in case.arrays.items() if name == "time_out"}
    return shapes | draw(rng, dataclasses.replace(case, arrays=of_host))


def _host_value(rng, case, name, noise):
    if name == "time_out":
        return np.full(noise.shape, 60_000_000 if noise.dtype == np.int32 else 1, noise.dtype)
    if case.operator == RESET:
        return (np.arange(noise.size).reshape(noise.shape) % 3 != 1).astype(noise.dtype)
    if noise.shape != (4 + 2 * case.ranks,) or noise.dtype != np.int32:
        return noise
    return moe.make_rank_table(case.ranks, rng.random(case.ranks) < 0.8, num_experts=case.ranks)


def _numbers(rng, name, shape, dtype):
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.random(shape) < 0.6
    if name.endswith("_scale"):
        return np.full(shape, 2.0**-3, dtype) if dtype == np.float32 else np.full(shape, 127).astype(dtype)
    if name in ("expert_scales", "pruning_threshold"):
        return (rng.integers(0, 5, shape) / 8).astype(dtype)
    return rng.integers(0 if dtype == np.uint8 else -2, 3, shape).astype(dtype)


def _update(case, drawn, out):
    names = {"expert_scales": "combine_weights", "pruning_threshold": "pruning_threshold", "active_mask": "token_mask"}
    n = case.attributes
    for rank in range(case.ranks):
        options = {theirs: drawn[mine][rank] for mine, theirs in names.items() if mine in drawn}
        me = rank if n.get("local_rank_id") in (None, AXIS) else n["local_rank_id"]
        ids, mask = reference.update_expert(
            drawn["expert_ids"][rank], drawn["eplb_table"][rank], rank=me, ep_size=n["world_size"] or 1,
            balance="token" if n["balance_mode"] else "rank", **options,
        )  # fmt: skip
        same(out.balanced_expert_ids[rank], ids, "balanced_expert_ids")
        if mask is not None:
            same(out.balanced_active_mask[rank], mask, "balanced_active_mask")


def _barrier(case, drawn, out):
    same(out, drawn["x_ref"], "x_ref")


def _reset(case, drawn, out):
    reached = drawn["elastic_info"][0] != 0
    for name in ("data", "counts", "step"):
        old = getattr(drawn["window"], name)
        same(getattr(out, name), np.where(reached.reshape(-1, *[1] * (old.ndim - 1)), 0, old), name)


def _fused(case, drawn, out):
    n, ranks = case.attributes, case.ranks
    send, recv = (
        np.broadcast_to(np.asarray(n[name]), (ranks, np.size(n[name]))) for name in ("send_counts", "recv_counts")
    )
    oracle = (
        reference.grouped_matmul_all_to_allv if case.operator in (GA, QGA) else reference.all_to_allv_grouped_matmul
    )
    transpose = {f"transpose_{part}_weight": n.get(f"trans_{part}_weight", False) for part in ("gmm", "mm")}
    want = oracle(**drawn, send_counts=send, recv_counts=recv, **transpose)
    for name, got, rows in zip(out._fields, out, want, strict=False):
        if got is None:
            continue
        for rank in range(ranks):
            exact = np.asarray(rows[rank]).astype(got.dtype)
            same(got[rank][: len(exact)], exact, name)
            same(got[rank][len(exact) :], np.zeros_like(got[rank][len(exact) :]), f"{name} past its rows")
