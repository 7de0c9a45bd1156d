"""Every way to misuse a public function, one row each: which error it is, and the words that its text must hold.

A row is (id, a call, the error, the words): the argument's name, the value that came and, where there is one, the
remedy. The calls fail while they are traced, so nothing here is compiled.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat
from moe_jax.errors import (
    ConfigError,
    DeviceInitError,
    DtypeError,
    InvalidArgumentError,
    MeshError,
    MissingArgumentError,
    MoEError,
    ShapeError,
    UnsupportedError,
)

BUILTIN = {
    ConfigError: ValueError,
    DeviceInitError: RuntimeError,
    DtypeError: TypeError,
    InvalidArgumentError: ValueError,
    MeshError: ValueError,
    MissingArgumentError: TypeError,
    ShapeError: ValueError,
    UnsupportedError: NotImplementedError,
}
NOISE = ("Traceback", "jax._src", "jaxlib", "site-packages", "XlaRuntimeError", "object at 0x", ".py")

T, H, E, K, F, L = 4, 8, 8, 2, 6, 4  # per device: tokens, hidden, experts, choices, width, local experts
SIZES = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32"}
MESH = mesh_of(2, 2)
PLAN = moe.make_plan(MESH, **SIZES)
SHARED_PLAN = moe.make_plan(MESH, **SIZES, num_shared_experts=1)
REPLICATED_PLAN = moe.make_plan(moe.make_mesh(ep=2, tp=2, dp=2), **SIZES)
NODES_PLAN = moe.make_plan(moe.make_mesh(ep=4, nodes=2), **SIZES)
ROUTER = moe.RouterConfig()
BIASED = moe.RouterConfig(selection_bias=True)

X = np.ones((T, H), np.float32)
IDS = np.zeros((T, K), np.int32)
WEIGHTS = np.ones((T, K), np.float32)
LOGITS = np.ones((T, E), np.float32)
NOT_COUNTS = [0, -1, True, 2.0, "2", None, [2], math.nan]
NOT_ARRAYS = [(None, MissingArgumentError, "is None"), ([1.0], DtypeError, "is a list"), ("x", DtypeError, "is a str")]


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def on_shards(function, mesh=MESH):
    """Traces ``function()`` once per shard of ``mesh``."""

    def body():
        function()
        return jnp.zeros(())

    return jax.eval_shape(_compat.shard_map(body, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False))


def call(function, **legal):
    """What makes a call with some of its ``legal`` arguments replaced."""
    return lambda **changes: lambda: function(**legal | changes)


def sharded(function, **legal):
    """The same for a function that must run inside ``shard_map``."""
    return lambda mesh=MESH, **changes: lambda: on_shards(lambda: function(**legal | changes), mesh)


def rows_for(group, make, table):
    """Rows of one function; ``table`` has (the arguments that are wrong, the error, its words)."""
    return [
        pytest.param(make(**changes), error, words, id=f"{group}-{number}-{'-'.join(changes) or 'plain'}")
        for number, (changes, error, *words) in enumerate(table)
    ]


def not_counts(name, values=NOT_COUNTS):
    return [({name: value}, InvalidArgumentError, f"{name}={value!r}", "whole number") for value in values]


def not_arrays(name):
    return [({name: value}, error, f"{name} {word}") for value, error, word in NOT_ARRAYS]


def unknown(name, word, near):
    return [
        ({name: word}, InvalidArgumentError, f"{name}={word!r}", f"did you mean {near!r}?"),
        ({name: None}, InvalidArgumentError, f"{name}=None", "known:", near),
        ({name: 3}, InvalidArgumentError, f"{name}=3", near),
        ({name: np.array([near])}, InvalidArgumentError, name, near),
        ({name: [near]}, InvalidArgumentError, f"{name}=[{near!r}]"),
    ]


# --- devices and meshes ----------------------------------------------------------------------------------------------

DEVICES = [
    *rows_for("emulate_devices", call(moe.emulate_devices), not_counts("num_devices")),
    *rows_for(
        "emulate_devices",
        call(moe.emulate_devices),
        [({"num_devices": 9}, DeviceInitError, "num_devices=9", "8 cpu device", "before anything")],
    ),
    *rows_for(
        "make_mesh",
        call(moe.make_mesh),
        [
            *(row for name in ("ep", "tp", "nodes", "dp") for row in not_counts(name)),
            ({"ep": 16}, MeshError, "needs 16 devices", "JAX shows 8", "emulate_devices(16)"),
            ({"ep": 4, "tp": 2, "dp": 2}, MeshError, "needs 16 devices"),
            ({"ep": np.int8(16), "tp": np.int8(16)}, MeshError, "needs 256 devices"),
            ({"ep": 4, "nodes": 3}, InvalidArgumentError, "nodes=3", "ep=4"),
        ],
    ),
]

# --- plans -----------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "quant": ("int4", None, 0),
    "combine_quant": ("fp8", False),
    "backward_quant": ("fp8", True),
    "product": ("v5e", "", 0),
}
MAY_BE_ZERO = (
    "tokens_per_rank",
    "num_shared_ranks",
    *(f"num_{kind}_experts" for kind in ("shared", "zero", "copy", "const")),
)
_ONE_DEVICE = np.array(jax.devices()[:1])

PLANS = rows_for(
    "make_plan",
    call(moe.make_plan, mesh=MESH, **SIZES),
    [
        *(row for name in ("hidden", "num_experts", "top_k") for row in not_counts(name)),
        *(row for name in MAY_BE_ZERO for row in not_counts(name, NOT_COUNTS[1:])),
        ({"hidden": jnp.zeros(3)}, InvalidArgumentError, "hidden=", "whole number"),
        ({"num_experts": 9}, InvalidArgumentError, "num_experts=9", "not divisible by ep=2", "use 10"),
        ({"top_k": 9}, InvalidArgumentError, "top_k=9", "exceeds num_experts=8"),
        ({"top_k": 12, "num_zero_experts": 3}, InvalidArgumentError, "top_k=12", "the 11 experts of all kinds"),
        ({"num_shared_ranks": 1}, InvalidArgumentError, "num_shared_ranks=1", "num_shared_experts=0"),
        ({"num_shared_ranks": 1, "num_shared_experts": 2}, InvalidArgumentError, "num_shared_ranks=1", "multiple of"),
        ({"num_shared_ranks": 2, "num_shared_experts": 1}, InvalidArgumentError, "num_shared_ranks=2", "leaves none"),
        ({"num_experts": 2**31, "top_k": 1}, InvalidArgumentError, f"num_experts={2**31}", "2**31"),
        ({"num_experts": 10**30 + 1}, InvalidArgumentError, f"num_experts={10**30 + 1}", f"use {10**30 + 2}", "2**31"),
        ({"tokens_per_rank": 2**29}, InvalidArgumentError, f"tokens_per_rank={2**29}", "2**31", "more devices"),
        *unknown("dtype", "floot32", "float32"),
        ({"dtype": jnp.int8}, InvalidArgumentError, "dtype=", "int8", "known: bfloat16, float16, float32"),
        ({"dtype": "float64"}, InvalidArgumentError, "dtype='float64'"),
        *unknown("transport", "paded", "padded"),
        *unknown("overflow", "droples", "dropless"),
        *unknown("backend", "cpuu", "cpu"),
        *(
            ({"capacity_factor": value}, InvalidArgumentError, f"capacity_factor={value!r}", "positive and finite")
            for value in (0, 0.0, -1.5, math.nan, math.inf, -math.inf, np.float32(math.inf))
        ),
        *(
            ({"capacity_factor": value}, InvalidArgumentError, f"capacity_factor={value!r}", "a number, or None")
            for value in (True, "1.25", [1.0], 1j)
        ),
        *(({"poison": value}, InvalidArgumentError, f"poison={value!r}", "True or False") for value in (1, "no", None)),
        *(
            ({name: value}, InvalidArgumentError, f"{name}={value!r} is unknown", "known:")
            for name, values in UNKNOWN.items()
            for value in values
        ),
        *(({"mesh": mesh}, MeshError, f"mesh={mesh!r}", "moe_jax.make_mesh") for mesh in (None, 8, {"ep": 2}, "ep=2")),
        ({"mesh": Mesh(_ONE_DEVICE, ("x",))}, MeshError, "mesh", "('x',)", "lacks 'ep'", "ep_axis="),
        ({"mesh": AbstractMesh((0, 1), ("ep", "tp"))}, MeshError, "mesh", "'ep': 0", "size 0"),
    ],
)

# --- routers ---------------------------------------------------------------------------------------------------------

ROUTING = [
    *rows_for(
        "RouterConfig",
        call(moe.RouterConfig),
        [
            ({"score": "softmx"}, InvalidArgumentError, "score='softmx'", "did you mean 'softmax'?"),
            ({"score": None}, InvalidArgumentError, "score=None", "expected str"),
            ({"group_score": "top3"}, InvalidArgumentError, "group_score='top3'", "did you mean 'top2'?"),
            ({"scale": 0.0}, InvalidArgumentError, "scale=0.0", "above zero"),
            ({"scale": math.nan}, InvalidArgumentError, "scale=nan"),
            ({"scale": "1"}, InvalidArgumentError, "scale='1'", "expected float"),
            ({"num_groups": 0}, InvalidArgumentError, "num_groups=0", "above zero"),
            ({"num_groups": True}, InvalidArgumentError, "num_groups=True", "expected int"),
            ({"num_groups": 2.0}, InvalidArgumentError, "num_groups=2.0", "expected int"),
            ({"top_groups": 2}, InvalidArgumentError, "top_groups=2 exceeds num_groups=1", "lower top_groups"),
            ({"renormalize": 1}, InvalidArgumentError, "renormalize=1", "expected bool"),
            ({"selection_bias": None}, InvalidArgumentError, "selection_bias=None", "expected bool"),
            ({"score": "x", "scale": -1.0}, InvalidArgumentError, "2 problems", "score='x'", "scale=-1.0"),
        ],
    ),
    *rows_for(
        "route",
        call(moe.route, logits=LOGITS, router=ROUTER, top_k=K),
        [
            *not_arrays("logits"),
            ({"logits": zeros(E)}, ShapeError, "logits", "(8,)", "[T, E]"),
            ({"logits": zeros(1, T, E)}, ShapeError, "logits", "(1, 4, 8)", "[T, E]"),
            ({"logits": zeros(T, E, dtype=np.int32)}, DtypeError, "logits", "int32", "float32"),
            ({"logits": zeros(T, E, dtype=np.float64)}, DtypeError, "logits", "float64", "float32"),
            ({"logits": jax.random.split(jax.random.key(0), (T, E))}, DtypeError, "logits", "key<"),
            ({"router": None}, MissingArgumentError, "router is None", "moe_jax.RouterConfig"),
            ({"router": {}}, InvalidArgumentError, "router is a dict", "moe_jax.RouterConfig"),
            ({"router": "softmax"}, InvalidArgumentError, "router is a str"),
            ({"router": moe.RouterConfig(num_groups=3)}, InvalidArgumentError, "router.num_groups=3", "8 experts"),
            *not_counts("top_k"),
            ({"top_k": 9}, InvalidArgumentError, "top_k=9", "exceeds 8"),
            ({"router": moe.RouterConfig(num_groups=8)}, InvalidArgumentError, "top_k=2", "exceeds 1"),
            ({"router": moe.RouterConfig(num_groups=5)}, InvalidArgumentError, "2 problems", "router.num_groups=5"),
            ({"router": BIASED}, MissingArgumentError, "bias is missing", "selection_bias"),
            ({"bias": zeros(E)}, InvalidArgumentError, "bias was given", "selection_bias"),
            ({"router": BIASED, "bias": [0.0] * E}, DtypeError, "bias is a list"),
            ({"router": BIASED, "bias": zeros(E + 1)}, ShapeError, "bias", "(9,)", "(8,)"),
            ({"router": BIASED, "bias": zeros(E, dtype=np.int32)}, DtypeError, "bias", "int32", "floating"),
            ({"token_mask": [True] * T}, DtypeError, "token_mask is a list"),
            ({"token_mask": zeros(T, dtype=np.int8)}, DtypeError, "token_mask", "int8", "bool", ".astype(bool)"),
            ({"token_mask": zeros(T, K, dtype=bool)}, ShapeError, "token_mask", "(4, 2)", "(4,)"),
            ({"axis_name": "ep"}, MeshError, "axis_name='ep'", "shard_map"),
            ({"axis_name": ()}, InvalidArgumentError, "axis_name=()", "name of a mesh axis"),
            ({"axis_name": 0}, InvalidArgumentError, "axis_name=0"),
        ],
    ),
    *rows_for(
        "update_selection_bias",
        call(moe.update_selection_bias, bias=zeros(E), load=zeros(E, dtype=np.int32), rate=0.1),
        [
            *not_arrays("bias"),
            *not_arrays("load"),
            ({"bias": zeros(1, E)}, ShapeError, "bias", "(1, 8)", "[E]"),
            ({"bias": zeros(E, dtype=jnp.bfloat16)}, DtypeError, "bias", "bfloat16", "keep it in fp32"),
            ({"load": zeros(E - 1)}, ShapeError, "load", "(7,)", "(8,)"),
            ({"load": zeros(E, dtype=bool)}, DtypeError, "load", "bool", "integer or floating"),
            *(
                ({"rate": value}, InvalidArgumentError, f"rate={value!r}", "must be a number")
                for value in (None, "0.1", True, math.nan, math.inf, -0.1, [0.1])
            ),
            ({"rate": zeros(E)}, ShapeError, "rate", "(8,)", "a scalar"),
            ({"rate": jnp.array(True)}, DtypeError, "rate", "bool"),
        ],
    ),
]

# --- dispatch and combine --------------------------------------------------------------------------------------------

PLANS_THAT_DO_NOT_FIT = [
    ({"plan": None}, MissingArgumentError, "plan is None", "moe_jax.make_plan"),
    ({"plan": SIZES}, InvalidArgumentError, "plan is a dict", "moe_jax.make_plan"),
    ({"plan": MESH}, InvalidArgumentError, "plan is a Mesh", "moe_jax.make_plan"),
    ({"mesh": mesh_of(4, 2)}, MeshError, "ep=4, tp=2", "made for ep=2, tp=2", "make the plan from the mesh"),
    ({"mesh": Mesh(_ONE_DEVICE, ("x",))}, MeshError, "axis 'ep'", "shard_map", "moe_on_mesh"),
    ({"plan": NODES_PLAN}, MeshError, "axis 'node'", "shard_map"),
]


def misuse_combine(**changes):
    """Values of ``rows`` and ``handle`` are made from the Dispatched that is at hand."""

    def body():
        d = moe.dispatch(X, IDS, PLAN)
        arguments = {"rows": lambda d: d.x, "combine_weights": WEIGHTS, "handle": lambda d: d.handle} | changes
        moe.combine(**{name: value(d) if callable(value) else value for name, value in arguments.items()})

    return lambda: on_shards(body)


def handle_on_another_mesh():
    handles = []
    on_shards(lambda: handles.append(moe.dispatch(X, IDS, PLAN)))
    on_shards(lambda: moe.combine(handles[0].x, WEIGHTS, handles[0].handle), mesh_of(4, 2))


EXCHANGE = [
    *rows_for(
        "dispatch",
        sharded(moe.dispatch, x=X, expert_ids=IDS, plan=PLAN),
        [
            *PLANS_THAT_DO_NOT_FIT,
            *not_arrays("x"),
            *not_arrays("expert_ids"),
            ({"x": zeros(H)}, ShapeError, "x has shape (8,)", "[T, H]"),
            ({"x": zeros(1, T, H)}, ShapeError, "x has shape (1, 4, 8)", "[T, H]"),
            ({"x": zeros(T + 1, H)}, ShapeError, "x has shape (5, 8)", "(4, 8)", "token_mask"),
            ({"x": zeros(T, H + 1)}, ShapeError, "x has shape (4, 9)", "(4, 8)"),
            ({"x": zeros(T, H, dtype=jnp.bfloat16)}, DtypeError, "x has dtype bfloat16", "float32", "cast x"),
            ({"x": zeros(T, H, dtype=np.int32)}, DtypeError, "x has dtype int32"),
            ({"expert_ids": zeros(T, dtype=np.int32)}, ShapeError, "expert_ids", "(4,)", "(4, 2)"),
            ({"expert_ids": zeros(T, K + 1, dtype=np.int32)}, ShapeError, "expert_ids", "(4, 3)", "(4, 2)"),
            ({"expert_ids": WEIGHTS}, DtypeError, "expert_ids", "float32", "int32", ".astype(jnp.int32)"),
            ({"expert_ids": IDS.astype(np.int64)}, DtypeError, "expert_ids", "int64", ".astype(jnp.int32)"),
            ({"expert_ids": [[0, 1], [2]]}, DtypeError, "expert_ids is a list"),
            ({"token_mask": [True] * T}, DtypeError, "token_mask is a list"),
            ({"token_mask": zeros(T, dtype=np.int8)}, DtypeError, "token_mask", "int8", ".astype(bool)"),
            ({"token_mask": zeros(T - 1, dtype=bool)}, ShapeError, "token_mask", "(3,)", "(4,)"),
            ({"token_mask": zeros(T, E, dtype=bool)}, ShapeError, "token_mask", "(4, 8)", "(4, 2)"),
            ({"token_mask": np.True_}, DtypeError, "token_mask", "not an array"),
            ({"token_mask": np.array(True)}, ShapeError, "token_mask", "()", "(4,)"),
        ],
    ),
    pytest.param(
        lambda: moe.dispatch(X, IDS, PLAN), MeshError, ["axis 'ep'", "inside jax.shard_map"], id="dispatch-outside"
    ),
    *rows_for(
        "combine",
        misuse_combine,
        [
            *not_arrays("rows"),
            *not_arrays("combine_weights"),
            ({"rows": lambda d: d.x[0]}, ShapeError, "rows has shape (8,)", "[M, H]"),
            ({"rows": lambda d: d.x[1:]}, ShapeError, "rows has shape (31, 8)", "(32, 8)", "dispatch gave"),
            ({"rows": lambda d: d.x[:, 1:]}, ShapeError, "rows has shape (32, 7)", "(32, 8)"),
            ({"rows": lambda d: d.x.astype(jnp.bfloat16)}, DtypeError, "rows", "bfloat16", "float32"),
            ({"combine_weights": zeros(T)}, ShapeError, "combine_weights", "(4,)", "(4, 2)"),
            ({"combine_weights": IDS}, DtypeError, "combine_weights", "int32", ".astype(jnp.float32)"),
            ({"handle": None}, MissingArgumentError, "handle is None", "dispatch returned"),
            ({"handle": lambda d: d}, InvalidArgumentError, "handle is a Dispatched", "pass the .handle"),
            ({"handle": lambda d: d.handle.maps}, InvalidArgumentError, "handle is a GatherMaps"),
            ({"shared_x": [1.0]}, DtypeError, "shared_x is a list"),
            ({"shared_x": zeros(T + 1, H)}, ShapeError, "shared_x", "(5, 8)", "(4, 8)"),
            ({"shared_x": zeros(T, H, dtype=jnp.bfloat16)}, DtypeError, "shared_x", "bfloat16", "float32"),
        ],
    ),
    pytest.param(
        handle_on_another_mesh, MeshError, ["ep=4, tp=2", "made for ep=2, tp=2"], id="combine-on-another-mesh"
    ),
]

# --- the layer -------------------------------------------------------------------------------------------------------


def params_of(experts, ffn):
    return {
        "router": zeros(H, E),
        "w_gate": zeros(experts, H, ffn),
        "w_up": zeros(experts, H, ffn),
        "w_down": zeros(experts, ffn, H),
    }


def wrong_params(experts, ffn):
    """What can be wrong with the parameters of ``experts`` experts of width ``ffn``, by name of the argument."""
    legal = params_of(experts, ffn)
    w_up = "(" + ", ".join(map(str, legal["w_up"].shape)) + ")"

    def without(*names):
        return {"params": {name: value for name, value in legal.items() if name not in names}}

    def replaced(**values):
        return {"params": legal | values}

    return [
        ({"params": None}, MissingArgumentError, "params is None", "dict"),
        ({"params": list(legal.values())}, InvalidArgumentError, "params is a list", "dict of arrays"),
        (without("w_up"), InvalidArgumentError, "params", "'w_up' is missing", w_up),
        (without("router"), InvalidArgumentError, "params", "'router' is missing", "(8, 8)"),
        (without(*legal), InvalidArgumentError, "params: 4 problems", *(f"{name!r} is missing" for name in legal)),
        (replaced(w_upp=legal["w_up"]), InvalidArgumentError, "params", "'w_upp' is unknown", "did you mean 'w_up'?"),
        (replaced(**{"": zeros(1)}), InvalidArgumentError, "params", "'' is unknown"),
        ({"params": legal | {3: zeros(1)}}, InvalidArgumentError, "params", "3 is unknown", "known:"),
        (replaced(shared_up=zeros(H, F)), InvalidArgumentError, "'shared_up' is unknown here"),
        (replaced(selection_bias=zeros(E)), InvalidArgumentError, "'selection_bias' is unknown here"),
        (replaced(w_up=zeros(experts + 1, H, ffn)), InvalidArgumentError, "'w_up' has shape", w_up),
        (replaced(w_down=zeros(experts, ffn + 2, H)), InvalidArgumentError, "'w_down' has shape", f"{ffn + 2}"),
        (replaced(w_gate=zeros(H, ffn)), InvalidArgumentError, "'w_gate' has shape", "expected " + w_up),
        (replaced(w_up=zeros()), InvalidArgumentError, "'w_up' has shape ()", "expected " + w_up),
        (replaced(router=zeros(E + 1, H)), InvalidArgumentError, "'router' has shape (9, 8)", "(8, 8)"),
        (replaced(router=zeros(H, E - 2)), MissingArgumentError, "table is missing", "6 experts", "placement.table()"),
        (replaced(w_up=None), InvalidArgumentError, "'w_up' is None"),
        (replaced(w_up=[1.0]), InvalidArgumentError, "'w_up' is a list"),
        (replaced(w_up=legal["w_up"].astype(np.int8)), InvalidArgumentError, "'w_up' has dtype int8", "floating"),
        (replaced(b_up=zeros(experts, ffn + 1)), InvalidArgumentError, "'b_up' has shape"),
        (replaced(w_up=None, w_upp=zeros(1), router=zeros(1)), InvalidArgumentError, "3 problems", "'router'"),
        (replaced() | {"router": BIASED}, InvalidArgumentError, "'selection_bias' is missing", "(8,)"),
        (replaced() | {"activation": "gelu"}, InvalidArgumentError, "'w_gate' is unknown here"),
        (replaced() | {"plan": SHARED_PLAN}, InvalidArgumentError, "3 problems", "'shared_up' is missing"),
    ]


def apply(mesh=MESH, plan=PLAN, router=ROUTER, activation="swiglu", **arguments):
    jax.eval_shape(lambda: moe.moe_on_mesh(mesh, plan, router, ffn=F, activation=activation)[1](**arguments))


GLOBAL_X = zeros(4 * T, H)
WRONG_ROUTERS = [
    ({"router": None}, MissingArgumentError, "router is None", "moe_jax.RouterConfig"),
    ({"router": {"score": "softmax"}}, InvalidArgumentError, "router is a dict", "moe_jax.RouterConfig"),
]
GROUPS_THAT_DO_NOT_FIT = [
    (
        {"router": moe.RouterConfig(num_groups=3)},
        InvalidArgumentError,
        "router and plan: router.num_groups=3 does not divide the 8 experts",
        "take a divisor",
    ),
    (
        {"router": moe.RouterConfig(num_groups=8)},
        InvalidArgumentError,
        "router and plan: plan.top_k=2 exceeds 1",
        "router.top_groups=1",
        "raise top_groups or lower top_k",
    ),
    (
        {"router": moe.RouterConfig(num_groups=5)},
        InvalidArgumentError,
        "router and plan: 2 problems",
        "router.num_groups=5",
        "plan.top_k=2 exceeds 1",
    ),
]

LAYER = [
    *rows_for(
        "moe_layer",
        sharded(moe.moe_layer, params=params_of(L, F // 2), x=X, plan=PLAN, router=ROUTER),
        [
            *PLANS_THAT_DO_NOT_FIT,
            ({"plan": REPLICATED_PLAN}, MeshError, "axis 'dp'", "shard_map"),
            *WRONG_ROUTERS,
            *not_arrays("x"),
            ({"x": zeros(T + 1, H)}, ShapeError, "x has shape (5, 8)", "(4, 8)", "token_mask"),
            ({"x": zeros(T, H, dtype=np.float16)}, DtypeError, "x has dtype float16", "float32", "cast x"),
            ({"token_mask": [True]}, DtypeError, "token_mask is a list"),
            ({"token_mask": zeros(T, K, dtype=bool)}, ShapeError, "token_mask", "(4, 2)", "(4,)"),
            ({"token_mask": zeros(T, dtype=np.int8)}, DtypeError, "token_mask", "int8", "bool"),
            *unknown("activation", "swigul", "swiglu"),
            *wrong_params(L, F // 2),
            *GROUPS_THAT_DO_NOT_FIT,
        ],
    ),
    pytest.param(
        lambda: moe.moe_layer(params_of(L, F), X, PLAN, ROUTER),
        MeshError,
        ["axis 'ep'", "inside jax.shard_map"],
        id="moe_layer-outside",
    ),
    *rows_for(
        "moe_on_mesh",
        call(moe.moe_on_mesh, mesh=MESH, plan=PLAN, router=ROUTER),
        [
            ({"mesh": None}, MeshError, "mesh=None", "moe_jax.make_mesh"),
            ({"mesh": PLAN}, MeshError, "mesh=Plan(", "moe_jax.make_mesh"),
            ({"mesh": mesh_of(4, 2)}, MeshError, "'ep': 4", "made for ep=2, tp=2", "make the plan from this mesh"),
            ({"mesh": moe.make_mesh(ep=2, tp=2, dp=2)}, MeshError, "'dp': 2", "make the plan from this mesh"),
            ({"mesh": Mesh(_ONE_DEVICE, ("x",))}, MeshError, "{'x': 1}", "make the plan from this mesh"),
            ({"plan": REPLICATED_PLAN}, MeshError, "make the plan from this mesh"),
            *PLANS_THAT_DO_NOT_FIT[:3],
            *WRONG_ROUTERS[1:],  # without a router, choices are made outside
            *GROUPS_THAT_DO_NOT_FIT,
            (
                {"router": moe.RouterConfig(num_groups=4, top_groups=2), "num_logical_experts": 6},
                InvalidArgumentError,
                "router.num_groups=4 does not divide the 6 experts",
            ),
            *not_counts("ffn"),
            ({"ffn": 3}, InvalidArgumentError, "ffn=3", "divisible by tp=2"),
            *unknown("activation", "swigul", "swiglu"),
            ({"use_bias": "no"}, InvalidArgumentError, "use_bias='no'", "True or False"),
        ],
    ),
    *rows_for(
        "init",
        lambda **changes: lambda: moe.moe_on_mesh(MESH, PLAN, ROUTER, ffn=F)[0](**changes),
        [
            ({"key": None}, MissingArgumentError, "key is None", "jax.random.key(0)"),
            ({"key": 0}, DtypeError, "key is an int", "not an array", "jax.random.key(0)"),
            ({"key": 7}, DtypeError, "key is an int", "jax.random.key(7)"),
            ({"key": "seed"}, DtypeError, "key is a str", "jax.random.key(0)"),
            ({"key": zeros(2)}, DtypeError, "key", "float32", "jax.random.key(0)"),
            ({"key": zeros(3, dtype=np.uint32)}, ShapeError, "key", "(3,)", "(2,)", "jax.random.key(0)"),
            ({"key": jax.random.split(jax.random.key(0))}, ShapeError, "key", "(2,)", "()"),
        ],
    ),
    *rows_for(
        "apply",
        call(apply, params=params_of(E, F), x=GLOBAL_X),
        [
            *not_arrays("x"),
            ({"x": zeros(4 * T + 1, H)}, ShapeError, "x has 17 tokens", "room for 16", "more tokens_per_rank"),
            ({"x": zeros(4 * T, H + 1)}, ShapeError, "x has shape (16, 9)", "(16, 8)", "[..., H]"),
            ({"x": GLOBAL_X.astype(np.float16)}, DtypeError, "x has dtype float16", "float32", "cast x"),
            ({"token_mask": [True]}, DtypeError, "token_mask is a list"),
            ({"token_mask": zeros(T, dtype=bool)}, ShapeError, "token_mask", "(4,)", "(16,)"),
            ({"token_mask": zeros(4 * T, dtype=np.int8)}, DtypeError, "token_mask", "int8", ".astype(bool)"),
            *wrong_params(E, F),
            *unknown("balance", "rnk", "rank"),
            ({"balance": ["rank"]}, InvalidArgumentError, "balance=['rank']", "known: load, rank, token"),
            ({"rank_table": [1, 4]}, DtypeError, "rank_table is a list"),
            ({"table": [[1, 0]]}, DtypeError, "table is a list"),
            ({"params": params_of(E, F + 1)}, InvalidArgumentError, "params: 'w_up'", "7", "divisible by tp=2"),
            ({"params": params_of(L, F // 2)}, InvalidArgumentError, "3 problems", "'w_up' has shape (4, 8, 3)"),
        ],
    ),
]

# --- kernels and back ends -------------------------------------------------------------------------------------------

INTEGERS = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")


def do_nothing():
    """Stands for a kernel that is never called."""


KERNELS = [
    *rows_for(
        "grouped_matmul",
        call(moe.grouped_matmul, lhs=zeros(5, 3), rhs=zeros(2, 3, 4), group_sizes=zeros(2, dtype=np.int32)),
        [
            *(row for name in ("lhs", "rhs", "group_sizes") for row in not_arrays(name)),
            ({"lhs": zeros(3)}, ShapeError, "lhs has shape (3,)", "[M, H]"),
            ({"lhs": zeros(5, 4)}, ShapeError, "lhs has shape (5, 4)", "(5, 3)"),
            ({"lhs": zeros(5, 3, dtype=np.int32)}, DtypeError, "lhs has dtype int32", "float32"),
            ({"lhs": zeros(5, 3, dtype=np.float64)}, DtypeError, "lhs has dtype float64", "float32"),
            ({"rhs": zeros(3, 4)}, ShapeError, "rhs has shape (3, 4)", "[G, H, N]"),
            ({"rhs": zeros(2, 3, 4, dtype=np.float16)}, DtypeError, "rhs has dtype float16", "float32", "cast"),
            ({"transpose_rhs": True}, ShapeError, "lhs has shape (5, 3)", "(5, 4)"),
            ({"transpose_rhs": None}, InvalidArgumentError, "transpose_rhs=None", "True or False"),
            ({"transpose_rhs": "no"}, InvalidArgumentError, "transpose_rhs='no'"),
            ({"rhs": zeros(0, 3, 4)}, ShapeError, "rhs has shape (0, 3, 4)", "at least one matrix"),
            ({"group_sizes": zeros(3, dtype=np.int32)}, ShapeError, "group_sizes", "(3,)", "(2,)"),
            ({"group_sizes": zeros(2)}, DtypeError, "group_sizes", "float32", ".astype(jnp.int32)"),
            ({"group_sizes": np.array([2, 3])}, DtypeError, "group_sizes", "int64", ".astype(jnp.int32)"),
            *unknown("backend", "cpuu", "cpu"),
        ],
    ),
    *rows_for(
        "ragged_all_to_all",
        sharded(
            moe.ragged_all_to_all,
            operand=zeros(4, 3),
            output=zeros(5, 3),
            axis_name="ep",
            **dict.fromkeys(INTEGERS, zeros(2, dtype=np.int32)),
        ),
        [
            *(row for name in ("operand", "output", *INTEGERS) for row in not_arrays(name)),
            ({"operand": zeros()}, ShapeError, "operand", "scalar", "[N, ...]"),
            ({"operand": zeros(4, 3, dtype=object)}, DtypeError, "operand has dtype object", "number"),
            ({"output": zeros(5)}, ShapeError, "output has shape (5,)", "[M, ...]"),
            ({"output": zeros(5, 4)}, ShapeError, "output has shape (5, 4)", "(5, 3)"),
            ({"output": zeros(5, 3, dtype=np.float16)}, DtypeError, "output has dtype float16", "float32"),
            *(({name: zeros(3, dtype=np.int32)}, ShapeError, name, "(3,)", "(2,)", "rank of ep") for name in INTEGERS),
            *(({name: zeros(2)}, DtypeError, name, "float32", "int32", ".astype(jnp.int32)") for name in INTEGERS),
            ({"axis_name": ("ep", "tp")}, ShapeError, "input_offsets", "(2,)", "(4,)", "rank of ep*tp"),
            ({"axis_name": "nowhere"}, MeshError, "axis_name='nowhere'", "shard_map"),
            ({"axis_name": ("ep", "nowhere")}, MeshError, "axis_name='nowhere'"),
            *(
                ({"axis_name": name}, InvalidArgumentError, f"axis_name={name!r}", "name of a mesh axis")
                for name in (None, (), 1, ("ep", 1), ("ep", "ep"), {"ep"})
            ),
        ],
    ),
    *rows_for(
        "Backend",
        call(moe.Backend, name="mine"),
        [
            *(({"name": name}, InvalidArgumentError, f"name={name!r}") for name in ("auto", "", None, 3, ["cpu"])),
            ({"platforms": ("cuda",)}, InvalidArgumentError, "platforms of back end 'mine'", "'cuda'", "gpu"),
            ({"platforms": "cpu"}, InvalidArgumentError, "platforms of back end 'mine'", "'cpu'", "a tuple of words"),
            ({"platforms": None}, InvalidArgumentError, "platforms of back end 'mine'", "None", "known: cpu, gpu, tpu"),
            ({"kernels": {"grouped_matmull": do_nothing}}, InvalidArgumentError, "kernels", "did you mean"),
            ({"kernels": ["grouped_matmul"]}, InvalidArgumentError, "kernels of back end 'mine'", "dict from words"),
            ({"kernels": {"grouped_matmul": 3}}, InvalidArgumentError, "kernels", "'grouped_matmul' is 3", "function"),
            ({"kernels": None}, InvalidArgumentError, "kernels of back end 'mine'", "None"),
            ({"transports": {"raged": do_nothing}}, InvalidArgumentError, "transports", "did you mean 'ragged'?"),
            ({"transports": {"ragged": None}}, InvalidArgumentError, "transports", "'ragged' is None", "function"),
            ({"transports": do_nothing}, InvalidArgumentError, "transports of back end 'mine'", "dict from words"),
        ],
    ),
    *rows_for(
        "register_backend",
        call(moe.register_backend, backend=moe.Backend(name="cpu")),
        [
            ({}, InvalidArgumentError, "name='cpu'", "replace=True"),
            ({"backend": None}, MissingArgumentError, "backend is None", "moe_jax.Backend"),
            ({"backend": "cpu"}, InvalidArgumentError, "backend is a str", "moe_jax.Backend"),
            ({"backend": {"name": "mine"}}, InvalidArgumentError, "backend is a dict", "moe_jax.Backend"),
            ({"replace": "no"}, InvalidArgumentError, "replace='no'", "True or False"),
        ],
    ),
    *rows_for(
        "resolve_backend",
        call(moe.resolve_backend, kernel="grouped_matmul"),
        [
            *unknown("kernel", "grouped_matmull", "grouped_matmul"),
            ({"name": "cpuu"}, InvalidArgumentError, "backend='cpuu'", "did you mean 'cpu'?"),
            ({"name": None}, InvalidArgumentError, "backend=None", "known:"),
            ({"name": ["cpu"]}, InvalidArgumentError, "backend=['cpu']"),
            ({"platform": "cuda"}, InvalidArgumentError, "platform='cuda'", "known: cpu, gpu, tpu"),
            ({"platform": ""}, InvalidArgumentError, "platform=''", "known: cpu, gpu, tpu"),
            ({"platform": 3}, InvalidArgumentError, "platform=3"),
            ({"kernel": "padded", "name": "cpu"}, UnsupportedError, "backend='cpu'", "'padded'", "choose 'auto'"),
        ],
    ),
]


# --- what must happen ------------------------------------------------------------------------------------------------


def check_clear(call, error, words):
    """``call`` raises ``error``, and its text is for people: it names what is wrong and nothing of the inside."""
    with pytest.raises(MoEError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error, f"{caught.value!r}"
    assert isinstance(caught.value, BUILTIN[error])
    assert [word for word in words if word not in text] == [], text
    assert [word for word in NOISE if word in text] == [], text
    assert len(text) < 1000 and ("problems:\n" in text or "\n" not in text), text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "raised while another was handled"


@pytest.mark.parametrize(("call", "error", "words"), [*DEVICES, *PLANS, *ROUTING, *EXCHANGE, *LAYER, *KERNELS])
def test_misuse_is_one_clear_error(call, error, words):
    check_clear(call, error, words)


def test_make_plan_reports_everything_at_once():
    wrong = {"hidden": -8, "top_k": True, "dtype": "int8", "transport": "paded", "overflow": 3, "backend": "cpuu"}
    wrong |= {"capacity_factor": math.nan, "quant": "int4", "num_zero_experts": -2, "poison": "yes"}
    words = [f"{name}={value!r}" for name, value in wrong.items()]
    check_clear(lambda: moe.make_plan(MESH, **SIZES | wrong), InvalidArgumentError, ["10 problems", *words])


def test_make_plan_reports_relations_beside_the_rest():
    """A rule between sizes is checked where these are sizes, whatever is wrong with the others."""
    wrong = {"num_experts": 7, "top_k": 9, "transport": "paded", "hidden": -8}
    words = ["4 problems", "num_experts=7 is not divisible", "top_k=9 exceeds", "transport='paded'", "hidden=-8"]
    check_clear(lambda: moe.make_plan(MESH, **SIZES | wrong), InvalidArgumentError, words)
    words = ["5 problems", "multiple of num_shared_experts=0", "num_shared_ranks=2 leaves none", *words[2:]]
    check_clear(lambda: moe.make_plan(MESH, **SIZES | wrong, num_shared_ranks=2), InvalidArgumentError, words)


def test_make_plan_reports_a_wrong_mesh_beside_the_rest():
    mesh, wrong = Mesh(_ONE_DEVICE, ("expert",)), {"tokens_per_rank": -1, "top_k": 9, "quant": "int3"}
    words = ["4 problems", "('expert',)", "lacks 'ep'", "tokens_per_rank=-1", "top_k=9", "quant='int3'"]
    check_clear(lambda: moe.make_plan(mesh, **SIZES | wrong), MeshError, words)


def test_make_plan_reports_what_a_product_refuses_beside_the_rest():
    """Each quantity by itself: a size that is none, or an unknown recipe, hides no other."""
    wrong = {"top_k": 0, "hidden": 1000, "quant": "int3", "combine_quant": "mx_e4m3", "tokens_per_rank": 600}
    words = [f"{name}={value!r}" for name, value in wrong.items()]
    wrong |= {"dtype": jnp.bfloat16, "product": "a3"}
    words += ["6 problems", "tp=2 with 4 experts per rank"]
    check_clear(lambda: moe.make_plan(MESH, **SIZES | wrong), InvalidArgumentError, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file", "TOML file"]),
        ("[moe", ["is not valid TOML"]),
        (b"\xff\xfe", ["is not valid TOML"]),
        ("", ["section 'moe' is missing"]),
        ("[moe]\nnum_experts = 8\ntopk = 2\nffn = 4", ["[moe]", "unknown key 'topk'", "did you mean 'top_k'?"]),
        ("[mo]", ["unknown section 'mo'", "did you mean 'moe'?"]),
        ("moe = 3", ["'moe' is a single value"]),
        ("[moe]\nnum_experts = 8\ntop_k = 2.0\nffn = 4", ["[moe]", "top_k=2.0 is a float", "expected int"]),
        ("[moe]\nnum_experts = -8\ntop_k = 2\nffn = 0", ["[moe]", "num_experts=-8", "ffn=0", "above zero"]),
    ],
)
def test_configuration_files(tmp_path, content, words):
    path = tmp_path / "some.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_clear(lambda: moe.load_config(path), ConfigError, ["some.toml", *words])


def test_a_folder_is_no_configuration(tmp_path):
    check_clear(lambda: moe.load_config(tmp_path), ConfigError, [str(tmp_path), "cannot be read", "directory"])


def test_numpy_numbers_serve_where_numbers_are_wanted():
    sizes = {name: np.int8(value) for name, value in SIZES.items() if name != "dtype"} | {"dtype": np.dtype("float32")}
    plan = moe.make_plan(moe.make_mesh(ep=np.int64(2), tp=np.uint8(2)), **sizes, num_zero_experts=np.int32(0))
    assert plan == PLAN and hash(plan) == hash(PLAN)
    assert all(
        type(value) in (int, str, bool, tuple) for name, value in _compat.fields_of(plan).items() if name != "hardware"
    )
    scaled = [moe.make_plan(MESH, **SIZES, capacity_factor=one) for one in (1, 1.0, np.float32(1), np.int64(1))]
    assert len({plan.pair_capacity for plan in scaled}) == 1
    large = [moe.make_plan(MESH, **SIZES, capacity_factor=factor) for factor in (2, 1e308, 10**400, np.float32(3e38))]
    assert {plan.pair_capacity for plan in large} == {T * K}
    assert moe.make_plan(MESH, **SIZES | {"tokens_per_rank": np.uint8(200)}).num_pairs == 400
    moe.emulate_devices(np.int64(8))
    routing = jax.eval_shape(lambda: moe.route(LOGITS, ROUTER, top_k=np.int64(K)))
    assert routing.expert_ids.shape == (T, K)
    init, _ = moe.moe_on_mesh(MESH, PLAN, ROUTER, ffn=np.int8(F))
    assert jax.eval_shape(init, jax.random.key(0))["w_up"].shape == (E, H, F)


def test_numpy_arrays_serve_where_arrays_are_wanted():
    def body():
        d = moe.dispatch(X, IDS, PLAN, token_mask=np.ones((T, K), bool))
        moe.combine(d.x, WEIGHTS, d.handle, shared_x=X)
        moe.moe_layer(params_of(L, F // 2), X, PLAN, ROUTER, token_mask=np.ones(T, bool))

    on_shards(body)
    apply(params=params_of(E, F), x=GLOBAL_X, token_mask=np.ones(4 * T, bool))
    jax.eval_shape(lambda: moe.route(LOGITS, BIASED, top_k=K, bias=zeros(E), token_mask=np.ones(T, bool)))
    jax.eval_shape(lambda: moe.update_selection_bias(zeros(E), zeros(E, dtype=np.int64), rate=np.float32(0.1)))
    jax.eval_shape(lambda: moe.grouped_matmul(zeros(5, 3), zeros(2, 3, 4), zeros(2, dtype=np.int32)))
