"""Meshes of every type, and layouts that are the same: Auto and Explicit axes, and axes of size 1, which are none."""

import contextlib
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn, reference

T, H, F, E, K = 4, 8, 4, 8, 2
AXES = ("data", "ep", "tp")
ALL_TYPES = list(itertools.product((AxisType.Auto, AxisType.Explicit), repeat=3))
TOLERANCE = 1e-5  # fp32 against float64, of the largest entry


def named(types):
    return "".join(kind.name[0] for kind in types)


@functools.cache
def example():
    """Parameters and tokens of no layout, a cotangent, and what the float64 oracle makes of them."""
    rng = np.random.default_rng(0)
    init, _ = layer(jax.devices(), (2, 2, 1), ALL_TYPES[0])
    params = {name: np.asarray(value) for name, value in init(jax.random.key(0)).items()}
    x, ct = (rng.normal(size=(4 * T, H)).astype(np.float32) for _ in range(2))
    y, _ = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K)
    return params, x, ct, y, reference.moe_layer_vjp(params, x, ct, moe.RouterConfig(), top_k=K)


def layer(devices, shape, types):
    mesh = Mesh(np.array(devices[:4]).reshape(shape), AXES, axis_types=types)
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32"}
    return moe.moe_on_mesh(mesh, moe.make_plan(mesh, **sizes), moe.RouterConfig(), ffn=F)


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def check_layer(types, shape, set_mesh, spec, *, run):
    """Values and gradients of the layer, with tokens and parameters laid out as ``spec``; None: NumPy arrays.

    Only their types, if not ``run``, which is returned.
    """
    init, apply = layer(jax.devices(), shape, types)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), AXES, axis_types=types)
    params, x, ct, expected, (d_params, d_x) = example()
    key = jax.random.key(0)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        own = init(key) if run else jax.eval_shape(init, key)
        if spec is None:
            given = params
        else:
            x = jax.device_put(x, NamedSharding(mesh, spec))
            given = own if spec == P(AXES) else jax.device_put(params, NamedSharding(mesh, P(None, spec[0])))

        def loss(params, x):
            y, _ = apply(params, x)
            return jnp.sum(y * jax.sharding.reshard(ct, jax.typeof(y).sharding)), y

        value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        if not run:
            (_, y), found = jax.eval_shape(value_and_grad, given, x)
            chex.assert_trees_all_equal_shapes_and_dtypes((own, y, found), (params, x, (params, x)))
            return False
        (_, y), found = value_and_grad(given, x)
    assert_close(y, expected)
    assert_close(found[1], d_x)
    for name in params:
        assert_close(own[name], params[name])
        assert_close(found[0][name], d_params[name])
    return True


SPECS = [None, P("ep"), P(AXES), P("tp")]
EVERY_MESH = list(itertools.product(ALL_TYPES, [(2, 2, 1), (1, 2, 2)], [False, True], SPECS))
A, X = AxisType.Auto, AxisType.Explicit


def runs(types, shape, set_mesh, spec):
    """Whether this one of EVERY_MESH is run: 32 are, and any three of the six choices take all their values there."""
    is_explicit = [kind == X for kind in types]
    is_odd = SPECS.index(spec) % 2
    return shape == ((2, 2, 1), (1, 2, 2))[sum(is_explicit) % 2] and set_mesh == (sum(is_explicit[:2], is_odd) % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("types", ALL_TYPES, ids=named)
def test_layer_on_every_mesh(types):
    """Whether JAX accepts the types shows in a trace, of all; values and gradients are compared where layers run."""
    ran = 0
    for case in (case for case in EVERY_MESH if case[0] == types):
        ran += check_layer(*case, run=runs(*case))
    assert ran == 4


LAYOUTS = [P(), P("data"), P(AXES), P(("ep", "data")), P(None, "ep"), P(("tp", "ep", "data"))]


@pytest.mark.quick("types0-spec0", "types4-spec4", "types2-spec2")
@pytest.mark.parametrize("types,spec", list(zip(itertools.cycle([(X, A, A), (A, A, X), (X, X, X)]), LAYOUTS)))
def test_every_argument_may_lie_anywhere(types, spec):
    """Traced only: tokens, masks, tables and parameters in any layout, in programs and by themselves, and gradients."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2, 1), AXES, axis_types=types)
    init, apply = layer(jax.devices(), (2, 2, 1), types)
    params = jax.eval_shape(init, jax.random.key(0))

    def anywhere(shape, dtype):
        fits = len(shape) == 2 or spec[:1] != (None,)
        place = NamedSharding(mesh, spec if fits and shape[0] % 4 == 0 else P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = {name: anywhere(value.shape, value.dtype) for name, value in params.items()}
    shapes = ((4 * T, H), jnp.float32), ((4 * T,), bool), ((E, 2), jnp.int32), ((4 + 2 * 2,), jnp.int32)
    given = (params, *(anywhere(*shape) for shape in shapes))

    def loss(params, x, mask, table, rank_table):
        return jnp.sum(apply(params, x, mask, table=table, rank_table=rank_table)[0])

    for set_mesh in (False, True):
        with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
            d_params, d_x = jax.eval_shape(jax.jit(jax.grad(loss, argnums=(0, 1))), *given)
    assert d_x.shape == (4 * T, H) and d_params.keys() == params.keys()


@pytest.mark.parametrize("spec", [P(AXES), P(("data", "ep")), P(("tp", "data", "ep"))], ids=str)
def test_layers_in_a_loop_over_explicit_axes(spec):
    """Tokens that lie as the layer lays them keep their type, whichever axes of size 1 it names."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2, 1), AXES, axis_types=(X, X, X))
    init, apply = layer(jax.devices(), (2, 2, 1), (X, X, X))
    params, place = jax.eval_shape(init, jax.random.key(0)), NamedSharding(mesh, spec)

    def looped(params, x):
        return jnp.sum(jax.lax.scan(lambda x, _: (apply(params, x)[0] + x, None), x, length=2)[0])

    x = jax.ShapeDtypeStruct((4 * T, H), jnp.float32, sharding=place)
    assert jax.eval_shape(jax.jit(jax.grad(looped, argnums=1)), params, x).shape == x.shape


@pytest.mark.parametrize("types", [(A, A), (X, X), (A, X), (X, A)], ids=named)
def test_a_mesh_of_no_devices_may_have_axes_of_any_type(types):
    """Traced only: a plan reads names and sizes, and its operators and its layer run where all axes are manual."""
    mesh, auto = (AbstractMesh((2, 2), ("ep", "tp"), axis_types=kinds) for kinds in (types, (A, A)))
    plan = plan_of(mesh)
    assert (
        plan == plan_of(auto)
        and hash(plan) == hash(plan_of(auto))
        and plan == plan_of(AbstractMesh((2, 2), ("ep", "tp")))
    )
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    x = jax.ShapeDtypeStruct((4 * T, H), jnp.float32, sharding=NamedSharding(mesh, P(("ep", "tp"))))
    given = [x] + [jax.ShapeDtypeStruct((4 * T, K), kind, sharding=x.sharding) for kind in (jnp.int32, jnp.float32)]

    def shard(x, ids, weights):
        sent = moe.dispatch(x, ids, plan)
        return moe.combine(sent.x, weights, sent.handle)

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=P(("ep", "tp")), out_specs=P(("ep", "tp")))
    for context in (contextlib.nullcontext(), jax.sharding.use_abstract_mesh(mesh)):
        with context:
            assert jax.eval_shape(mapped, *given).shape == x.shape
            y, _ = jax.eval_shape(jax.jit(apply), params, x)
            d_params = jax.eval_shape(jax.grad(lambda params, x: jnp.sum(apply(params, x)[0])), params, x)
            assert y.shape == x.shape and d_params["w_up"].shape == (E, H, F)


# --- axes of size 1 say nothing ---------------------------------------------------------------------------------------

W = 4
NUMBERS = {"group_ep": "ep", "ep_world_size": W, "moe_expert_num": E}


def plan_of(mesh, **options):
    return moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", **options)


def run_dispatch(transport, quant="none"):
    def shard(mesh, x, ids, weights, _):
        sent = moe.dispatch(x, ids, plan_of(mesh, transport=transport, quant=quant), combine_weights=weights)
        return dataclasses.replace(sent, scales=jax.lax.stop_gradient(sent.scales))  # constants, refused in a gradient

    return shard


def run_combine(transport):
    def shard(mesh, x, ids, weights, experts):
        sent = moe.dispatch(x, ids, plan_of(mesh, transport=transport))
        rows = sent.x * experts[0, 0]  # varies as experts do, too
        y = moe.combine(rows, weights, sent.handle)
        return y, moe.combine_add_rms_norm(rows, weights, sent.handle, x, jnp.ones(H))

    return shard


def run_window(mesh, x, ids, weights, _):
    plan = plan_of(mesh, transport="padded")
    window = moe.buffer_reset(moe.make_receive_window(plan), jnp.ones(W, jnp.int32), "ep")
    window = moe.dispatch(x, ids, plan, window=window).window
    pattern = jnp.ones((window.data.shape[0] // W, H))
    tested = moe.receivable_test(window, pattern, jnp.zeros(1, jnp.int32), ("ep", "tp"))
    return window, tested, moe.receivable_info_collect(tested, pattern, ("ep", "tp"))


def run_layer_of(ep, tp, mesh, x, ids, weights, experts):
    names = {"w_gate": (H, F // tp), "w_up": (H, F // tp), "w_down": (F // tp, H)}
    params = {name: jnp.broadcast_to(experts[:1, :1, :1], (E // ep, *shape)) for name, shape in names.items()}
    return moe.moe_layer(params | {"router": jnp.ones((H, E))}, x, plan_of(mesh), moe.RouterConfig())[0]


def run_facade(comm_alg):
    def shard(mesh, x, ids, weights, experts):
        ids = aclnn.moe_update_expert(ids, jnp.ones((E, 2), jnp.int32), world_size=W, group_ep="ep").balanced_expert_ids
        sent = aclnn.moe_distribute_dispatch_v4(x, ids, expert_scales=weights, comm_alg=comm_alg, **NUMBERS)
        back = (sent.expand_x * experts[0, 0], ids, sent.assist_info_for_combine, sent.ep_recv_counts, weights)
        options = {"expand_scales": sent.expand_scales, "comm_alg": comm_alg, **NUMBERS}
        normed = aclnn.moe_distribute_combine_add_rms_norm_v2(*back, x[:, None], jnp.ones(H), **options)
        return ids, sent, aclnn.moe_distribute_combine_v4(*back, **options), normed

    return shard


def run_grouped_pair(mesh, x, ids, weights, experts):
    counts = [[1] * W] * W
    sent = moe.all_to_allv_grouped_matmul(x, experts[:1], counts, counts, ("ep", "tp"))
    return sent, moe.grouped_matmul_all_to_allv(sent[0], experts[:1], counts, counts, ("ep", "tp"))


def run_ragged(mesh, x, ids, weights, _):
    ones, starts = jnp.ones(W, jnp.int32), jnp.arange(W, dtype=jnp.int32)
    moved = moe.ragged_all_to_all(x, x, starts, ones, starts * 0, ones, axis_name=("ep", "tp"))
    return moved, moe.update_expert(ids, jnp.ones((E, 2), jnp.int32), rank=jax.lax.axis_index(("ep", "tp")), ep_size=W)


PROGRAMS = {
    "dispatch-padded": run_dispatch("padded"),
    "dispatch-ragged": run_dispatch("ragged", "int8"),
    "dispatch-allgather": run_dispatch("allgather"),
    "dispatch-hierarchy": run_dispatch("hierarchy", "mx_e4m3"),
    "combine-padded": run_combine("padded"),
    "combine-ragged": run_combine("ragged"),
    "combine-allgather": run_combine("allgather"),
    "combine-hierarchy": run_combine("hierarchy"),
    "window": run_window,
    "layer": functools.partial(run_layer_of, W, 1),
    "facade": run_facade(""),
    "facade-hierarchy": run_facade("hierarchy"),
    "grouped-pair": run_grouped_pair,
    "ragged": run_ragged,
}
ARGUMENTS = [((T, H), jnp.float32), ((T, K), jnp.int32), ((T, K), jnp.float32), ((E // W, H, H), jnp.float32)]


def traced(shard, mesh, in_specs, out_specs, ranks):
    """The shapes that ``shard`` gives over ``mesh``, and that its gradients have."""
    mapped = jax.shard_map(functools.partial(shard, mesh), mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    given = [jax.ShapeDtypeStruct((shape[0] * ranks, *shape[1:]), dtype) for shape, dtype in ARGUMENTS]

    def loss(x, ids, *floats):
        leaves = [leaf for leaf in jax.tree.leaves(mapped(x, ids, *floats)) if leaf.dtype == jnp.float32]
        return sum(map(jnp.sum, leaves))

    return jax.eval_shape(mapped, *given), jax.eval_shape(jax.grad(loss, argnums=(0, 2, 3)), *given)


@pytest.mark.quick("dispatch-padded", "dispatch-allgather")
@pytest.mark.parametrize("name", PROGRAMS)
def test_axes_of_size_1_may_be_named_or_not(name):
    """In all specs or in none; experts may lie as they do with tensor parallelism. With gradients."""
    mesh, one, both = moe.make_mesh(ep=W), P("ep"), P(("ep", "tp"))
    expected = traced(PROGRAMS[name], mesh, both, both, W)
    experts = one if name == "grouped-pair" else both  # whose results are columns that weights have
    for in_specs, out_specs in [((one, one, one, experts), one), (one, both)]:
        chex.assert_trees_all_equal_shapes_and_dtypes(traced(PROGRAMS[name], mesh, in_specs, out_specs, W), expected)


@pytest.mark.parametrize("tp,spec", [(1, P("ep")), (1, P(("ep", "tp"))), (2, P(("ep", "tp")))])
def test_results_are_typed_as_tokens_are(tp, spec):
    """So that they can be the carry of a loop, and what a cotangent of the tokens' type is pulled back from."""
    mesh = moe.make_mesh(ep=2, tp=tp)
    program = functools.partial(run_layer_of, 2, tp)

    def shard(x, ids, weights, experts):
        layer = functools.partial(program, mesh)
        looped, _ = jax.lax.scan(lambda x, _: (layer(x, ids, weights, experts), None), x, length=2)
        pulled = jax.vjp(lambda x: layer(x, ids, weights, experts), x)[1](x)
        sent = moe.dispatch(x, ids, plan_of(mesh))
        return looped, pulled, jax.vjp(lambda rows: moe.combine(rows, weights, sent.handle), sent.x)[1](x)

    specs = (spec, spec, spec, P(("ep", "tp")))
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(spec, spec, P(("ep", "tp"))))
    given = [jax.ShapeDtypeStruct((shape[0] * 2 * tp, *shape[1:]), dtype) for shape, dtype in ARGUMENTS]
    looped, (d_x,), _ = jax.eval_shape(mapped, *given)
    assert looped.shape == d_x.shape == (2 * tp * T, H)


def test_a_single_device_needs_no_axis():
    mesh = moe.make_mesh()

    def shard(mesh, x, ids, weights, _):
        sent = moe.dispatch(x, ids, plan_of(mesh))
        return sent, moe.combine(sent.x, weights, sent.handle)

    expected = traced(shard, mesh, P(("ep", "tp")), P(("ep", "tp")), 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(traced(shard, mesh, P(), P(), 1), expected)


@pytest.mark.parametrize("name", ["dispatch-padded", "combine-allgather", "layer"])
def test_axes_of_more_devices_must_be_named(name):
    """Results do vary over them, and JAX refuses specs that say otherwise."""
    mesh = moe.make_mesh(ep=2, tp=2)
    program = functools.partial(run_layer_of, 2, 2) if name == "layer" else PROGRAMS[name]
    traced(program, mesh, P(("ep", "tp")), P(("ep", "tp")), 4)
    with pytest.raises(ValueError, match="out_specs"):
        traced(program, mesh, P(("ep", "tp")), P("ep"), 4)


def test_nothing_is_left_of_it_in_the_program():
    """Between the two specs lies a type: the same instructions, and no collective over a single device."""
    mesh, texts = moe.make_mesh(ep=W), []
    for spec in (P("ep"), P(("ep", "tp"))):
        shard = functools.partial(run_combine("padded"), mesh)
        mapped = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)
        given = [jax.ShapeDtypeStruct((shape[0] * W, *shape[1:]), dtype) for shape, dtype in ARGUMENTS]
        lines = jax.jit(mapped).lower(*given).as_text().splitlines()
        texts.append([line.split("stablehlo.")[1].split(" ")[0] for line in lines if "stablehlo." in line])
    assert texts[0] == texts[1] and any("all_to_all" in word for word in texts[0])
    assert not any("all_reduce" in word for word in texts[0])
