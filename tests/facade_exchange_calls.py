"""Generated calls of dispatch and of what brings the rows back, for the laws of ``facade_laws``.

A case is a legal call of dispatch and of a combine for one product (or for none), half of them changed in one to three
places: attributes, arrays that are there or not, their dtypes and extents.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from facade_laws import Broken, lower, phases, same, trace
from family_cases import QUANT, elastic_info, elastic_worlds, expert_ids, shared_ranks
from jax.sharding import PartitionSpec

import moe_jax as moe
from moe_jax import aclnn

DEVICES = 16  # A2 begins there
COMBINE, NORM = "moe_distribute_combine", "moe_distribute_combine_add_rms_norm"
CONSTANTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
NUMBERS = ("zero_expert_num", "copy_expert_num", "const_expert_num")
FP8, FP4 = ("float8_e4m3fn", "float8_e5m2"), ("float4_e2m1fn", "uint8")
# Products, and whether over nodes: without a product, most of a call can be combined with most of the rest.
KINDS = (
    [(None, False)] * 4
    + [(None, True)] * 4
    + [(name, False) for name in ("a2", "a3", "a5")]
    + [("a2", True), ("a3", True)]
)
ALGORITHMS = ("", None, "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy")


@dataclasses.dataclass
class Case:
    """One call of dispatch and one of a combine: what is said of both, and what of each."""

    product: str | None
    world: int  # W, as the mesh has it
    tp: int  # tensor-parallel ranks of the mesh
    nodes: int
    tokens: int
    combine: str  # the operator that brings the rows back, without its version
    version: int  # of dispatch and combine: 2, 3 or 4
    common: dict[str, Any]  # attributes of both
    dispatch_only: dict[str, Any]
    combine_only: dict[str, Any]
    shared: dict[str, tuple]  # arrays of both: (shape, dtype) by name
    of_dispatch: dict[str, tuple]
    of_combine: dict[str, tuple]
    feeds: set[str]  # outputs of dispatch that combine gets
    elastic: str | None = None  # None, "off" (a table whose flag is 0) or "on"
    changes: tuple[str, ...] = ()

    @property
    def operators(self) -> tuple[str, str]:
        """The names of both operators."""
        norm = NORM if self.version == 2 else f"{NORM}_v2"
        back = norm if self.combine == NORM else f"{COMBINE}_v{self.version}"
        return f"moe_distribute_dispatch_v{self.version}", back

    @property
    def lead(self) -> tuple[int, int]:
        """The leading axes of arrays over all ranks."""
        return self.world, self.tp

    @property
    def capacity(self) -> int:
        """A: a rank that holds min(L, K) experts may get so many pairs of every token; 1 where that has no meaning."""
        n = self.common
        holders = n["ep_world_size"] - n["shared_expert_rank_num"]
        local = n["moe_expert_num"] // holders if holders > 0 else 1
        most = n["global_bs"] // n["ep_world_size"] if n["global_bs"] > 0 and n["ep_world_size"] > 0 else self.tokens
        return max(most * n["ep_world_size"] * min(local, self.shared["expert_ids"][0][-1]), 0)


# --- legal calls ------------------------------------------------------------------------------------------------------


def legal(rng: np.random.Generator) -> Case:
    """A call that its product takes."""
    product, hierarchy = KINDS[rng.integers(len(KINDS))]
    wide = {"a2": True, "a3": hierarchy}.get(product, False)
    tp = int(rng.choice([0, 1, 2], p=[0.55, 0.15, 0.3])) if product in (None, "a3") and not hierarchy else 0
    if product is None and hierarchy:
        tp = int(rng.choice([0, 0, 2]))
    world = (
        16
        if wide
        else int(rng.choice([2, 4] if tp == 2 or hierarchy else [1, 2, 4, 8] if product is None else [2, 4, 8]))
    )
    free = product is None  # of the limits of a product
    num_shared, num_shared_ranks = (int(rng.integers(2)), 0)
    if free or (product in ("a3", "a5") and not hierarchy):
        num_shared, num_shared_ranks = shared_ranks(rng, world)
    local = 1 if tp == 2 else int(rng.integers(1, 4 if free else 3))
    special = dict.fromkeys(NUMBERS, 0)
    if rng.random() < 0.4 and (free or not hierarchy):
        names = NUMBERS[:2] if product == "a2" else NUMBERS
        special |= {name: int(rng.integers(0, 3)) for name in names}
    experts = local * (world - num_shared_ranks)
    top_k = int(rng.integers(1, min(5, experts + sum(special.values())) + 1))
    tokens = int(rng.integers(0 if free else 1, 5))
    hidden = {None: int(rng.choice([8, 16, 40, 136])), "a2": 32 * int(rng.integers(1, 4))}.get(product, 1024)
    if product in ("a3", "a5") and not hierarchy and rng.random() < 0.2:
        hidden = 1032
    norm = product != "a2" and rng.random() < 0.3
    dtype = "bfloat16" if norm and not free else str(rng.choice(["bfloat16", "float16"] + ["float32"] * free))
    quant_mode, y_dtype, smooth = _quantisation(rng, product, hierarchy)
    wires = {None: [0, 2, 3, 4], "a2": [0, 2] if hierarchy else [0], "a3": [0, 2], "a5": [0, 2, 3, 4]}[product]
    comm_quant = int(rng.choice(wires)) if tp < 2 and (free or not norm) and rng.random() < 0.5 else 0
    alg = {
        "a2": ["", "fullmesh"],
        "a3": ["", None, "fullmesh_v1"] + ["fullmesh_v2"] * (tp < 2),
        "a5": ["", "fullmesh_v1"],
    }
    nodes = (world if free and hidden == 8 else 2) if hierarchy else 1  # nodes of one rank, or two of several
    algorithms = alg.get(product, ALGORITHMS[:5])
    case = Case(
        product=product, world=world, tp=max(tp, 1), nodes=nodes, tokens=tokens,
        combine=NORM if norm else COMBINE, version=4,
        common={
            "group_ep": ("node", "ep") if hierarchy else "ep", "ep_world_size": world, "moe_expert_num": experts,
            "group_tp": "tp" if tp == 2 else "", "tp_world_size": tp, "shared_expert_num": num_shared,
            "shared_expert_rank_num": num_shared_ranks,
            "global_bs": world * (tokens + int(rng.integers(0, 3))) if rng.random() < 0.3 else 0,
            "comm_alg": "hierarchy" if hierarchy else algorithms[rng.integers(len(algorithms))],
            **special,
        },
        dispatch_only={"quant_mode": quant_mode, "y_dtype": y_dtype, "expert_token_nums_type": int(rng.integers(2))},
        combine_only={"comm_quant_mode": comm_quant} | ({"norm_eps": 1e-5} if norm else {}),
        shared={"expert_ids": ((tokens, top_k), "int32")}, of_dispatch={}, of_combine={}, feeds=set(),
    )  # fmt: skip
    _arrays(rng, case, hidden, dtype, smooth)
    _older(rng, case)
    return case


def _older(rng, case):
    """An earlier version, where the call has nothing that it lacks."""
    timed = "performance_info" in case.of_dispatch
    plain = not (any(case.common[name] for name in NUMBERS) or "elastic_info" in case.shared)
    versions = [4] + [3] * (not timed) + [2] * (plain and not timed)
    takes_table = case.product == "a3" and case.common["comm_alg"] in ("", None, "fullmesh_v1")
    if takes_table and not case.common["tp_world_size"] and rng.random() < 0.3:  # there V3 does, and V4 does not
        case.elastic, versions = "on", [3]
        case.shared["elastic_info"] = ((4 + 2 * case.world,), "int32")
    case.version = versions[rng.integers(len(versions))]
    if case.version == 2:
        for name in NUMBERS:
            del case.common[name]


def _quantisation(rng, product, hierarchy):
    """quant_mode, y_dtype, and the kind of scales."""
    if rng.random() < 0.5:
        return 0, None, None
    modes = QUANT if product in (None, "a5") else [(2, "int8")]
    if product == "a5":
        modes = [mode for mode in modes if mode[1] != "float4_e2m1fn"]
    quant_mode, y_dtype = modes[rng.integers(len(modes))]
    if quant_mode == 1:
        return quant_mode, y_dtype, str(rng.choice(["one", "row", "experts"]))
    smooth = quant_mode in (2, 3) and rng.random() < 0.6 and not (product == "a2" and hierarchy)
    return quant_mode, y_dtype if rng.random() < 0.7 or quant_mode > 2 else None, "experts" if smooth else None


def _arrays(rng, case, hidden, dtype, smooth):
    """Shapes and dtypes of the arrays of a legal call; every optional one is there or not."""
    n, tokens, (_, top_k) = case.common, case.tokens, case.shared["expert_ids"][0]
    free, hierarchy = case.product is None, n["comm_alg"] == "hierarchy"
    half = dtype if rng.random() < 0.8 or case.combine == NORM else "float16"
    case.of_dispatch["x"] = ((tokens, hidden), dtype)
    if smooth:
        rows = n["moe_expert_num"] + (n["shared_expert_num"] if n["shared_expert_rank_num"] else 0)
        case.of_dispatch["scales"] = ({"one": (1,), "row": (hidden,), "experts": (rows, hidden)}[smooth], "float32")
    if rng.random() < 0.5 and not (case.product == "a2" and hierarchy):
        by_token = case.product == "a2" or rng.random() < 0.5
        case.shared["x_active_mask"] = ((tokens,) if by_token else (tokens, top_k), "bool")
    if rng.random() < 0.6 or (hierarchy and not free):
        case.of_dispatch["expert_scales"] = ((tokens, top_k), "float32")
    if free and rng.random() < 0.3:
        case.elastic = "off" if rng.random() < 0.2 else "on"
        case.shared["elastic_info"] = ((4 + 2 * n["ep_world_size"],), "int32")
    if case.product != "a3" and not hierarchy and case.combine == COMBINE and rng.random() < 0.25:
        kind = "int32"  # what JAX has for int64
        case.of_dispatch["performance_info"] = ((n["ep_world_size"],), kind)
        case.of_combine["performance_info"] = ((n["ep_world_size"],), kind)
    case.of_combine["expand_x"] = ((case.capacity * case.tp + int(rng.integers(0, 2)) * case.tp, hidden), half)
    case.of_combine["expert_scales"] = ((tokens, top_k), "float32")
    if case.product in (None, "a5") and case.combine == COMBINE and rng.random() < 0.1 and not hierarchy:
        case.of_combine["expert_scales"] = ((tokens, 0), "float32")  # a plain sum
    if not n["shared_expert_rank_num"] and rng.random() < 0.4:
        split = (2, tokens // 2) if tokens % 2 == 0 else (1, tokens)
        case.of_combine["shared_expert_x"] = ((tokens, hidden) if rng.random() < 0.5 else (*split, hidden), half)
    if n["copy_expert_num"] or n["const_expert_num"]:
        case.of_combine["ori_x"] = ((tokens, hidden), half)
    if n["const_expert_num"]:
        width = (n["const_expert_num"], hidden)
        for name in CONSTANTS[:2]:
            case.of_combine[name] = (width, half)
        case.of_combine[CONSTANTS[2]] = (width, half)
        if rng.random() < 0.5:
            for name in CONSTANTS[:2]:
                case.of_combine[name] = (width[:1], half)
    if case.combine == NORM:
        case.of_combine |= {"residual_x": ((tokens, 1, hidden), half), "gamma": ((hidden,), half)}
    case.feeds = {"assist_info_for_combine", "ep_send_counts"} | (
        {"tp_send_counts"} if n["tp_world_size"] == 2 else set()
    )
    if "expert_scales" in case.of_dispatch and (rng.random() < 0.8 or not free):
        case.feeds.add("expand_scales")


# --- changes: of a legal call in one place ----------------------------------------------------------------------------

ATTRIBUTES = {
    "ep_world_size": (-1, 0, 1, 2, 4, 8, 16, 32),
    "comm_alg": (*ALGORITHMS, "tree", 3),
    "group_ep": ("", None, 7, ()),
    "group_tp": ("", None, "tp", "ep", 5),
    "tp_world_size": (-1, 0, 1, 2, 3, True),
    "expert_shard_type": (0, 1),
    "shared_expert_num": (-1, 0, 1, 2, 3, 5),
    "shared_expert_rank_num": (-1, 0, 1, 2, 4, 16),
    "global_bs": (-8, 0, 1, 16, 48, 64, 2.0),
    **dict.fromkeys(NUMBERS, (-1, 0, 1, 2, 2**31 - 1, None)),
    "moe_expert_num": (0, 1, 8, 12, 16, 32, 48, None),
}
OF_DISPATCH = {
    "quant_mode": (-1, 0, 1, 2, 3, 4, 5, 6, None),
    "y_dtype": (None, "int8", *FP8, *FP4, "float32", "bfloat16", "float16", "no dtype"),
    "expert_token_nums_type": (-1, 0, 1, 2),
}
OF_COMBINE = {
    "comm_quant_mode": (-1, 0, 1, 2, 3, 4, 5),
    "out_dtype": (0, 1),
    "group_list_type": (0, 1, 2),
    "norm_eps": (0.0, 1e-5, -1.0, float("inf"), "1e-6"),
}
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "bool", "uint8", "float8_e4m3fn")


def changed(rng: np.random.Generator, case: Case) -> Case:
    """``case`` with one to three things changed, each of which may be legal still."""
    case = dataclasses.replace(
        case, common=dict(case.common), dispatch_only=dict(case.dispatch_only), combine_only=dict(case.combine_only),
        shared=dict(case.shared), of_dispatch=dict(case.of_dispatch), of_combine=dict(case.of_combine),
        feeds=set(case.feeds),
    )  # fmt: skip
    kinds = (_attribute, _drop, _add, _cast, _resize, _pass_through)
    for _ in range(rng.integers(1, 4)):
        kind = kinds[rng.choice(len(kinds), p=[0.4, 0.15, 0.2, 0.1, 0.1, 0.05])]
        case.changes = (*case.changes, kind(rng, case))
    return case


def _attribute(rng, case):
    place, table = [(case.common, ATTRIBUTES), (case.dispatch_only, OF_DISPATCH), (case.combine_only, OF_COMBINE)][
        rng.choice(3, p=[0.5, 0.25, 0.25])
    ]
    names = [name for name in table if name != "norm_eps" or case.combine == NORM]
    if case.version == 2:
        names = [name for name in names if name not in NUMBERS]
    name = names[rng.integers(len(names))]
    place[name] = table[name][rng.integers(len(table[name]))]
    return f"{name}={place[name]!r}"


def _some(rng, case, places=("shared", "of_dispatch", "of_combine")):
    options = [(place, name) for place in places for name in getattr(case, place)]
    place, name = options[rng.integers(len(options))]
    return getattr(case, place), name


def _drop(rng, case):
    if rng.random() < 0.2:
        name = sorted(case.feeds)[rng.integers(len(case.feeds))]
        case.feeds.discard(name)
        return f"no {name}"
    place, name = _some(rng, case)
    if name == "expert_ids":  # the generator takes B and K from them
        return "nothing"
    del place[name]
    return f"no {name}"


def _add(rng, case):
    (tokens, top_k), n = case.shared["expert_ids"][0], case.common
    hidden = case.of_dispatch.get("x", ((0, 8),))[0][-1]
    half = case.of_combine.get("expand_x", (0, "bfloat16"))[1]
    ranks = n["ep_world_size"]
    options = {
        "x_active_mask": ("shared", [((tokens,), "bool"), ((tokens, top_k), "bool")]),
        "elastic_info": ("shared", [((4 + 2 * ranks,), "int32")]),
        "scales": (
            "of_dispatch",
            [((1,), "float32"), ((hidden,), "float32"), ((n["moe_expert_num"] or 1, hidden), "float32")],
        ),
        "expert_scales": ("of_dispatch", [((tokens, top_k), "float32")]),
        "performance_info": ("both", [((ranks,), "int32"), ((ranks,), "int64"), ((ranks + 1,), "int32")]),
        "expand_scales": ("feeds", [None]),
        "tp_send_counts": ("of_combine", [((2,), "int32")]),
        "shared_expert_x": ("of_combine", [((tokens, hidden), half)]),
        "ori_x": ("of_combine", [((tokens, hidden), half)]),
        "const_expert_v": ("of_combine", [((1, hidden), half)]),
        "activation_scale": ("of_combine", [((1,), "float32")]),
        "weight_scale": ("of_combine", [((1,), "float32")]),
        "group_list": ("of_combine", [((1,), "int32")]),
    }
    lacking = {2: {"elastic_info", "performance_info", "ori_x", "const_expert_v"}, 3: {"performance_info"}, 4: set()}
    names = sorted(options.keys() - lacking[case.version])
    name = names[rng.integers(len(names))]
    place, specs = options[name]
    if place == "feeds":
        case.feeds.add(name)
        return f"with {name}"
    spec = specs[rng.integers(len(specs))]
    for target in ("of_dispatch", "of_combine") if place == "both" else (place,):
        if not (name == "performance_info" and target == "of_combine" and case.combine == NORM):
            getattr(case, target)[name] = spec
    if name == "elastic_info":
        case.elastic = "on"
    return f"with {name} {spec}"


def _cast(rng, case):
    place, name = _some(rng, case)
    place[name] = (place[name][0], DTYPES[rng.integers(len(DTYPES))])
    return f"{name} as {place[name][1]}"


def _resize(rng, case):
    place, name = _some(rng, case)
    shape, dtype = place[name]
    if name == "expert_ids" or not shape:
        return "nothing"
    axis = int(rng.integers(len(shape)))
    options = [
        (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]),
        (*shape[:axis], max(shape[axis] - 1, 0), *shape[axis + 1 :]),
        (*shape, 1),
        shape[:-1],
    ]
    place[name] = (options[rng.integers(len(options))], dtype)
    return f"{name} of shape {place[name][0]}"


def _pass_through(rng, case):
    """Rows that are quantised already, with their scales."""
    if "x" not in case.of_dispatch:
        return "nothing"
    dtype = [*FP8, *FP4][rng.integers(4)]
    (tokens, hidden) = (*case.of_dispatch["x"][0], 1, 1)[:2]
    case.of_dispatch["x"] = ((tokens, hidden), dtype)
    scale = "uint8" if dtype in FP4 else ["float32", "uint8", "float8_e8m0fnu"][rng.integers(3)]
    case.of_dispatch["scales"] = ((tokens, int(rng.integers(1, 4))), scale)
    case.dispatch_only |= {"quant_mode": 0, "y_dtype": None}
    return f"x as {dtype}, with scales"


# --- data -------------------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Arrays over all ranks [W, P, ...] of "dispatch" and of "combine": whole numbers, weights that are quarters."""
    shared = {name: _numbers(rng, name, case.lead + spec[0], spec[1]) for name, spec in case.shared.items()}
    num_experts = case.common["moe_expert_num"]
    if "elastic_info" in shared:
        shared["elastic_info"], num_experts = _elastic(rng, case, shared["elastic_info"])
    shared["expert_ids"] = _ids(rng, case, shared["expert_ids"], num_experts)
    arrays = {}
    for phase, specs in (("dispatch", case.of_dispatch), ("combine", case.of_combine)):
        own = {name: _numbers(rng, name, case.lead + spec[0], spec[1]) for name, spec in specs.items()}
        arrays[phase] = shared | own
    scales = arrays["dispatch"].get("scales")
    if scales is not None and case.dispatch_only["quant_mode"] != 0:  # smoothing factors are the same on all ranks
        arrays["dispatch"]["scales"] = np.broadcast_to(scales[:1, :1], scales.shape).copy()
    return arrays


def _numbers(rng, name, shape, dtype):
    dtype = jnp.dtype(dtype)
    if name == "x_active_mask" and dtype == np.bool_:
        return rng.random(shape) < rng.choice([0.0, 0.4, 0.8, 1.0])
    if "scales" in name and name != "scales" and dtype == np.float32:
        return (rng.integers(-4, 9, shape) / 4).astype(np.float32)
    if name == "scales" and dtype == np.float32:
        return rng.integers(1, 5, shape).astype(np.float32)
    if name in CONSTANTS[:2]:
        return (rng.integers(-2, 3, shape) * (len(shape) == 3)).astype(dtype)  # the gates of [Cc, H] are 1/2 exactly
    if dtype in (jnp.dtype("float4_e2m1fn"), jnp.dtype("float8_e8m0fnu"), *map(jnp.dtype, FP8)):
        bits = rng.integers(0, 16 if dtype.name == "float4_e2m1fn" else 255, shape).astype(np.uint8)
        return bits.view(dtype)
    if dtype == np.uint8:
        return rng.integers(0, 255, shape).astype(np.uint8)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if name == "performance_info":
        return rng.integers(0, 10**6, shape).astype(dtype)
    return rng.integers(-4, 5, shape).astype(dtype)


def _legal_world(case):
    n = case.common
    holders = n["ep_world_size"] - n["shared_expert_rank_num"]
    return holders > 0 and isinstance(n["moe_expert_num"], int) and n["moe_expert_num"] % holders == 0


def _elastic(rng, case, noise):
    """The same table on all ranks: a smaller world, or noise behind a flag of 0."""
    n = case.common
    table, experts = noise[0, 0].copy(), n["moe_expert_num"]
    if (
        case.elastic == "on"
        and _legal_world(case)
        and noise.shape[2:] == (4 + 2 * case.world,)
        and noise.dtype == np.int32
    ):
        special = sum(n.get(name) or 0 for name in NUMBERS)
        names = types.SimpleNamespace(
            world=case.world, num_shared=n["shared_expert_num"], shared_ranks=n["shared_expert_rank_num"],
            local_experts=n["moe_expert_num"] // (case.world - n["shared_expert_rank_num"]),
            experts=n["moe_expert_num"], num_special=special, top_k=case.shared["expert_ids"][0][1],
        )  # fmt: skip
        worlds = elastic_worlds(names)
        if worlds:
            size, shared, experts = worlds[rng.integers(len(worlds))]
            survivors = rng.permutation(case.world)[:size].tolist()
            table = elastic_info(case.world, survivors, shared, experts)
    elif noise.shape[2:]:
        table[:1] = 0
    return np.broadcast_to(table, noise.shape).copy(), experts


def _ids(rng, case, ids, num_experts):
    """Distinct within a row, where there are enough."""
    numbers = [num_experts, *(case.common.get(name, 0) for name in NUMBERS)]
    if ids.dtype != np.int32 or not all(isinstance(value, int) and 0 <= value < 2**16 for value in numbers):
        return ids
    special = sum(numbers[1:])
    if ids.shape[-1] > num_experts + special or num_experts < 1:
        return ids
    return expert_ids(rng, ids.shape, num_experts, special)


# --- what comes of a case ---------------------------------------------------------------------------------------------


def run(case: Case, drawn, *, runs: bool) -> tuple[Any, Any]:
    """The outputs of dispatch and of combine on all ranks, or the status where one was refused.

    None stands for both outputs if the program does not run, but is only traced.
    """
    spec = PartitionSpec(("node", "ep") if case.nodes > 1 else "ep", "tp")
    nodes = {"nodes": case.nodes} if case.nodes > 1 else {}
    mesh = moe.make_mesh(ep=case.world, tp=case.tp, **nodes)
    refused = {}

    def shard(drawn):
        drawn = jax.tree.map(lambda a: a[0, 0], drawn)
        arrays = drawn["dispatch"]
        dispatch = phases(case.operators[0], arrays, case.common | case.dispatch_only, case.product)
        if isinstance(dispatch, int):
            refused["dispatch"] = dispatch
            sent = None
        else:
            sent = dispatch(**arrays)
        arrays = _poisoned(case, drawn["combine"], sent) | _fed(case, sent)
        combine = phases(case.operators[1], arrays, case.common | case.combine_only, case.product)
        if isinstance(combine, int):
            refused["combine"] = combine
        out = None if sent is None or isinstance(combine, int) else combine(**arrays)
        return jax.tree.map(lambda a: a[None, None], (sent, out))

    program = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))
    lowered = lower(program, drawn) if runs else trace(program, drawn)
    if refused.keys() == {"dispatch", "combine"}:
        return refused["dispatch"], refused["combine"]
    sent, out = (None, None) if lowered is None else jax.tree.map(np.asarray, lowered.compile()(drawn))
    return refused.get("dispatch", sent), refused.get("combine", out)


def _poisoned(case, arrays, sent):
    """NaN in rows of ``expand_x`` past those that came: nobody may read them."""
    rows = arrays.get("expand_x")
    if sent is None or rows is None or rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.inexact):
        return arrays
    nums = sent.expert_token_nums
    came = jnp.sum(nums) if case.dispatch_only["expert_token_nums_type"] == 1 else jnp.max(nums)
    return arrays | {"expand_x": jnp.where(jnp.arange(rows.shape[0])[:, None] < came, rows, jnp.nan)}


def _fed(case, sent):
    """What combine gets of dispatch; arrays of the same shapes where dispatch was refused."""
    names = {"assist_info_for_combine": "assist_info_for_combine", "ep_send_counts": "ep_recv_counts"}
    names |= {"tp_send_counts": "tp_recv_counts", "expand_scales": "expand_scales"}
    if sent is not None:
        found = {name: getattr(sent, names[name]) for name in case.feeds}
        return {name: value for name, value in found.items() if value is not None}
    n = case.common
    experts = n["moe_expert_num"] if isinstance(n["moe_expert_num"], int) else 1
    holders = n["ep_world_size"] - n["shared_expert_rank_num"]
    local, rows = experts // holders if holders > 0 else 1, 1
    if isinstance(n["moe_expert_num"], int) and isinstance(n["global_bs"], int):
        rows = case.capacity
    shapes = {"assist_info_for_combine": rows * 128, "ep_send_counts": n["ep_world_size"] * local * case.tp}
    shapes |= {"tp_send_counts": 2, "expand_scales": rows}
    kinds = {"expand_scales": jnp.float32}
    return {name: jnp.zeros(max(shapes[name], 0), kinds.get(name, jnp.int32)) for name in case.feeds}


def check(case: Case, drawn, *, runs: bool) -> str:
    """Raises ``Broken`` where a law is broken; else says what came of the case. The second law is asked if it runs."""
    two_ranks = case.common["tp_world_size"] == 2
    if case.tp != (2 if two_ranks else 1):  # the mesh follows the call
        case = dataclasses.replace(case, tp=2 if two_ranks else 1)
        if case.world * case.tp > DEVICES:
            return "too large"
        drawn = draw(np.random.default_rng(0), case)
    sent, out = run(case, drawn, runs=runs)
    if isinstance(sent, int):
        return f"dispatch refused with {sent}"
    expected = _compare_dispatch(case, drawn["dispatch"], sent) if runs else None
    if isinstance(out, int):
        return f"combine refused with {out}"
    if not runs:
        return "accepted"
    _compare_combine(case, drawn["combine"], expected, out)
    return "equal"


def _oracle_form(case, arrays, names):
    """All-ranks arrays as the oracle takes them: [W, ...], or [W, 2, ...] with two tp ranks."""
    found = {name: arrays[name] if case.tp == 2 else arrays[name][:, 0] for name in names if name in arrays}
    if "elastic_info" in found:
        found["elastic_info"] = arrays["elastic_info"][0, 0]
    return found


def _compare_dispatch(case, arrays, sent):
    names = ("x", "expert_ids", "scales", "x_active_mask", "expert_scales", "elastic_info")
    numbers = dict(case.common) | case.dispatch_only
    for name in ("group_ep", "ep_world_size", "group_tp", "comm_alg", "expert_shard_type"):
        numbers.pop(name, None)
    given = _oracle_form(case, arrays, names)
    if given["x"].dtype.name == "float4_e2m1fn":
        given["x"] = given["x"].view(np.uint8)
    x, ids = given.pop("x"), given.pop("expert_ids")
    if numbers["quant_mode"] == 0:  # y_dtype is then that of x, or None
        numbers["y_dtype"] = None
    elif numbers["y_dtype"] is None:
        numbers["y_dtype"] = "int8" if numbers["quant_mode"] < 3 else "float8_e4m3fn"
    elif numbers["y_dtype"] == "uint8":
        numbers["y_dtype"] = "float4_e2m1fn"
    expected = oracle.moe_distribute_dispatch(x, ids, **given, **numbers)
    for name in aclnn.DispatchOutput._fields:
        got, want = getattr(sent, name), getattr(expected, name)
        if (got is None) != (want is None):
            raise Broken(f"{name} is {'' if got is None else 'not '}None")
        if got is not None:
            same(got, want, name)
    _check_clock(sent, arrays)
    return expected


def _check_clock(result, arrays):
    if "performance_info" in arrays:
        waited = result.performance_info - arrays["performance_info"]
        if not ((waited >= 0) & (waited < 10**9)).all():
            raise Broken(f"performance_info grew by {waited.ravel()[:8]}")


def _compare_combine(case, arrays, expected, out):
    names = ("x_active_mask", "shared_expert_x", "elastic_info", "ori_x", *CONSTANTS)
    numbers = dict(case.common) | {"comm_quant_mode": case.combine_only.get("comm_quant_mode", 0)}
    for name in ("group_ep", "ep_world_size", "group_tp", "comm_alg", "expert_shard_type", "global_bs"):
        numbers.pop(name, None)
    numbers["nodes"] = case.nodes if case.common["comm_alg"] == "hierarchy" else 1
    if "expand_scales" not in case.feeds:
        expected = dataclasses.replace(expected, expand_scales=None)
    given = _oracle_form(case, arrays, (*names, "expand_x", "expert_ids", "expert_scales", "residual_x", "gamma"))
    operands = (given.pop("expand_x"), given.pop("expert_ids"), expected, given.pop("expert_scales"))
    if case.combine == COMBINE:
        want = oracle.moe_distribute_combine(*operands, **given, **numbers)
        _close(case, out.x_out, want.x_out, want.unrounded, "x_out")
        _check_clock(out, arrays)
        return
    norm = (given.pop("residual_x"), given.pop("gamma"))
    eps = case.combine_only.get("norm_eps", 1e-6)
    want = oracle.moe_distribute_combine_add_rms_norm(*operands, *norm, **given, **numbers, norm_eps=eps)
    _close(case, out.x_out, want.x, want.unrounded, "x_out")
    np.testing.assert_allclose(out.rstd_out.reshape(want.rstd.shape), want.rstd, rtol=1e-5)
    y, exact = (np.asarray(a, np.float64) for a in (out.y_out.reshape(want.y.shape), want.y))
    np.testing.assert_allclose(y, exact, rtol=2**-6, atol=2**-7 * np.abs(exact).max(initial=0))


def _close(case, got, rounded, unrounded, name):
    """Equal where nothing is quantised on its way back: sums of these numbers are exact in fp32."""
    if not case.combine_only.get("comm_quant_mode", 0):
        same(got, rounded, name)
        return
    got = np.asarray(got, np.float64).reshape(rounded.shape)
    size = np.abs(unrounded).max(initial=0)
    if not (np.abs(got - rounded.astype(np.float64)) <= 2.0**-7 * np.abs(unrounded) + 1e-5 * size + 1e-6).all():
        raise Broken(f"{name} differs from the oracle by up to {np.abs(got - rounded.astype(np.float64)).max()}")


def one(rng: np.random.Generator) -> tuple[Case, Any]:
    """A case, and how to ask the laws of it: a function of whether to run it, which says what came of it."""
    case = legal(rng)
    if rng.random() < 0.5:
        case = changed(rng, case)
    return case, lambda runs: check(case, draw(rng, case), runs=runs)
