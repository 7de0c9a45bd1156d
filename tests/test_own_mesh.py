"""A layer on meshes that people have: any names and any roles of axes, any shape of x, weights split over data axes.

The law: values and gradients are those of the float64 oracle, which knows no mesh, whatever the axes are called,
whether several share a role, and whatever other axes there are.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat, reference

H, F, E, K = 8, 4, 8, 2
SIZES = {"hidden": H, "num_experts": E, "top_k": K, "dtype": "float32"}
TOLERANCE = 1e-5  # fp32 against float64, of the largest entry


def mesh_of(types=AxisType.Auto, **axes):
    kinds = (types,) * len(axes)
    return Mesh(
        np.array(jax.devices()[: np.prod(list(axes.values()))]).reshape(*axes.values()), tuple(axes), axis_types=kinds
    )


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    chex.assert_equal_shape([got, expected])
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def drawn(mesh, plan, **layer):
    """Parameters of the shapes and shardings that ``init`` gives, drawn by NumPy: compiling ``init`` takes a second."""
    rng, abstract = np.random.default_rng(1), moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=F, **layer)
    return {
        name: jax.device_put(rng.normal(size=value.shape).astype(np.float32) / 2, value.sharding)
        for name, value in abstract.items()
    }


def check(mesh, plan, lead=None, **layer):
    """Values and all gradients of the layer on global tokens [*lead, H] beside the oracle."""
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F, **layer)
    rng = np.random.default_rng(0)
    lead = lead or (plan.tokens_per_rank * plan.ep_size * plan.tp_size * plan.num_replicas,)
    x, ct = (rng.normal(size=(*lead, H)).astype(np.float32) for _ in range(2))
    params = drawn(mesh, plan, **layer)

    def loss(params, x):
        y, _ = apply(params, x)
        return jnp.sum(_compat.unsplit(y, mesh) * ct), y

    (_, y), (d_params, d_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    whole = {name: np.asarray(value) for name, value in params.items()}
    rows, row_ct = x.reshape(-1, H), ct.reshape(-1, H)
    expected, _ = reference.moe_layer(whole, rows, moe.RouterConfig(), top_k=K)
    wanted_params, wanted_x = reference.moe_layer_vjp(whole, rows, row_ct, moe.RouterConfig(), top_k=K)
    assert_close(y, expected.reshape(x.shape))
    assert_close(d_x, wanted_x.reshape(x.shape))
    for name in params:
        assert_close(d_params[name], wanted_params[name])
        assert d_params[name].sharding.is_equivalent_to(params[name].sharding, params[name].ndim)
    return params


@pytest.mark.parametrize("types", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_axes_of_any_name_and_no_tensor_parallel_axis(types):
    mesh = mesh_of(types, data=2, expert=4)
    plan = moe.make_plan(
        mesh, tokens_per_rank=4, ep_axis="expert", tp_axis=None, token_axes=("data", "expert"), **SIZES
    )
    assert plan.dp_axis == ("data",) and plan.tp_axis is None and plan.tp_size == 1 and plan.num_replicas == 2
    params = check(mesh, plan)
    assert params["w_up"].sharding.spec[0] == "expert"


def test_a_mesh_without_tp_needs_no_names():
    mesh = mesh_of(ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    assert plan.tp_axis is None and plan.exchange_axes == ("ep",)
    check(mesh, plan)


@pytest.mark.parametrize(
    "transport", ["padded", *(pytest.param(t, marks=pytest.mark.slow) for t in ("allgather", "ragged"))]
)
def test_several_axes_share_a_role_in_any_order(transport):
    mesh = mesh_of(a=2, b=2, c=2)
    plan = moe.make_plan(mesh, tokens_per_rank=2, ep_axis=("c",), tp_axis=("b", "a"), transport=transport, **SIZES)
    assert (plan.ep_size, plan.tp_size, plan.tp_axis) == (2, 4, ("b", "a"))
    check(mesh, plan)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["padded", "hierarchy"])
def test_experts_over_two_axes_against_their_order_in_the_mesh(transport):
    mesh = mesh_of(inner=2, outer=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, ep_axis=("outer", "inner"), transport=transport, **SIZES)
    assert plan.num_nodes == 2
    check(mesh, plan)


@pytest.mark.slow
def test_an_axis_that_is_not_named_is_left_alone():
    mesh = mesh_of(stage=2, ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, ep_axis="ep", **SIZES)
    assert plan.token_axes == ("ep",) and plan.num_replicas == 1
    check(mesh, plan)


def test_a_shard_map_that_is_manual_over_some_axes_only():
    mesh = mesh_of(stage=2, ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, ep_axis="ep", **SIZES)
    specs = moe.param_specs(plan, moe.RouterConfig())
    params, x = drawn(mesh, plan), np.random.default_rng(0).normal(size=(8, H)).astype(np.float32)

    def shard(params, x):
        return moe.moe_layer(params, x, plan, moe.RouterConfig())[0]

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"), axis_names={"ep"})
    got = jax.jit(mapped)({name: jnp.asarray(value) for name, value in params.items()}, x)
    whole = {name: np.asarray(value) for name, value in params.items()}
    assert_close(got, reference.moe_layer(whole, x, moe.RouterConfig(), top_k=K)[0])


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_apply_inside_a_shard_map_is_refused(types):
    """JAX cannot differentiate what it would have to be: a shard_map inside another one over other axes."""
    mesh = mesh_of(types, stage=2, ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, ep_axis="ep", **SIZES)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    params = moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=F)
    params = {name: jnp.zeros(value.shape) for name, value in params.items()}
    mapped = jax.shard_map(
        lambda params, x: apply(params, x)[0], mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"stage"}
    )
    with pytest.raises(moe.errors.MeshError, match=r"inside a shard_map over \('stage',\).*call moe_layer"):
        jax.eval_shape(mapped, params, jnp.zeros((8, H)))


@pytest.mark.slow
def test_stages_with_tokens_and_rounds_of_their_own():
    """A pipeline: the plan leaves the axis alone, and what lies along it is different parameters, tokens and skew."""
    mesh = mesh_of(stage=2, ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=8, ep_axis="ep", capacity_factor=0.4, **SIZES)
    router, specs, rng = moe.RouterConfig(), moe.param_specs(plan, moe.RouterConfig()), np.random.default_rng(0)
    init, _ = moe.moe_on_mesh(mesh, plan, router, ffn=F)
    stages = [{name: np.array(value) for name, value in init(jax.random.key(stage)).items()} for stage in range(2)]
    x, ct = (rng.normal(size=(2, 16, H)).astype(np.float32) for _ in range(2))
    x[0, :, 0] = np.abs(x[0, :, 0]) + 1  # so the first stage sends all to the first two experts
    stages[0]["router"][:] = 0
    stages[0]["router"][0, :2] = 9, 8

    def shard(params, x):
        y, stats = moe.moe_layer({name: value[0] for name, value in params.items()}, x[0], plan, router)
        return y[None], stats.num_rounds[None]

    layer = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=({name: P("stage", *spec) for name, spec in specs.items()}, P("stage", "ep")),
        out_specs=(P("stage", "ep"), P("stage")),
    )

    def loss(params, x):
        y, num_rounds = layer(params, x)
        return jnp.sum(y * ct), (y, num_rounds)

    params = {name: np.stack([stage[name] for stage in stages]) for name in specs}
    (_, (y, num_rounds)), (d_params, d_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert num_rounds[0] > num_rounds[1]
    for i, stage in enumerate(stages):
        wanted_params, wanted_x = reference.moe_layer_vjp(stage, x[i], ct[i], router, top_k=K)
        assert_close(y[i], reference.moe_layer(stage, x[i], router, top_k=K)[0])
        assert_close(d_x[i], wanted_x)
        for name in specs:
            assert_close(d_params[name][i], wanted_params[name])


@pytest.mark.slow
def test_parts_of_weights_against_the_order_of_the_mesh():
    mesh = mesh_of(a=2, one=1, b=2, ep=2)
    check(mesh, moe.make_plan(mesh, tokens_per_rank=2, param_axes=("b", "one", "a"), **SIZES))


@pytest.mark.parametrize("types", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_weights_split_over_data_axes_are_gathered_and_their_gradients_scattered(types):
    mesh = mesh_of(types, data=2, ep=2, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=2, param_axes="data", **SIZES)
    params = check(mesh, plan, use_bias=True)
    for name, shape in {"w_up": (4, 4, 2), "w_down": (4, 2, 4), "b_down": (4, 4), "b_up": (4, 2)}.items():
        assert params[name].addressable_shards[0].data.shape == shape


@pytest.mark.slow
@pytest.mark.parametrize("lead", [(3, 5), (), (2, 2, 4), (1,)])
def test_tokens_of_any_leading_shape_and_number(lead):
    mesh = mesh_of(ep=4)
    check(mesh, moe.make_plan(mesh, tokens_per_rank=4, **SIZES), lead=lead)


@pytest.mark.slow
def test_tokens_of_any_leading_shape_along_explicit_axes():
    mesh = mesh_of(AxisType.Explicit, ep=4)
    check(mesh, moe.make_plan(mesh, tokens_per_rank=4, **SIZES), lead=(3, 5))


def test_padding_counts_nowhere():
    mesh = mesh_of(ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    params, x = drawn(mesh, plan), np.ones((5, H), np.float32)
    mask = np.array([True, True, False, True, True])
    y, stats = jax.jit(apply)(params, x, mask)
    assert stats.load.sum() == 4 * K and stats.num_dropped == 0
    assert not np.asarray(y[2]).any() and np.asarray(y[3]).any()
    assert apply(params, x[:0])[0].shape == (0, H)


def test_few_tokens_are_spread_evenly():
    """Eight tokens of one expert: two on each device fit into a round of two, and eight on the first would be cut."""
    mesh = mesh_of(ep=4)
    sizes: dict[str, Any] = SIZES | {"top_k": 1}
    plan = moe.make_plan(mesh, tokens_per_rank=8, overflow="drop", capacity_factor=1.0, **sizes)
    assert plan.pair_capacity == 2
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    params, router = drawn(mesh, plan), np.zeros((H, E), np.float32)
    router[:, 3] = 1.0
    x = np.random.default_rng(0).random((4, 2, H)).astype(np.float32)
    y, stats = apply(params | {"router": router}, x)
    assert stats.num_dropped == 0 and stats.load[3] == 8
    assert np.asarray(y).any(axis=-1).all()


def test_more_tokens_than_the_plan_has_room_for_are_refused():
    mesh = mesh_of(ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    with pytest.raises(moe.errors.ShapeError, match=r"x has 9 tokens.*room for 8.*more tokens_per_rank"):
        apply(drawn(mesh, plan), np.ones((3, 3, H), np.float32))


def test_plans_of_two_sizes_share_parameters():
    mesh = mesh_of(ep=2)
    plans = [moe.make_plan(mesh, tokens_per_rank=tokens, **SIZES) for tokens in (8, 1)]
    layers = [moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F) for plan in plans]
    params, x = drawn(mesh, plans[0]), np.random.default_rng(0).normal(size=(16, H)).astype(np.float32)
    prefill, step = layers[0][1](params, x)[0], layers[1][1](params, x[3:5])[0]
    assert_close(step, prefill[3:5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_have_the_dtype_that_was_chosen(dtype):
    """And the shapes and shardings that are said of them, split weights and biases among them."""
    mesh = mesh_of(data=2, ep=2, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, param_axes="data", **SIZES)
    options = {"ffn": F, "use_bias": True, "param_dtype": dtype}
    init, _ = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), **options)
    abstract = moe.abstract_params(mesh, plan, moe.RouterConfig(), **options)
    params = init(jax.random.key(0))
    assert {name: (v.shape, v.dtype, v.sharding) for name, v in params.items()} == {
        name: (v.shape, v.dtype, v.sharding) for name, v in abstract.items()
    }
    assert all(value.dtype == dtype for value in params.values())


class Watched(np.ndarray):
    """An array on disk, of which every part that is read is noted."""

    read: list

    def __getitem__(self, index):
        self.read.append(np.asarray(super().__getitem__(index)).size)
        return super().__getitem__(index)


def test_place_reads_the_parts_of_the_devices_that_are_here():
    mesh = mesh_of(ep=4, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    rng = np.random.default_rng(0)
    loaded = {"w_up": (E, H, F), "w_gate": (E, H, F), "w_down": (E, F, H), "router": (H, E), "b_down": (E, H)}
    loaded = {name: rng.normal(size=shape).astype(np.float32) for name, shape in loaded.items()}
    watched = loaded["w_up"].view(Watched)
    watched.read = []
    placed = moe.place(loaded | {"w_up": watched}, mesh, plan)
    assert max(watched.read) == E * H * F // 8
    specs = moe.param_specs(plan, moe.RouterConfig(), use_bias=True)
    for name, value in loaded.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].sharding == NamedSharding(mesh, specs[name])
    again = moe.place(placed, mesh, plan)
    assert again["w_up"].sharding == placed["w_up"].sharding


def test_place_takes_biases_alone():
    mesh = mesh_of(ep=4, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    shapes = {"router_bias": (E,), "selection_bias": (E,), "b_up": (E, F), "b_gate": (E, F), "b_down": (E, H)}
    for name, shape in shapes.items():
        assert moe.place({name: np.ones(shape)}, mesh, plan)[name].shape == shape
    with pytest.raises(moe.errors.InvalidArgumentError, match="'b_up' has shape"):
        moe.place({"b_up": np.ones((E, F + 2)), "w_up": np.ones((E, H, F))}, mesh, plan)
    without_devices: Any = mesh.abstract_mesh
    with pytest.raises(moe.errors.MeshError, match="mesh is an AbstractMesh, which has no devices"):
        moe.place({"w_up": np.ones((E, H, F))}, without_devices, plan)


def test_place_names_everything_that_does_not_fit():
    mesh = mesh_of(ep=4, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=4, **SIZES)
    wrong = {
        "w_up": np.ones((E, H, F)),
        "w_gate": np.ones((E, H + 1, F)),
        "w_dwn": np.ones(3),
        "router": np.ones((H, E), int),
    }
    with pytest.raises(moe.errors.InvalidArgumentError) as caught:
        moe.place(wrong, mesh, plan)
    for words in ("'w_gate' has shape", "'w_dwn' is unknown; ", "w_down", "'router' has dtype int64"):
        assert words in str(caught.value)
    with pytest.raises(moe.errors.InvalidArgumentError, match="3 wide, which must be divisible by tp=2"):
        moe.place({"w_up": np.ones((E, H, 3))}, mesh, plan)


REFUSED = {
    "no such axis": (
        {"ep_axis": "expert"},
        r"ep_axis='expert': the mesh has no axis 'expert', only \('data', 'ep', 'tp'\)",
    ),
    "two roles": ({"ep_axis": "ep", "tp_axis": "ep"}, "axis 'ep' is in ep_axis and in tp_axis"),
    "twice": ({"ep_axis": ("ep", "ep")}, "names an axis twice"),
    "no name": ({"ep_axis": 3}, "must be the name of a mesh axis"),
    "no axis": ({"ep_axis": ()}, "axis of size 1 will do"),
    "tokens not everywhere": ({"token_axes": ("data", "ep")}, r"token_axes=\('data', 'ep'\) lacks 'tp'"),
    "weights along the exchange": ({"param_axes": "ep"}, "param_axes='ep': axis 'ep' must be one of token_axes"),
    "weights along an axis without tokens": (
        {"param_axes": "data", "ep_axis": "ep"},
        "axis 'data' must be one of token_axes",
    ),
    "hidden": (
        {"param_axes": "data", "hidden": 7},
        "hidden=7 must be divisible by 2, the number of devices along param_axes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_roles_that_cannot_be_are_refused(name):
    given, words = REFUSED[name]
    with pytest.raises(moe.errors.MoEError, match=words):
        moe.make_plan(AbstractMesh((2, 2, 2), ("data", "ep", "tp")), tokens_per_rank=4, **SIZES | given)
