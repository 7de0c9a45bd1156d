"""Gradients where an operand varies over a mesh axis that the operator knows nothing of, and others do not.

The law: with the operands of slice d of that axis, d = 0, 1, the loss is the sum of a float64 formula over d; so the
gradient of an operand that is split is that of its slice, and that of one that is replicated is their sum. Every
operand of every public per-shard function is once the only one that is split, and once the only one that is not.
Formulas are polynomials in whole numbers, and equality is exact, but for the norm and the layer, where differences over
a small step are not.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat, aclnn, quant, reference

D, W, T, H, K, E = 2, 2, 3, 4, 2, 4  # slices, ranks
IDS = np.array([[[0, 3], [2, -1], [1, 2]], [[3, 0], [3, 1], [0, 1]]], np.int32)  # [W, T, K]
FACTOR = np.array([0.0, 1.0, -1.0, 2.0], np.float32)  # of the columns; the first one holds what fixes a scale
SIZES = np.array([2, 1], np.int32)
SEND, RECV = [[1, 1], [0, 2]], [[1, 0], [1, 2]]  # one expert per rank
EVERYWHERE = ("dp", "ep", "tp")


@dataclasses.dataclass(frozen=True)
class Case:
    """A function and what its loss is. Operands are [W, ...] by rank, or the same on all ranks."""

    shard: Callable  # (operands of a rank, ids [T, K]) -> loss of that rank
    formula: Callable  # (operands, float64) -> loss of all ranks
    by_rank: dict[str, tuple]  # shapes without W
    shared: dict[str, tuple] = dataclasses.field(default_factory=dict)
    tolerance: float = 0.0  # 0: exact
    pinned: str = ""  # the operand whose first column is 127, so that int8 loses nothing


def plan_of(**options):
    options = {"num_experts": E, "transport": "padded"} | options
    return moe.make_plan(moe.make_mesh(ep=W), tokens_per_rank=T, hidden=H, top_k=K, dtype="float32", **options)


def written(sent):
    return (jnp.arange(len(sent.x)) < jnp.sum(sent.group_sizes))[:, None]


def pairs(limit=E):
    """(rank, token, k) of every pair that travels."""
    return [index for index in np.ndindex(IDS.shape) if 0 <= IDS[index] < limit]


def dispatch(a, ids):
    sent = moe.dispatch(a["x"], ids, plan_of(poison=True), combine_weights=a["weights"])
    weights = jnp.where(written(sent)[:, 0], sent.row_weights, 0.0)
    return jnp.sum(jnp.where(written(sent), sent.x**2, 0.0) @ FACTOR) + jnp.sum(weights**2)


def dispatch_formula(a):
    return sum(a["x"][i[:2]] ** 2 @ FACTOR + a["weights"][i] ** 2 for i in pairs())


def quantised(transport, a, ids):
    plan = plan_of(quant="int8", transport=transport)
    sent = moe.dispatch(a["x"], ids, plan, combine_weights=a["weights"], smooth_scales=a["smooth"])
    weights = jnp.where(written(sent)[:, 0], sent.row_weights, 0.0)
    return jnp.sum(jnp.where(written(sent), moe.dequantize(sent), 0.0) @ FACTOR) + jnp.sum(weights**2)


def quantised_formula(a):
    return sum((a["x"][i[:2]] * a["smooth"][IDS[i]]) @ FACTOR + a["weights"][i] ** 2 for i in pairs())


def smoothed_formula(a):
    return sum((a["x"][i[:2]] * a["smooth"]) @ FACTOR for i in pairs())


def smoothed(a, ids):
    sent = moe.dispatch(a["x"], ids, plan_of(quant="int8"), smooth_scales=a["smooth"])
    return jnp.sum(jnp.where(written(sent), moe.dequantize(sent), 0.0) @ FACTOR)


def combine(transport, a, ids):
    plan = plan_of(num_experts=2, num_copy_experts=1, num_const_experts=1, transport=transport)
    sent = moe.dispatch(a["tokens"], ids, plan)
    names = ("x", "const_alpha1", "const_alpha2", "const_v", "shared_x")
    return jnp.sum(moe.combine(sent.x, a["weights"], sent.handle, **{name: a[name] for name in names}) @ FACTOR)


def combine_formula(a):
    total = np.sum(a["shared_x"] @ FACTOR)
    for i in pairs():
        x, weight = a["x"][i[:2]], a["weights"][i]
        row = a["tokens"][i[:2]] if IDS[i] < 2 else x if IDS[i] == 2 else a["const_alpha1"][0] * x
        row = row + a["const_alpha2"][0] * a["const_v"][0] if IDS[i] == 3 else row
        total += weight * row @ FACTOR
    return total


def norm(a, ids):
    sent = moe.dispatch(a["tokens"], ids, plan_of())
    y, rstd, x = moe.combine_add_rms_norm(sent.x, a["weights"], sent.handle, a["residual"], a["gamma"], eps=2.0)
    return jnp.sum(y @ FACTOR) + jnp.sum(rstd) + jnp.sum(x @ FACTOR)


def norm_formula(a):
    total = np.array(a["residual"])
    for i in pairs():
        total[i[:2]] += a["weights"][i] * a["tokens"][i[:2]]
    rstd = 1 / np.sqrt(np.mean(total**2, axis=-1) + 2.0)
    return np.sum((total * rstd[..., None] * a["gamma"]) @ FACTOR) + rstd.sum() + np.sum(total @ FACTOR)


def grouped(a, ids):
    return jnp.sum(moe.grouped_matmul(a["lhs"], a["rhs"], jnp.asarray(SIZES)) @ FACTOR)


def grouped_formula(a):
    return sum(a["lhs"][w, m] @ a["rhs"][w, g] @ FACTOR for w in range(W) for m, g in enumerate([0, 0, 1]))


def fused(way, a, ids):
    function = {"out": moe.grouped_matmul_all_to_allv, "in": moe.all_to_allv_grouped_matmul}[way]
    counts = (SEND, RECV) if way == "out" else (RECV, SEND)
    y, mm_y, *_ = function(a["gmm_x"], a["gmm_weight"], *counts, "ep", mm_x=a["mm_x"], mm_weight=a["mm_weight"])
    return jnp.sum(y @ FACTOR) + jnp.sum(mm_y @ FACTOR)


def fused_formula(way, a):
    total = np.sum(a["mm_x"] @ a["mm_weight"] @ FACTOR)
    for rank in range(W):
        owners = [rank] * sum(SEND[rank]) if way == "out" else np.repeat([0, 1], RECV[rank])
        total += sum(a["gmm_x"][rank, m] @ a["gmm_weight"][owner, 0] @ FACTOR for m, owner in enumerate(owners))
    return total


def ragged(a, ids):
    me = jax.lax.axis_index("ep")
    sizes = jnp.array([[1, 2], [1, 0]], jnp.int32)
    starts, lands = jnp.array([[0, 1], [2, 0]], jnp.int32), jnp.array([[0, 0], [1, 0]], jnp.int32)
    out = moe.ragged_all_to_all(
        a["operand"], a["output"], starts[me], sizes[me], lands[me], sizes[:, me], axis_name="ep"
    )
    return jnp.sum(out**2 @ FACTOR)


def ragged_formula(a):
    operand, output = a["operand"] ** 2 @ FACTOR, a["output"] ** 2 @ FACTOR
    return operand[0].sum() + operand[1, 2] + output[0, 2] + output[1, 2]


GROUP = {"group_ep": "ep", "ep_world_size": W, "moe_expert_num": E}


def facade_dispatch(a, ids):
    sent = aclnn.moe_distribute_dispatch_v4(a["x"].astype(jnp.bfloat16), ids, expert_scales=a["expert_scales"], **GROUP)
    return jnp.sum(sent.expand_x.astype(jnp.float32) @ FACTOR) + jnp.sum(sent.expand_scales**2)


def facade_dispatch_formula(a):
    return sum(a["x"][i[:2]] @ FACTOR + a["expert_scales"][i] ** 2 for i in pairs())


def facade_dequantize(a, ids):
    x = a["x"].astype(jnp.bfloat16)
    sent = aclnn.moe_distribute_dispatch_v4(x, ids, a["smooth"], quant_mode=2, **GROUP)
    rows = aclnn.dequantize(sent, x, ids, a["smooth"], quant_mode=2, **GROUP)
    return jnp.sum(rows.astype(jnp.float32) @ FACTOR)


def facade_dequantize_formula(a):
    return sum((a["x"][i[:2]] * a["smooth"][IDS[i]]) @ FACTOR for i in pairs())


def facade_combine(a, ids):
    sent = aclnn.moe_distribute_dispatch_v4(a["tokens"].astype(jnp.bfloat16), ids, **GROUP)
    out = aclnn.moe_distribute_combine_add_rms_norm_v2(
        sent.expand_x, ids, sent.assist_info_for_combine, sent.ep_recv_counts, a["expert_scales"],
        a["residual"].astype(jnp.bfloat16)[:, None], a["gamma"].astype(jnp.bfloat16), **GROUP,
    )  # fmt: skip
    return jnp.sum(out.x_out.astype(jnp.float32) @ FACTOR) + jnp.sum(out.y_out.astype(jnp.float32) * 0)


def facade_combine_formula(a):
    total = sum(a["expert_scales"][i] * a["tokens"][i[:2]] @ FACTOR for i in pairs())
    return total + np.sum(a["residual"] @ FACTOR) + 0 * a["gamma"].sum()


def layer(a, ids):
    y, _ = moe.moe_layer({name: a[name] for name in a if name != "x"}, a["x"], plan_of(), moe.RouterConfig())
    return jnp.sum(y @ FACTOR)


def layer_formula(a):
    params = {name: a[name].reshape(E, *a[name].shape[2:]) for name in ("w_gate", "w_up", "w_down")}
    x = a["x"].reshape(W * T, H)
    return np.sum(reference.moe_layer(params | {"router": a["router"]}, x, moe.RouterConfig(), top_k=K)[0] @ FACTOR)


def straight_through(a, ids):
    return jnp.sum(quant.straight_through(quant.recipe("int8", "float32"), a["x"], a["smooth"]) @ FACTOR)


TOKENS, CHOICES = (T, H), (T, K)
CASES = {
    "dispatch": Case(dispatch, dispatch_formula, {"x": TOKENS, "weights": CHOICES}),
    **{
        f"dispatch int8 {transport}": Case(
            functools.partial(quantised, transport), quantised_formula, {"x": TOKENS, "weights": CHOICES},
            {"smooth": (E, H)}, pinned="x",
        )
        for transport in ("padded", "allgather")
    },
    "dispatch int8, factors by column": Case(smoothed, smoothed_formula, {"x": TOKENS}, {"smooth": (H,)}, pinned="x"),
    **{
        f"combine {transport}": Case(
            functools.partial(combine, transport), combine_formula,
            {"tokens": TOKENS, "weights": CHOICES, "x": TOKENS, "shared_x": TOKENS},
            {"const_alpha1": (1,), "const_alpha2": (1,), "const_v": (1, H)},
        )
        for transport in ("padded", "allgather")
    },
    "combine_add_rms_norm": Case(
        norm, norm_formula, {"tokens": TOKENS, "weights": CHOICES, "residual": TOKENS}, {"gamma": (H,)}, 1e-5
    ),
    "moe_layer": Case(
        layer, layer_formula, {"x": TOKENS, "w_gate": (2, H, 3), "w_up": (2, H, 3), "w_down": (2, 3, H)},
        {"router": (H, E)}, 1e-4,
    ),
    "grouped_matmul": Case(grouped, grouped_formula, {"lhs": (T, H), "rhs": (2, H, H)}),
    **{
        f"fused {way}": Case(
            functools.partial(fused, way), functools.partial(fused_formula, way),
            {"gmm_x": (3, H), "gmm_weight": (1, H, H), "mm_x": (T, H)}, {"mm_weight": (H, H)},
        )
        for way in ("out", "in")
    },
    "ragged_all_to_all": Case(ragged, ragged_formula, {"operand": (3, H), "output": (3, H)}),
    "straight_through": Case(
        straight_through, lambda a: np.sum(a["x"] @ FACTOR) + 0 * a["smooth"].sum(), {"x": TOKENS}, {"smooth": (H,)},
        pinned="x",
    ),
    "aclnn dispatch": Case(facade_dispatch, facade_dispatch_formula, {"x": TOKENS, "expert_scales": CHOICES}),
    "aclnn dequantize": Case(
        facade_dequantize, facade_dequantize_formula, {"x": TOKENS}, {"smooth": (E, H)}, pinned="x"
    ),
    "aclnn combine": Case(
        facade_combine, facade_combine_formula, {"tokens": TOKENS, "expert_scales": CHOICES, "residual": TOKENS},
        {"gamma": (H,)},
    ),
}  # fmt: skip


def patterns():
    """(case, the operands that are split); by default one of each case, and those of factors beside rows."""
    for name, case in CASES.items():
        operands = [*case.by_rank, *case.shared]
        found = {frozenset([alone]): f"{alone} alone is split" for alone in operands}
        found |= {frozenset(operands) - {alone}: f"{alone} alone is replicated" for alone in operands}
        quick = frozenset(operands[:-1] if case.shared else operands[-1:])
        for split, text in found.items():
            yield pytest.param(name, split, id=f"{name}: {text}", marks=() if split == quick else pytest.mark.slow)


@pytest.mark.quick(
    "dispatch int8 allgather: smooth alone is replicated",
    "dispatch int8, factors by column: smooth alone is replicated",
    "grouped_matmul: lhs alone is replicated",
    "straight_through: smooth alone is replicated",
    "aclnn dequantize: smooth alone is replicated",
)
@pytest.mark.parametrize("name,split", list(patterns()))
def test_gradient(name, split):
    case, rng = CASES[name], np.random.default_rng(0)
    operands, specs = {}, {}
    for operand, shape in {**case.by_rank, **case.shared}.items():
        lead = (D,) * (operand in split) + (W,) * (operand in case.by_rank)
        draw = rng.normal(size=(*lead, *shape)) if case.tolerance else rng.integers(-2, 3, (*lead, *shape))
        operands[operand] = draw.astype(np.float32)
        specs[operand] = P(*("dp",) * (operand in split), *("ep",) * (operand in case.by_rank))
        if operand == "smooth":
            operands[operand][...] = 1
        if operand == case.pinned:
            operands[operand][..., 0] = 127

    def shard(operands, ids):
        inner = {operand: value.reshape(value.shape[len(specs[operand]) :]) for operand, value in operands.items()}
        return _compat.as_varying(case.shard(inner, ids[0])[None, None], EVERYWHERE)

    run = _compat.shard_map(
        shard, mesh=moe.make_mesh(ep=W, dp=D), in_specs=(specs, P("ep")), out_specs=P("dp", ("ep", "tp"))
    )

    def formula(operands):
        slices = [{name: a[d] if name in split else a for name, a in operands.items()} for d in range(D)]
        return sum(case.formula(each) for each in slices)

    got = jax.jit(jax.grad(lambda operands: jnp.sum(run(operands, IDS))))(operands)
    wide = {operand: np.asarray(value, np.float64) for operand, value in operands.items()}
    step = 1e-4 if case.tolerance else 1.0
    for operand, value in wide.items():
        v = rng.integers(-2, 3, value.shape)
        at = {sign: formula(wide | {operand: value + sign * step * v}) for sign in (1, -1)}
        want, found = (at[1] - at[-1]) / (2 * step), np.vdot(got[operand], v)
        assert abs(found - want) <= case.tolerance * max(1.0, abs(want)), operand
