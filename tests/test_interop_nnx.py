"""The layer as a module of flax nnx: the numbers of ``moe_on_mesh`` and of the oracle, under every transform of nnx."""

import functools
import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import errors, reference
from moe_jax.interop import nnx as bridge
from moe_jax.interop.nnx import MoE, SelectionBias

H, F, E, K, N, L = 8, 4, 4, 2, 16, 2  # N tokens of all devices, L layers
ROUTER = moe.RouterConfig(score="sigmoid", selection_bias=True)
TOLERANCE = 1e-5  # fp32 against float64, of the largest entry
TYPES = [(AxisType.Auto,) * 2, (AxisType.Explicit,) * 2, (AxisType.Explicit, AxisType.Auto)]


def setting(types=TYPES[0]):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "expert"), axis_types=types)
    plan = moe.make_plan(
        mesh,
        tokens_per_rank=N // 4,
        hidden=H,
        num_experts=E,
        top_k=K,
        dtype="float32",
        ep_axis="expert",
        tp_axis=None,
        token_axes=("data", "expert"),
    )
    return mesh, plan


def numpy_of(params, layer=None):
    return {name: np.asarray(value if layer is None else value[layer]) for name, value in params.items()}


def assert_close(got, expected):
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_values_are_those_of_the_plain_layer():
    mesh, plan = setting()
    layer = MoE(mesh, plan, ROUTER, ffn=F, rngs=nnx.Rngs(0))
    init, _ = bridge._layer(mesh, plan, ROUTER, ffn=F)
    for name, value in init(nnx.Rngs(0).params()).items():
        assert type(getattr(layer, name)) is (SelectionBias if name == "selection_bias" else nnx.Param)
        assert np.array_equal(layer.params[name], value) and layer.params[name].sharding == value.sharding
    x = np.random.default_rng(0).normal(size=(2, 7, H)).astype(np.float32)
    mask = np.arange(14).reshape(2, 7) % 5 > 0
    _, apply = moe.moe_on_mesh(mesh, plan, ROUTER, ffn=F)
    of_module = jax.make_jaxpr(lambda params: MoE(mesh, plan, ROUTER, ffn=F, params=params)(x, mask))(layer.params)
    assert str(of_module) == str(jax.make_jaxpr(lambda params: apply(params, x, mask))(layer.params))
    y, _ = nnx.jit(layer)(x, token_mask=mask)
    whole = numpy_of(layer.params)
    expected, _ = reference.moe_layer(whole, x.reshape(-1, H), ROUTER, top_k=K, token_mask=mask.reshape(-1))
    assert_close(y, expected.reshape(y.shape))


@pytest.mark.slow
def test_replicas_lie_where_a_table_says():
    """A module with more slots than experts computes what the experts do, wherever they lie, as one program."""
    mesh, _ = setting()
    roles = {"ep_axis": "expert", "tp_axis": None, "token_axes": ("data", "expert")}
    plan = moe.make_plan(mesh, tokens_per_rank=N // 4, hidden=H, num_experts=E + 2, top_k=K, dtype="float32", **roles)
    drawn = MoE(mesh, plan, ROUTER, ffn=F, num_logical_experts=E, rngs=nnx.Rngs(0))
    whole = numpy_of(drawn.params)
    assert whole["router"].shape == (H, E) and whole["w_up"].shape == (E + 2, H, F)
    experts = {name: value[:E] if name.startswith("w_") else value for name, value in whole.items()}
    x = np.random.default_rng(0).normal(size=(N, H)).astype(np.float32)
    expected, _ = reference.moe_layer(experts, x, ROUTER, top_k=K)
    call = nnx.jit(lambda layer, x, table: layer(x, table=table, balance="token"))
    for slots in ([0, 1, 2, 3, 0, 0], [3, 1, 0, 2, 3, 2]):
        placement = moe.Placement(physical_to_logical=np.array(slots, np.int32), num_logical_experts=E, num_ranks=2)
        params = {name: value[slots] if name.startswith("w_") else value for name, value in experts.items()}
        for name, value in moe.place(params, mesh, plan).items():
            getattr(drawn, name)[...] = value
        y, stats = call(drawn, x, placement.table())
        assert_close(y, expected)
        assert stats.load.shape == (E,)


@pytest.mark.parametrize("types", TYPES)
def test_without_values_it_knows_shapes_and_layouts(types):
    mesh, plan = setting(types)
    make = lambda: MoE(mesh, plan, ROUTER, ffn=F, rngs=nnx.Rngs(0))  # noqa: E731
    graph, state = nnx.split(nnx.as_abstract(nnx.eval_shape(make)))
    assert graph == nnx.graphdef(nnx.eval_shape(make))  # so programs for one are programs for the other
    wanted = moe.abstract_params(mesh, plan, ROUTER, ffn=F)
    specs = nnx.get_partition_spec(state)
    assert set(state) == set(wanted)
    for name, of in wanted.items():
        got = state[name].get_value()
        assert (got.shape, got.dtype) == (of.shape, of.dtype)
        assert NamedSharding(mesh, got.sharding.spec).is_equivalent_to(of.sharding, got.ndim)
        assert NamedSharding(mesh, specs[name].get_value()).is_equivalent_to(of.sharding, got.ndim)
    y, _ = nnx.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, jnp.zeros((N, H)))
    assert y.shape == (N, H)


def stacked(mesh, plan):
    """L layers whose parameters have a first axis of L."""
    make = nnx.vmap(
        lambda rngs: MoE(mesh, plan, ROUTER, ffn=F, rngs=rngs), transform_metadata={nnx.PARTITION_NAME: None}
    )
    return make(nnx.Rngs(0).split(L) if hasattr(nnx.Rngs, "split") else nnx.Rngs(0).fork(split=L))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), transform_metadata={nnx.PARTITION_NAME: None})
@nnx.remat
def residual(x, layer):
    y, stats = layer(x)
    return x + y, stats


@nnx.jit
def step(layers, optimizer, x, ct):
    def loss(layers):
        y, stats = residual(x, layers)
        return jnp.sum(y * ct), stats

    (value, stats), grads = nnx.value_and_grad(loss, has_aux=True)(layers)
    optimizer.update(layers, grads)
    update = functools.partial(moe.update_selection_bias, rate=0.5)
    layers.selection_bias[...] = jax.vmap(update)(layers.selection_bias[...], stats.load)
    return value, stats


@pytest.mark.parametrize("types", [TYPES[0], pytest.param(TYPES[1], marks=pytest.mark.slow)])
def test_a_training_step_of_stacked_layers(types):
    """jit, scan, remat, value_and_grad and Optimizer at once. With a rate of 1 the step takes the gradients away."""
    mesh, plan = setting(types)
    layers = stacked(mesh, plan)
    before = {name: numpy_of(layers.params)[name] for name in layers.params}
    assert layers.w_up.shape == (L, E, H, F) and layers.w_up.out_sharding == (None, "expert", None, None)
    assert not np.array_equal(*before["w_up"])
    shardings = {name: value.sharding for name, value in layers.params.items()}
    optimizer = nnx.Optimizer(layers, optax.sgd(1.0), wrt=nnx.Param)
    x, ct = (np.random.default_rng(seed).normal(size=(N, H)).astype(np.float32) for seed in (0, 1))
    placed = jax.device_put((x, ct), NamedSharding(mesh, P(("data", "expert"))))
    value, stats = step(layers, optimizer, *placed)

    inputs, loads = [x.astype(np.float64)], []
    for i in range(L):
        y, chosen = reference.moe_layer(numpy_of(before, i), inputs[i], ROUTER, top_k=K)
        inputs.append(inputs[i] + y)
        loads.append(chosen.load)
    assert_close(value, np.vdot(inputs[-1], ct))
    assert np.array_equal(stats.load, loads)
    d_x = ct.astype(np.float64)
    for i in reversed(range(L)):
        d_params, d_y = reference.moe_layer_vjp(numpy_of(before, i), inputs[i], d_x, ROUTER, top_k=K)
        d_x = d_x + d_y
        for name in set(before) - {"selection_bias"}:
            assert_close(before[name][i] - layers.params[name][i], d_params[name])
    bias = before["selection_bias"] + 0.5 * np.sign(np.mean(loads, 1, keepdims=True) - loads)
    assert_close(layers.selection_bias[...], bias)
    for name, value in layers.params.items():
        assert value.sharding.is_equivalent_to(shardings[name], value.ndim)


def test_parameters_that_exist_already_and_wrong_ones():
    mesh, plan = setting()
    abstract = moe.abstract_params(mesh, plan, ROUTER, ffn=F)
    placed = moe.place({name: np.zeros(of.shape, of.dtype) for name, of in abstract.items()}, mesh, plan)
    layer = MoE(mesh, plan, ROUTER, ffn=F, params=placed)
    assert all(layer.params[name] is value for name, value in placed.items())
    with pytest.raises(errors.InvalidArgumentError, match="pass either rngs=.* or params="):
        MoE(mesh, plan, ROUTER, ffn=F)
    with pytest.raises(errors.InvalidArgumentError, match="pass either rngs=.* or params="):
        MoE(mesh, plan, ROUTER, ffn=F, rngs=nnx.Rngs(0), params=placed)
    with pytest.raises(errors.InvalidArgumentError, match=r"params: 'w_upp' is unknown; did you mean 'w_up'"):
        MoE(mesh, plan, ROUTER, ffn=F, params={"w_upp": placed["w_up"]})
    with pytest.raises(errors.MoEError, match="rngs"):
        MoE(mesh, plan, ROUTER, ffn=F, rngs=jax.random.key(0))
    with pytest.raises(errors.InvalidArgumentError, match="streams dropout and none for parameters"):
        MoE(mesh, plan, ROUTER, ffn=F, rngs=nnx.Rngs(dropout=1))
    with pytest.raises(errors.MoEError, match="activation"):
        MoE(mesh, plan, ROUTER, ffn=F, activation=["swiglu"], rngs=nnx.Rngs(0))
    with pytest.raises(errors.MoEError, match="'w_up' is missing"):
        MoE(mesh, plan, ROUTER, ffn=F, params={"router": placed["router"]})(jnp.zeros((N, H)))


def test_the_options_are_those_of_the_plain_layer():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    assert options(MoE.__init__) == {"rngs": None, "params": None, **options(moe.moe_on_mesh)}
    mesh, plan = setting()
    with pytest.raises(TypeError, match="unexpected keyword argument 'fnn'"):
        MoE(mesh, plan, ROUTER, fnn=F, rngs=nnx.Rngs(0))


def test_missing_flax_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "moe_jax.interop.nnx")
    with pytest.raises(errors.UnsupportedError, match=r"needs flax.*pip install 'moe_jax\[nnx\]'"):
        importlib.import_module("moe_jax.interop.nnx")
