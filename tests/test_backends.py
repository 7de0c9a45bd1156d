"""The back-end table: who serves what, and that an explicit choice is an order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_cases import make_params

import moe_jax
from moe_jax import errors, reference
from moe_jax.kernels import backend_names, table, xla

LHS = np.arange(6, dtype=np.float32).reshape(3, 2)
RHS = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
SIZES = np.array([1, 2], np.int32)


@pytest.fixture(autouse=True)
def table_of_its_own(monkeypatch):
    """Every test registers what it likes in a copy."""
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))


class Counting:
    """A back end whose kernels count how often they are traced."""

    def __init__(self, name="mine", platforms=(), kernels=("grouped_matmul", "grouped_outer")):
        self.calls = dict.fromkeys(kernels, 0)
        self.backend = moe_jax.Backend(
            name=name, platforms=platforms, kernels={kernel: self._counting(kernel) for kernel in kernels}
        )

    def _counting(self, kernel):
        def call(*operands, **static):
            self.calls[kernel] += 1
            return getattr(xla, kernel)(*operands, **static)

        return call


def product_and_gradient(backend):
    def loss(lhs, rhs):
        return jnp.sum(moe_jax.grouped_matmul(lhs, rhs, SIZES, backend=backend))

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(LHS, RHS)
    np.testing.assert_array_equal(value, reference.grouped_matmul(LHS, RHS, SIZES).sum())
    for actual, expected in zip(gradients, reference.grouped_matmul_vjp(np.ones((3, 2)), LHS, RHS, SIZES), strict=True):
        np.testing.assert_array_equal(actual, expected)


# --- the built-in ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["grouped_matmul", "grouped_outer"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_platform_has_its_own(platform, kernel):
    assert moe_jax.resolve_backend(kernel, "auto", platform=platform).name == platform
    assert moe_jax.resolve_backend(kernel, platform, platform="cpu").name == platform  # a name beats the platform


def test_platform_defaults_to_the_one_jax_runs_on():
    assert moe_jax.resolve_backend("grouped_matmul").name == jax.default_backend() == "cpu"


def test_built_in_names():
    assert set(backend_names()) >= {"xla", "tokamax", "cpu", "gpu", "tpu"}


@pytest.mark.parametrize("transport", ["padded", "ragged"])
def test_transports_nobody_supplies_fall_to_xla(transport):
    assert moe_jax.resolve_backend(transport, "auto", platform="gpu").name == "xla"


# --- one's own -------------------------------------------------------------------------------------------------------


def test_named_backend_is_the_one_that_runs():
    mine = Counting()
    moe_jax.register_backend(mine.backend)
    product_and_gradient("auto")
    product_and_gradient("cpu")
    assert mine.calls == {"grouped_matmul": 0, "grouped_outer": 0}
    product_and_gradient("mine")
    assert mine.calls == {"grouped_matmul": 2, "grouped_outer": 1}  # the product, and one gradient each


def test_auto_takes_the_backend_registered_last_for_the_platform():
    older, newer, elsewhere = (
        Counting("older", ("cpu",)),
        Counting("newer", ("cpu", "gpu")),
        Counting("elsewhere", ("tpu",)),
    )
    for counting in (older, newer, elsewhere):
        moe_jax.register_backend(counting.backend)
    assert backend_names()[-3:] == ["older", "newer", "elsewhere"]
    names = [moe_jax.resolve_backend("grouped_matmul", "auto", platform=p).name for p in ("cpu", "gpu", "tpu")]
    assert names == ["newer", "newer", "elsewhere"]
    moe_jax.register_backend(older.backend, replace=True)  # registered again: now the last one
    assert moe_jax.resolve_backend("grouped_matmul", "auto", platform="cpu").name == "older"


def test_auto_runs_the_backend_registered_last():
    mine = Counting(platforms=("cpu",))
    moe_jax.register_backend(mine.backend)
    product_and_gradient("auto")
    assert min(mine.calls.values()) > 0


def test_auto_fills_in_a_kernel_that_a_backend_leaves_out():
    mine = Counting(platforms=("cpu",), kernels=("grouped_matmul",))
    moe_jax.register_backend(mine.backend)
    assert moe_jax.resolve_backend("grouped_matmul").name == "mine"
    assert moe_jax.resolve_backend("grouped_outer").name == "cpu"
    product_and_gradient("auto")
    assert mine.calls["grouped_matmul"] > 0


def test_an_explicit_choice_is_never_replaced():
    half = Counting("half", ("cpu",), kernels=("grouped_matmul",))
    moe_jax.register_backend(half.backend)
    assert moe_jax.grouped_matmul(LHS, RHS, SIZES, backend="half").shape == (3, 2)
    for kernel in ("grouped_outer", "padded"):
        with pytest.raises(errors.UnsupportedError, match=f"'half'.*{kernel}"):
            moe_jax.resolve_backend(kernel, "half")
    with pytest.raises(NotImplementedError):
        product_and_gradient("half")


def test_a_back_end_for_a_device_kind_is_taken_where_the_kind_is_known():
    """The last registered one that fits; patterns are compared in any case, and without a kind they never fit."""
    new = moe_jax.Backend(
        name="new",
        platforms=("gpu",),
        device_kinds=("*h100*", "*B200*"),
        kernels={"grouped_matmul": xla.grouped_matmul},
    )
    moe_jax.register_backend(new)
    kinds = {"NVIDIA H100 80GB HBM3": "new", "NVIDIA b200": "new", "NVIDIA A100-SXM4-80GB": "gpu", None: "gpu"}
    for kind, name in kinds.items():
        assert moe_jax.resolve_backend("grouped_matmul", platform="gpu", device_kind=kind).name == name
    assert moe_jax.resolve_backend("grouped_matmul", platform="cpu", device_kind="h100").name == "cpu"
    assert table.resolve_all("gpu", "NVIDIA H100 80GB HBM3") == "new+hopper"
    assert table.resolve_all("gpu", "NVIDIA A100-SXM4-80GB") == "gpu"


def test_names_joined_by_plus_share_the_work():
    """Each kernel is the first's that has it, whatever is registered last."""
    first, second = Counting("first", kernels=("grouped_matmul",)), Counting("second")
    for counting in (second, first):
        moe_jax.register_backend(counting.backend)
    product_and_gradient("first+second")
    assert first.calls == {"grouped_matmul": 2} and second.calls == {"grouped_matmul": 0, "grouped_outer": 1}
    product_and_gradient("second+first")
    assert first.calls == {"grouped_matmul": 2} and second.calls == {"grouped_matmul": 2, "grouped_outer": 2}


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_a_product_is_added_to(accumulates):
    """A back end that takes ``add_to`` gets it; for another the product is added outside. The sum is the same."""
    given = []

    def kernel(lhs, rhs, group_sizes, *, transpose_rhs, add_to=None):
        given.append(add_to is not None)
        product = xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
        return product if add_to is None else product + add_to

    moe_jax.register_backend(
        moe_jax.Backend(name="adds", platforms=("cpu",), kernels={"grouped_matmul": kernel}, accumulates=accumulates)
    )
    start = np.float32([[1, 2], [3, 4], [5, 6]])
    for backend in ("adds", "auto"):
        summed = table.call_kernel("grouped_matmul", backend, LHS, RHS, SIZES, add_to=start, transpose_rhs=False)
        np.testing.assert_array_equal(summed, reference.grouped_matmul(LHS, RHS, SIZES) + start)
    assert given == [accumulates] * 2


@pytest.mark.parametrize(
    "fuses",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(lambda *extents: extents[3:] != (4, 4), marks=pytest.mark.slow),
        pytest.param(lambda *extents: True, marks=pytest.mark.slow),
    ],
)
def test_kernels_that_spare_passes_serve_the_layer(fuses):
    """Where ``fuses`` wants them, no row is copied and no activation stands by itself; values are the same."""
    words = (*table.KERNELS, *table.FUSED)
    mine, mesh, found, plan = Counting(kernels=words), moe_jax.make_mesh(ep=4), [], None
    moe_jax.register_backend(dataclasses.replace(mine.backend, fuses=fuses))
    for backend in ("xla", "mine"):
        plan = moe_jax.make_plan(
            mesh, tokens_per_rank=8, hidden=8, num_experts=8, top_k=2, dtype="float32", transport="padded",
            capacity_factor=0.5, backend=backend,
        )  # fmt: skip
        assert plan.max_rounds > 1
        init, apply = moe_jax.moe_on_mesh(mesh, plan, moe_jax.RouterConfig(), ffn=4)
        run = jax.jit(jax.value_and_grad(lambda params, x, apply=apply: jnp.sum(apply(params, x)[0] ** 2), (0, 1)))
        found.append(run(init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (32, 8))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)
    used = {word for word in table.FUSED if mine.calls[word]}
    fused = fuses is None or fuses(16, 2, 8, 4, 4)
    assert used == (set(table.FUSED) if fused else set())
    assert ("in their slots" in plan.describe()) and (", where that is taken" in plan.describe()) == (fuses is not None)


def test_kernels_that_spare_passes_are_those_of_the_back_end_that_multiplies():
    """A back end is not passed over because another one, named after it, spares passes."""
    moe_jax.register_backend(Counting("plain", kernels=("grouped_matmul",)).backend)
    extents = (16, 2, 8, 4, 4)
    assert (
        table.fused_kernels("plain+gpu", *extents) == () and table.fused_kernels("gpu+plain", *extents) == table.FUSED
    )
    assert table.fused_kernels("cpu", *extents) == ()


def test_a_back_end_without_its_package_is_refused_with_the_line_that_installs_it():
    moe_jax.register_backend(
        moe_jax.Backend(name="far", requires="no_such_package", kernels=xla.BACKEND.kernels), replace=True
    )
    for name in ("far", "far+cpu"):
        with pytest.raises(errors.UnsupportedError, match="no_such_package.*pip install no_such_package"):
            moe_jax.resolve_backend("grouped_matmul", name)
        with pytest.raises(errors.InvalidArgumentError, match="pip install no_such_package"):
            moe_jax.make_plan(
                moe_jax.make_mesh(ep=1), tokens_per_rank=4, hidden=8, num_experts=8, top_k=2, backend=name
            )


def test_tokamax_is_never_chosen_silently():
    chosen = [moe_jax.resolve_backend(k, platform=p).name for k in table.KERNELS for p in table.PLATFORMS]
    assert "tokamax" not in chosen and moe_jax.kernels.tokamax.BACKEND.requires == "tokamax"


def test_transports_are_resolved_like_kernels():
    mover = moe_jax.Backend(name="mover", platforms=("cpu",), transports={"padded": lambda rows, axis_name: rows})
    moe_jax.register_backend(mover)
    assert moe_jax.resolve_backend("padded").name == "mover"
    assert moe_jax.resolve_backend("padded", "mover") is mover
    assert moe_jax.resolve_backend("grouped_matmul").name == "cpu"


@pytest.mark.slow
@pytest.mark.quick("1.0")
@pytest.mark.parametrize("capacity", [1.0, 8.0])
def test_a_layer_mixes_what_back_ends_bring(capacity):
    """Under "auto" one brings a kernel, another moves the rows, in windows of any length; the rest is as ever."""
    calls = []

    def move(blocks, axes):
        calls.append(blocks.shape)
        return jax.lax.all_to_all(blocks, axes, 0, 0)

    mine = Counting(platforms=("cpu",), kernels=("grouped_matmul",))
    moe_jax.register_backend(mine.backend)
    moe_jax.register_backend(moe_jax.Backend(name="mover", platforms=("cpu",), transports={"padded": move}))
    mesh = moe_jax.make_mesh(ep=4)
    plan = moe_jax.make_plan(
        mesh, tokens_per_rank=4, hidden=8, num_experts=8, top_k=2, dtype="float32", transport="padded",
        capacity_factor=capacity,
    )  # fmt: skip
    assert plan.backend == "mover+mine+cpu"
    assert "products of rows by mine; gradients of weights by cpu" in plan.describe()
    init, apply = moe_jax.moe_on_mesh(mesh, plan, moe_jax.RouterConfig(), ffn=4)
    params = make_params(init, np.random.default_rng(0))
    gradient = jax.jit(jax.grad(lambda params: apply(params, jnp.ones((16, 8)))[0].sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert mine.calls["grouped_matmul"] > 0
    assert {shape[1] for shape in calls} == {plan.pair_capacity}
    calls.clear()
    everywhere = jax.sharding.PartitionSpec(("ep", "tp"))
    send = jax.shard_map(
        lambda x, ids: moe_jax.dispatch(x, ids, plan).x, mesh=mesh, in_specs=everywhere, out_specs=everywhere
    )
    sent = jax.jit(send)(jnp.ones((16, 8)), jnp.zeros((16, 2), jnp.int32))
    assert calls and (sent[:32] == 1).all()  # rank 0 got every pair


PLANS = [  # one for each way in which a plan asks what serves it
    {"transport": "padded"},
    {"transport": "padded", "backend": "xla"},
    {"transport": "ragged"},
    {"transport": "hierarchy", "backend": "tokamax+cpu"},
]


def program_of(mesh, plan):
    """The text of the layer's program, values and gradients, as ``plan`` makes it now."""
    _, apply = moe_jax.moe_on_mesh(mesh, plan, moe_jax.RouterConfig(), ffn=4)
    params = moe_jax.abstract_params(mesh, plan, moe_jax.RouterConfig(), ffn=4)
    x = jax.ShapeDtypeStruct((plan.tokens_per_rank * mesh.size, plan.hidden), jnp.float32)
    gradient = jax.grad(lambda params, x: apply(params, x)[0].sum(), argnums=(0, 1))
    return jax.jit(gradient).lower(params, x).as_text()


@pytest.mark.quick("padded")
@pytest.mark.parametrize("options", PLANS, ids=lambda options: "-".join(options.values()))
def test_a_plan_is_the_same_program_whatever_is_registered_later(options, monkeypatch):
    """Neither what "auto" would choose now nor another owner of a name that it used changes a plan that is made."""
    monkeypatch.setattr(table, "find_spec", lambda package: package)  # nobody runs the kernels of tokamax here

    def other_matmul(lhs, rhs, group_sizes, *, transpose_rhs):
        return 2 * xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)

    def other_outer(lhs, rhs, group_sizes, *, dtype):
        return 2 * xla.grouped_outer(lhs, rhs, group_sizes, dtype=dtype)

    def move_ragged(operand, output, *integers, axis_name):
        return output + 1

    everything = {
        "kernels": {"grouped_matmul": other_matmul, "grouped_outer": other_outer},
        "transports": {"padded": lambda blocks, axes: -blocks, "ragged": move_ragged},
    }
    mesh = moe_jax.make_mesh(ep=2, nodes=2) if options["transport"] == "hierarchy" else moe_jax.make_mesh(ep=4)
    if "tokamax" in options.get("backend", ""):
        moe_jax.register_backend(moe_jax.Backend(name="tokamax", requires="tokamax"), replace=True)  # brings nothing

    def make():
        sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 8, "top_k": 2, "dtype": "float32"}
        return moe_jax.make_plan(mesh, **sizes, **options)

    plan = make()
    program = program_of(mesh, plan)
    assert program_of(mesh, plan) == program  # the text depends on nothing else
    for name in ("cpu", "xla", "tokamax", "newest"):
        moe_jax.register_backend(moe_jax.Backend(name=name, platforms=("cpu",), **everything), replace=True)
    assert program_of(mesh, plan) == program
    assert program_of(mesh, make()) != program and make() != plan


def test_a_plan_from_elsewhere_says_what_is_not_registered_here():
    mesh = moe_jax.make_mesh(ep=1)
    plan = moe_jax.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=8, top_k=2, dtype="float32")
    assert plan.kernels == ("cpu#1",)
    elsewhere = dataclasses.replace(plan, kernels=("cpu#77",))
    with pytest.raises(
        errors.InvalidArgumentError, match="'cpu#77', which is not registered in this process; register"
    ):
        program_of(mesh, elsewhere)


@pytest.mark.slow
def test_nobody_reads_results_past_the_last_group():
    """The layer in several rounds, biases and all, is the same to the bit when a kernel leaves NaN there."""

    def poisoned(lhs, rhs, group_sizes, *, transpose_rhs):
        product = xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
        there = jnp.arange(product.shape[0]) < jnp.sum(group_sizes)
        return jnp.where(there[:, None], product, jnp.nan)

    kernels = {**xla.BACKEND.kernels, "grouped_matmul": poisoned}
    moe_jax.register_backend(moe_jax.Backend(name="nan", kernels=kernels))
    mesh, found = moe_jax.make_mesh(ep=4), []
    x = jax.random.normal(jax.random.key(1), (32, 8))
    for backend in ("xla", "nan"):
        plan = moe_jax.make_plan(
            mesh, tokens_per_rank=8, hidden=8, num_experts=8, top_k=2, dtype="float32", transport="padded",
            capacity_factor=0.5, backend=backend,
        )  # fmt: skip
        assert plan.max_rounds > 1
        init, apply = moe_jax.moe_on_mesh(mesh, plan, moe_jax.RouterConfig(), ffn=4)
        params = init(jax.random.key(0))
        params |= {"b_gate": jnp.ones((8, 4)), "b_up": jnp.ones((8, 4)), "b_down": jnp.ones((8, 8))}

        def loss(params, x, apply=apply):
            return jnp.sum(apply(params, x)[0] ** 2)

        found.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_public_exchange_is_the_registered_one():
    calls = []

    def move(operand, output, *sizes, axis_name):
        calls.append(axis_name)
        return output + 1

    moe_jax.register_backend(moe_jax.Backend(name="mover", platforms=("cpu",), transports={"ragged": move}))
    everywhere = jax.sharding.PartitionSpec(("ep", "tp"))
    sizes = jnp.ones(2, jnp.int32)
    moved = jax.shard_map(
        lambda rows: moe_jax.ragged_all_to_all(rows, rows, sizes - 1, sizes, sizes - 1, sizes, axis_name="ep"),
        mesh=moe_jax.make_mesh(ep=2), in_specs=everywhere, out_specs=everywhere,
    )(jnp.arange(4.0))  # fmt: skip
    assert calls and moved.tolist() == [1, 2, 3, 4]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_taken_name_needs_replace():
    first, second = Counting().backend, Counting().backend
    moe_jax.register_backend(first)
    with pytest.raises(errors.InvalidArgumentError, match="replace=True"):
        moe_jax.register_backend(second)
    assert moe_jax.resolve_backend("grouped_matmul", "mine") is first
    moe_jax.register_backend(second, replace=True)
    assert moe_jax.resolve_backend("grouped_matmul", "mine") is second
    assert backend_names().count("mine") == 1


def test_only_backends_can_be_registered():
    with pytest.raises(errors.InvalidArgumentError, match="moe_jax.Backend"):
        moe_jax.register_backend("mine")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kernel": "grouped_matmull"}, "did you mean 'grouped_matmul'"),
        ({"kernel": "grouped_matmul", "name": "cpuu"}, "did you mean 'cpu'"),
        ({"kernel": "grouped_matmul", "name": "gpu+cpuu"}, "did you mean 'cpu'"),
        ({"kernel": "grouped_matmul", "name": "gpu+auto"}, "backend='auto' is unknown"),
        ({"kernel": "grouped_matmul", "platform": "cuda"}, "platform='cuda'"),
    ],
)
def test_unknown_words_are_named(arguments, names):
    with pytest.raises(errors.InvalidArgumentError, match=names):
        moe_jax.resolve_backend(**arguments)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"name": "auto"}, "name='auto'"),
        ({"name": ""}, "name=''"),
        ({"name": "cpu+gpu"}, "name='cpu[+]gpu'"),
        ({"device_kinds": "h100"}, "device_kinds of back end 'mine': 'h100'"),
        ({"device_kinds": ("h100", 5)}, "device_kinds of back end 'mine'"),
        ({"requires": None}, "requires of back end 'mine'"),
        ({"accumulates": 1}, "accumulates=1"),
        ({"fuses": True}, "fuses of back end 'mine'"),
        ({"kernels": {"grouped_matmull": print}}, "kernels of back end 'mine'.*did you mean 'grouped_matmul'"),
        ({"transports": {"raged": print}}, "transports of back end 'mine'.*did you mean 'ragged'"),
        ({"platforms": ("cuda",)}, "platforms of back end 'mine'.*'cuda'"),
    ],
)
def test_wrong_backends_cannot_be_built(changes, names):
    with pytest.raises(errors.InvalidArgumentError, match=names):
        moe_jax.Backend(**{"name": "mine"} | changes)


def test_a_backend_cannot_change_after_it_was_built():
    kernels = {"grouped_matmul": xla.grouped_matmul}
    backend = moe_jax.Backend(name="mine", kernels=kernels, platforms=["cpu"])
    kernels.clear()
    assert list(backend.kernels) == ["grouped_matmul"]
    assert backend.platforms == ("cpu",)
    with pytest.raises(TypeError):
        backend.kernels["grouped_matmul"] = print
    with pytest.raises(AttributeError):
        backend.name = "yours"
