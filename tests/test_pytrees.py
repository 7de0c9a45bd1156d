"""What users hold in their hands, pytrees and static values: exported, pickled, named by paths, explained by help()."""

import dataclasses
import functools
import importlib
import inspect
import pickle
import pkgutil
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of, small_integers
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import config, types
from moe_jax.aclnn import results
from moe_jax.collectives import exchange
from moe_jax.hlo import contract
from moe_jax.kernels.xla import grouped_matmul as xla_grouped_matmul
from moe_jax.transports.all_gather import GatherMaps
from moe_jax.transports.all_to_all import PairMaps
from moe_jax.transports.hierarchy import HierarchyMaps

T, H, E, K, W = 4, 8, 8, 2, 4
SIZES = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32"}


def classes_of(module, kind):
    return [found for found in vars(module).values() if inspect.isclass(found) and kind(found)]


def own_dataclass(module):
    return lambda found: dataclasses.is_dataclass(found) and found.__module__ == module.__name__


@functools.cache
def plan(**options):
    return moe.make_plan(moe.make_mesh(ep=W), **SIZES, **options)


def filled(cls):
    """An instance of a pytree class: an array of its own in every field that holds one."""
    values = {}
    for number, name in enumerate(getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls)]):
        values[name] = np.arange(3, dtype=np.int32) + 10 * number
    if cls is types.DispatchHandle:
        values |= {"plan": plan(), "maps": filled(HierarchyMaps)}
    if cls is types.Dispatched:
        values |= {"handle": filled(types.DispatchHandle), "stats": filled(types.DispatchStats), "scales": None}
        values |= {"window": filled(moe.Window)}
    if cls is exchange.Chunks:
        values |= {"chunk": 3}
    if cls is exchange.TimedBlocks:
        values |= {"on_arrival": None}
    if "exchange" in values:
        values |= {"exchange": filled(exchange.Slices)}
    if "losses" in values:
        values["losses"] = {"balance": values["losses"], "z": values["losses"] + 1}
    return cls(**values)


PYTREES = [*classes_of(types, own_dataclass(types)), moe.Window, moe.quant.QTensor, PairMaps, GatherMaps, HierarchyMaps]
PYTREES += classes_of(exchange, own_dataclass(exchange))
PYTREES += classes_of(results, lambda found: hasattr(found, "_fields"))
STATIC = [
    plan(),
    plan(transport="hierarchy", quant="int8"),
    plan(hardware="h100"),
    plan(hardware="v7x"),
    moe.RouterConfig(score="sigmoid", scale=2.5),
]
STATIC += [moe.quant.recipe(name, "bfloat16") for name in moe.quant.NAMES if name != "none"]


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "value", [*map(filled, PYTREES), *STATIC], ids=lambda value: f"{type(value).__name__}-{getattr(value, 'name', '')}"
)
def test_exports(value):
    """A program that takes and returns it, written and read back."""
    program = jax.jit(lambda given, x: (jax.tree.map(lambda leaf: leaf + x, given), x))
    exported = jax.export.export(program)(value, jnp.int32(1))
    read = jax.export.deserialize(exported.serialize())
    assert read.in_tree == exported.in_tree and read.out_tree == exported.out_tree
    result, _ = read.call(value, jnp.int32(1))
    assert type(result) is type(value)
    assert_same(result, jax.tree.map(lambda leaf: leaf + 1, value))


@pytest.mark.parametrize("cls", [*PYTREES, *map(type, STATIC[1:])], ids=lambda cls: cls.__name__)
def test_is_known_to_export(cls):
    """JAX takes each class once: it refuses this one because the package has registered it."""
    with pytest.raises(ValueError, match=f"Duplicate serialization registration for type .*{cls.__name__}"):
        jax.export.register_pytree_node_serialization(
            cls, serialized_name=f"another.{cls.__name__}", serialize_auxdata=bytes, deserialize_auxdata=bytes
        )


@pytest.mark.parametrize("cls", PYTREES, ids=lambda cls: cls.__name__)
def test_paths_have_the_names_of_fields(cls):
    value = filled(cls)
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        found = value
        for key in path:
            found = getattr(found, key.name) if isinstance(key, jax.tree_util.GetAttrKey) else found[key.key]
        assert found is leaf, jax.tree_util.keystr(path)


def test_a_whole_program_exports():
    """Dispatch, combine on what it returned, and the layer, as programs that were written and read back."""
    mesh, everywhere = mesh_of(W, 1), P("ep")
    rng = np.random.default_rng(0)
    x = small_integers(rng, (W * T, H))
    ids = np.stack([rng.permutation(E)[:K] for _ in range(W * T)]).astype(np.int32)
    weights = small_integers(rng, (W * T, K))

    def per_shard(shard, *given):
        return read_back(jax.shard_map(shard, mesh=mesh, in_specs=everywhere, out_specs=everywhere), *given)

    def read_back(function, *given):
        given = jax.device_put(given, jax.NamedSharding(mesh, everywhere))  # written for as many devices
        program = jax.jit(function)
        return jax.jit(jax.export.deserialize(jax.export.export(program)(*given).serialize()).call)(*given)

    sent = per_shard(lambda x, ids: moe.dispatch(x, ids, plan(transport="padded")), x, ids)
    assert sent.handle.plan == plan(transport="padded")
    y = per_shard(lambda sent, weights: moe.combine(sent.x, weights, sent.handle), sent, weights)
    np.testing.assert_array_equal(y, x * weights.sum(axis=1, keepdims=True))

    init, apply = moe.moe_on_mesh(mesh, plan(transport="padded"), moe.RouterConfig(), ffn=4)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda made: small_integers(rng, made.shape, made.dtype), shapes)
    y, stats = read_back(apply, params, x)
    assert isinstance(stats, moe.LayerStats) and int(stats.load.sum()) == W * T * K
    np.testing.assert_array_equal(y, apply(params, x)[0])


def values_to_pickle():
    yield from map(filled, PYTREES)
    yield from STATIC
    yield from (plan().cost(8)["forward"], moe.quant.recipe("int8", "float32").format, moe.MoEError("text"))
    yield moe.BarrierTimeoutError("text")
    yield from (plan().memory(8), plan(hardware="h100").hardware, moe.ClampedSwiGLU())
    yield moe.rebalance(np.arange(1.0, 9.0)[None], num_physical_experts=12, num_ranks=4)
    yield config.Config(
        moe=config.MoEConfig(num_experts=8, top_k=2, ffn=4),
        model=config.ModelConfig(layers=1, hidden=8, heads=2, seq_len=8),
        train=config.TrainConfig(steps=30, batch_size=2),
    )
    yield moe.aclnn.moe_update_expert_get_workspace_size(
        jax.ShapeDtypeStruct((4, 2), jnp.int32), jax.ShapeDtypeStruct((8, 3), jnp.int32), world_size=4, local_rank_id=0
    )[1]
    one = contract.Collective(
        op="all-to-all", operand_bytes=8, wire_bytes=4, group_size=2, is_float=True, in_loop=False
    )
    buffer = contract.Buffer(name="x", shape="f32[8]", bytes=32)
    numbers = {field.name: 1 for field in dataclasses.fields(moe.Contract)}
    yield moe.Contract(**numbers | {"collectives": (one,), "largest_buffers": (buffer,)})
    yield moe.Backend(name="mine", platforms=("cpu",), kernels={"grouped_matmul": xla_grouped_matmul})


@pytest.mark.parametrize("value", list(values_to_pickle()), ids=lambda value: type(value).__name__)
def test_pickles(value):
    copy = pickle.loads(pickle.dumps(value))
    assert type(copy) is type(value)
    if isinstance(value, Exception):
        assert copy.args == value.args
    elif type(value) in PYTREES:
        assert_same(copy, value)
    else:
        assert copy == value


# Modules whose classes users never hold.
INTERNAL = (
    "layout",
    "quant.message",
    "transports",
    "fused",
    "aclnn.calls",
    "aclnn.rules",
    "aclnn.world",
    "elastic",
    "tools",
    "__main__",
)


def public_records():
    for _, name, _ in pkgutil.walk_packages(moe.__path__, "moe_jax."):
        if name.removeprefix("moe_jax.").startswith(INTERNAL):
            continue
        for cls in vars(importlib.import_module(name)).values():
            record = inspect.isclass(cls) and (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields"))
            if record and cls.__module__ == name and not cls.__name__.startswith("_"):
                yield cls


@pytest.mark.parametrize("cls", list(public_records()), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_help_names_every_field(cls):
    """``help()`` shows class docstrings, and no comments. A subclass shares the fields of its base."""
    text = " ".join(base.__doc__ for base in cls.__mro__ if base.__module__.startswith("moe_jax") and base.__doc__)
    names = getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls)]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_there_are_public_records():
    found = set(public_records())
    assert {moe.Plan, moe.Backend, moe.Contract, moe.Dispatched, moe.RouterConfig, results.CombineOutput} <= found


def test_a_class_that_is_defined_again_is_a_pytree_still():
    """As in a cell of a notebook that is run again, where a transport keeps maps of its own."""

    def define():
        @types.pytree()
        class Mine:
            slots: jax.Array

        return Mine

    first, second = define(), define()
    assert first is not second
    for cls in (first, second):
        assert jax.tree.map(lambda slots: slots + 1, cls(slots=1)) == cls(slots=2)
