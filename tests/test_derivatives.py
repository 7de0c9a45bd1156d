"""Forward mode and second derivatives: exact, or one sentence that says what to do instead.

Losses are polynomials of degree 3 at most in whole numbers, so that differences of a float64 formula over steps of 1
and 2 are their derivatives exactly, and fp32 sums are exact too: every comparison is for equality, but where it says
otherwise. Rows that nobody may read hold NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivative_laws import MODES, holds
from helpers import expert_ids, mesh_of, over_mesh

import moe_jax as moe
from moe_jax import aclnn, derivatives, quant, reference

T, H, K, EXPERTS = 4, 3, 2, 8


def small(rng, *shape):
    return rng.integers(-2, 3, shape).astype(np.float32)


# --- the mechanism ----------------------------------------------------------------------------------------------------


def test_rows_that_are_not_there_have_no_derivative():
    index, rng = jnp.array([3, -1, 0, 3]), np.random.default_rng(0)
    params = {"rows": small(rng, 4, H), "factor": small(rng, 4)}

    def loss(params):
        return jnp.sum(derivatives.take_rows(params["rows"] ** 2, index, absent=1) * params["factor"][:, None])

    def oracle(params):
        rows = params["rows"] ** 2
        return sum(f * (rows[i].sum() if i >= 0 else H) for f, i in zip(params["factor"], index, strict=True))

    holds(loss, oracle, params, rng, MODES)
    slope = jax.grad(lambda rows: jnp.sum(derivatives.take_rows(rows, index)))(params["rows"])
    np.testing.assert_array_equal(slope[:, 0], [1, 0, 0, 2])  # whatever a row that is not there holds, it is a constant


@pytest.mark.quick("cpu")
@pytest.mark.parametrize("backend", ["auto", "cpu", "xla"])
def test_batches(backend):
    """jax.hessian and its like map derivatives over a batch of directions."""
    sizes, rng = jnp.array([2, 1], jnp.int32), np.random.default_rng(0)
    lhs, rhs = small(rng, 4, 2), small(rng, 2, 2, 2)

    def loss(lhs):
        return jnp.sum(moe.grouped_matmul(lhs**2, rhs, sizes, backend=backend)[:3])

    want = np.zeros((4, 2, 4, 2))
    for m, group in enumerate([0, 0, 1]):
        for h in range(2):
            want[m, h, m, h] = 2 * rhs[group, h].sum()
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        np.testing.assert_array_equal(jax.jit(hessian(loss))(lhs), want)
    per_example = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([lhs, 2 * lhs]))
    np.testing.assert_array_equal(per_example[1], 2 * per_example[0])
    products = jax.jit(jax.vmap(functools.partial(moe.grouped_matmul, backend=backend)))
    got = products(jnp.stack([lhs, lhs]), jnp.stack([rhs, 2 * rhs]), jnp.array([[2, 1], [0, 3]], jnp.int32))
    for member, (factor, groups) in enumerate([(1, [0, 0, 1]), (2, [1, 1, 1])]):
        exact = [factor * np.asarray(lhs)[m] @ np.asarray(rhs)[g] for m, g in enumerate(groups)]
        np.testing.assert_array_equal(got[member, :3], exact)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend,transpose", [("cpu", False), ("xla", False), ("xla", True)])
def test_grouped_matmul(backend, transpose):
    rng, sizes = np.random.default_rng(0), np.array([3, 0, 2], np.int32)
    params = {"lhs": small(rng, 6, H), "rhs": small(rng, 3, *((4, H) if transpose else (H, 4)))}
    factor = small(rng, 4)

    def loss(params):
        lhs = jnp.where(jnp.arange(6)[:, None] < 5, params["lhs"] ** 2, jnp.nan)
        out = moe.grouped_matmul(lhs, params["rhs"], jnp.asarray(sizes), backend=backend, transpose_rhs=transpose)
        return jnp.sum(out[:5] * factor)

    def oracle(params):
        rhs = params["rhs"].swapaxes(1, 2) if transpose else params["rhs"]
        groups = np.repeat(np.arange(3), sizes)
        return sum(params["lhs"][m] ** 2 @ rhs[g] @ factor for m, g in enumerate(groups))

    holds(loss, oracle, params, rng, MODES)


@pytest.mark.quick("padded-2-2")
@pytest.mark.parametrize(
    "transport,ep,tp",
    [("padded", 2, 2), ("allgather", 2, 2), ("hierarchy", 4, 1), pytest.param("ragged", 4, 1, marks=pytest.mark.slow)],
)
def test_dispatch_and_combine(transport, ep, tp):
    """``sum_t <c, y[t] + shared[t] * x[t]>`` with ``y = combine(dispatch(x)^2, weights)``; squares of weights sent."""
    mesh = moe.make_mesh(ep=ep, nodes=2) if transport == "hierarchy" else mesh_of(ep, tp)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", transport=transport,
        num_copy_experts=1, poison=True,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    ids = expert_ids("masked", rng, (ep, tp, T, K), EXPERTS + 1, ep)
    params = {"x": small(rng, ep, tp, T, H), "weights": small(rng, ep, tp, T, K), "shared": small(rng, ep, tp, T, H)}
    factor = np.array([1.0, 2.0, -1.0], np.float32)

    def shard(params, ids):
        sent = moe.dispatch(params["x"], ids, plan, combine_weights=params["weights"])
        y = moe.combine(
            sent.x**2, params["weights"], sent.handle, x=params["x"], shared_x=params["shared"] * params["x"]
        )
        written = jnp.arange(len(sent.x)) < jnp.sum(sent.group_sizes)
        weights = jnp.where(written, sent.row_weights, 0.0)
        return jnp.sum(y @ factor) + jnp.sum(weights**2)

    def loss(params):
        return jnp.sum(run(params, ids))

    def oracle(params):
        total = np.sum(params["shared"] * params["x"] @ factor)
        for index in np.ndindex(ids.shape):
            x, weight = params["x"][index[:-1]], params["weights"][index]
            if 0 <= ids[index] < EXPERTS:  # with tp ranks, every one has the row, and they are summed
                total += tp * (weight * x**2 @ factor + weight**2)
            elif ids[index] == EXPERTS:  # the copy expert
                total += weight * x @ factor
        return total

    if transport == "hierarchy":
        run = over_mesh(mesh, shard, (("node", "ep"), "tp"))
    else:
        run = over_mesh(mesh, shard)
    holds(loss, oracle, params, rng)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "values"])
@pytest.mark.parametrize("transport", ["padded", "ragged", "allgather", "hierarchy"])
def test_jacobians(transport, compiled):
    """A batch of tangents or cotangents on the way of one batch of rows: ``y = K x^2`` has the Jacobian ``2 K x``."""
    mesh = mesh_of(2, 1)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", transport=transport
    )
    rng = np.random.default_rng(2)
    ids, x = expert_ids("random", rng, (2, 1, T, K), EXPERTS, 2), small(rng, 2, 1, T, H)

    def shard(x, ids):
        sent = moe.dispatch(x, ids, plan)
        return moe.combine(sent.x**2, jnp.ones((T, K)), sent.handle)

    run = over_mesh(mesh, shard)
    jacobians = jax.jit(lambda x: (jax.jacfwd(run)(x, ids), jax.jacrev(run)(x, ids)))
    if not compiled:
        assert [found.shape for found in jax.eval_shape(jacobians, x)] == [x.shape * 2] * 2
        return
    for found in jacobians(x):
        np.testing.assert_array_equal(found.reshape(x.size, x.size), np.diag(2 * K * x.ravel()))


def test_combine_add_rms_norm():
    plan = moe.make_plan(
        mesh_of(2, 1), tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", poison=True
    )
    rng = np.random.default_rng(4)
    ids = expert_ids("masked", rng, (2, 1, T, K), EXPERTS, 2)
    params = {
        "x": small(rng, 2, 1, T, H), "weights": small(rng, 2, 1, T, K), "residual": small(rng, 2, 1, T, H),
        "gamma": small(rng, 2, 1, H),
    }  # fmt: skip
    factor = np.array([1.0, 2.0, -1.0], np.float32)

    def shard(a, ids):
        sent = moe.dispatch(a["x"], ids, plan)
        out = moe.combine_add_rms_norm(sent.x, a["weights"], sent.handle, a["residual"], a["gamma"], eps=2.0)
        return jnp.sum(out[0] @ factor) + jnp.sum(out[1]) + jnp.sum(out[2] @ factor)

    def oracle(a):
        total = np.array(a["residual"])
        for index in np.ndindex(ids.shape):
            total[index[:-1]] += (ids[index] >= 0) * a["weights"][index] * a["x"][index[:-1]]
        rstd = 1 / np.sqrt(np.mean(total**2, axis=-1) + 2.0)
        y = total * rstd[..., None] * a["gamma"][:, :, None]
        return np.sum(y @ factor) + np.sum(rstd) + np.sum(total @ factor)

    run = over_mesh(mesh_of(2, 1), shard)
    holds(lambda params: jnp.sum(run(params, ids)), oracle, params, rng, step=1e-3, tolerance=1e-4)


@pytest.mark.slow
def test_facade_with_weights_of_rows():
    """The hierarchy of ``moe_jax.aclnn`` weights rows where they are made; sums of whole numbers fit in bfloat16."""
    mesh, group = (
        moe.make_mesh(ep=2, nodes=2),
        {"group_ep": ("node", "ep"), "ep_world_size": 2, "comm_alg": "hierarchy"},
    )
    group["moe_expert_num"], rng, factor = 4, np.random.default_rng(5), np.array([1.0, 1.0, -1.0], np.float32)
    ids = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]]], np.int32)
    params = {"x": small(rng, 2, 2, H), "weights": small(rng, 2, 2, 2)}

    def shard(a, ids):
        x = a["x"].astype(jnp.bfloat16)
        sent = aclnn.moe_distribute_dispatch_v4(x, ids, expert_scales=a["weights"], **group)
        out = aclnn.moe_distribute_combine_v4(
            sent.expand_x**2, ids, sent.assist_info_for_combine, sent.ep_recv_counts, a["weights"],
            expand_scales=sent.expand_scales, **group,
        )  # fmt: skip
        return jnp.sum(out.x_out.astype(jnp.float32) @ factor)

    run = over_mesh(mesh, shard, (("node", "ep"),))

    def oracle(a):
        return sum(a["weights"][i] * a["x"][i[:2]] ** 2 @ factor for i in np.ndindex(ids.shape))

    holds(lambda params: jnp.sum(run(params, ids)), oracle, params, rng)


@pytest.mark.quick("allgather")
@pytest.mark.parametrize("transport", ["padded", "allgather"])
def test_dequantize(transport):
    """Rounding counts as identity in every mode: rows whose largest entry is 127 have scale 1, and lose nothing."""
    plan = moe.make_plan(
        mesh_of(2, 1), tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", quant="int8",
        transport=transport,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    ids = expert_ids("masked", rng, (2, 1, T, K), EXPERTS, 2)
    x = small(rng, 2, 1, T, H)
    x[..., 0] = 127
    params = {"x": x, "smooth": np.ones((EXPERTS, H), np.float32)}
    factor = np.array([0.0, 1.0, -1.0], np.float32)  # of the column that holds 127, nothing

    def shard(x, smooth, ids):
        sent = moe.dispatch(x, ids, plan, smooth_scales=smooth)
        written = jnp.arange(len(sent.x)) < jnp.sum(sent.group_sizes)
        return jnp.sum(jnp.where(written[:, None], moe.dequantize(sent), 0.0) @ factor)

    run = over_mesh(mesh_of(2, 1), shard)

    def oracle(params):
        places = [index for index in np.ndindex(ids.shape) if ids[index] >= 0]
        return sum(params["x"][i[:-1]] * params["smooth"][ids[i]] @ factor for i in places)

    def loss(params):
        smooth = jnp.broadcast_to(params["smooth"], (2, 1, EXPERTS, H))  # the same on all ranks
        return jnp.sum(run(params["x"], smooth, ids))

    holds(loss, oracle, params, rng)


def test_straight_through():
    int8, rng = quant.recipe("int8", "float32"), np.random.default_rng(1)
    x = small(rng, 4, H)
    x[:, 0] = 127

    def loss(params):
        return jnp.sum(quant.straight_through(int8, params["x"])[:, 1:] ** 2)

    holds(loss, lambda params: np.sum(params["x"][:, 1:] ** 2), {"x": x}, rng)


@pytest.mark.slow
def test_ragged_all_to_all():
    """Rank 0 reads a row twice; rank 1's own row stays; unwritten rows of the output stay."""
    mesh, rng = mesh_of(2, 1), np.random.default_rng(0)
    starts, sizes = np.array([[[0, 1]], [[2, 0]]], np.int32), np.array([[[2, 2]], [[1, 1]]], np.int32)
    lands, came = np.array([[[0, 1]], [[3, 0]]], np.int32), np.array([[[2, 1]], [[2, 1]]], np.int32)
    params = {"operand": small(rng, 2, 1, 3, H), "output": small(rng, 2, 1, 5, H)}
    factor = small(rng, 2, 1, 5, H)

    def shard(params, factor, *integers):
        squared = jax.tree.map(jnp.square, params)
        return jnp.sum(factor * moe.ragged_all_to_all(squared["operand"], squared["output"], *integers, axis_name="ep"))

    run = over_mesh(mesh, shard)

    def oracle(params):
        out = np.array(params["output"]) ** 2
        for i, j in np.ndindex(2, 2):
            for row in range(sizes[i, 0, j]):
                out[j, 0, lands[i, 0, j] + row] = params["operand"][i, 0, starts[i, 0, j] + row] ** 2
        return np.sum(factor * out)

    holds(lambda params: jnp.sum(run(params, factor, starts, sizes, lands, came)), oracle, params, rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way,chunks",
    [("out", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("in", 1), ("out", 2), ("in", 2)])],
)
def test_fused(way, chunks):
    send, recv = [[1, 2, 0, 1], [2, 0, 1, 1]], [[1, 2, 2, 0], [0, 1, 1, 1]]
    rng, local = np.random.default_rng(0), 2
    rows = max(map(sum, send if way == "out" else recv)) + 1
    params = {"x": small(rng, 2, 1, rows, H), "weight": small(rng, 2, 1, local, H, 2)}

    def shard(params):
        if way == "out":
            y, _ = moe.grouped_matmul_all_to_allv(params["x"] ** 2, params["weight"], send, recv, "ep", chunks=chunks)
            return jnp.sum(y)
        y, _, permuted = moe.all_to_allv_grouped_matmul(
            params["x"] ** 2, params["weight"], recv, send, "ep", chunks=chunks
        )
        return jnp.sum(y) + jnp.sum(permuted)

    run = over_mesh(mesh_of(2, 1), shard)

    def oracle(params):
        total = 0.0
        for rank in range(2):
            here = iter(params["x"][rank, 0] ** 2)
            if way == "out":  # by (local expert, destination)
                owners = [(rank, e) for e in range(local) for peer in range(2) for _ in range(send[rank][peer * 2 + e])]
            else:  # by (destination, its expert)
                owners = [(peer, e) for peer in range(2) for e in range(local) for _ in range(recv[rank][peer * 2 + e])]
            for owner, e in owners:
                row = next(here)
                total += np.sum(row @ params["weight"][owner, 0, e]) + (way == "in") * row.sum()
        return total

    holds(lambda params: jnp.sum(run(params)), oracle, params, rng)


# --- the layer: no polynomial, so differences of the oracle's gradient over a small step ------------------------------

STEP, TOLERANCE = 1e-5, 1e-4  # fp32 second derivatives of sums of about 50 terms, relative to the largest entry


def layer(backend, dtype="float32", ep=2, tp=2, weigh_inputs=False, **options):
    mesh = mesh_of(ep, tp)
    options = {"capacity_factor": 2.0} | options
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=6, num_experts=4, top_k=K, dtype=dtype, backend=backend, **options
    )
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=4, weigh_inputs=weigh_inputs)
    return plan, init, lambda params, x, ct: jnp.sum(apply(params, x)[0] * ct)


def layer_data(init, devices=4):
    rng = np.random.default_rng(3)
    x, ct = rng.normal(size=(2, devices * T, 6)).astype(np.float32)
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    vs = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), (params, x))
    return params, x, ct, vs


ONE_DEVICE = {"ep": 1, "tp": 1, "capacity_factor": 0.3}  # which needs no room for an exchange


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend,options",
    [
        ("xla", {"transport": "padded"}),
        ("auto", {"poison": True} | ONE_DEVICE),
        pytest.param("auto", {"transport": "padded", "poison": True}, marks=pytest.mark.slow),
        pytest.param("xla", {"transport": "allgather", "poison": True}, marks=pytest.mark.slow),
        pytest.param("xla", {"transport": "padded", "weigh_inputs": True}, marks=pytest.mark.slow),
        pytest.param("xla", {"weigh_inputs": True} | ONE_DEVICE, marks=pytest.mark.slow),
    ],
)
def test_layer_of_one_round(backend, options):
    plan, init, loss = layer(backend, **options)
    assert plan.max_rounds == 1
    params, x, ct, vs = layer_data(init, devices=plan.ep_size * plan.tp_size)

    def grad_at(step):
        moved, moved_x = jax.tree.map(lambda a, v: np.asarray(a, np.float64) + step * v, (params, x), vs)
        weigh_inputs = options.get("weigh_inputs", False)
        return reference.moe_layer_vjp(moved, moved_x, ct, moe.RouterConfig(), top_k=K, weigh_inputs=weigh_inputs)

    def run(params, x, vs):
        grad = jax.grad(loss, argnums=(0, 1))
        first, by_jvp = jax.jvp(lambda *at: grad(*at, ct), (params, x), vs)
        forward = jax.jvp(lambda *at: loss(*at, ct), (params, x), vs)[1]

        def along(params, x):
            pairs = zip(jax.tree.leaves(grad(params, x, ct)), jax.tree.leaves(vs), strict=True)
            return sum(jnp.vdot(a, b) for a, b in pairs)

        return first, forward, by_jvp, jax.grad(along, argnums=(0, 1))(params, x)

    _first, forward, by_jvp, by_grad = jax.jit(run)(params, x, vs)
    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(grad_at(0)), jax.tree.leaves(vs), strict=True))
    assert abs(forward - slope) <= TOLERANCE * abs(slope)
    want = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), grad_at(STEP), grad_at(-STEP))
    for got in (by_jvp, by_grad):
        for name in params:
            close(got[0][name], want[0][name], name)
        close(got[1], want[1], "x")


def close(got, want, text):
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error <= TOLERANCE, f"{text}: off by {error:.1e} of its largest entry"


@pytest.mark.slow
def test_layer_of_16_bit_floats():
    """On CPUs they travel as integers, which have no derivative: second ones must not take them for constants."""
    _, init, loss = layer("cpu", dtype="bfloat16", tp=1)
    params, x, ct, (_, v) = layer_data(init, devices=2)
    x, ct, v = (jnp.asarray(a, jnp.bfloat16) for a in (x, ct, v))

    def along(x):
        return jnp.vdot(jax.grad(loss, argnums=1)(params, x, ct), v).astype(jnp.float32)

    def grad_at(step):
        moved, wide = (np.asarray(a, np.float64) for a in (x, ct))
        return reference.moe_layer_vjp(
            params, moved + step * np.asarray(v, np.float64), wide, moe.RouterConfig(), top_k=K
        )[1]

    got, want = jax.jit(jax.grad(along))(x), (grad_at(STEP) - grad_at(-STEP)) / (2 * STEP)
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error < 0.05  # a few roundings of 2^-9 each; without what the experts add it is about 1


@pytest.mark.quick("float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_of_more_rounds_says_what_to_do(dtype):
    plan, init, loss = layer("auto", dtype=dtype, capacity_factor=1.0)
    assert plan.max_rounds > 1
    params, x, ct, (_, v) = layer_data(init)
    x, ct, v = (jnp.asarray(a, dtype) for a in (x, ct, v))
    grad = jax.grad(loss, argnums=1)
    programs = {
        "jvp": lambda: jax.jit(lambda x: jax.jvp(lambda x: loss(params, x, ct), (x,), (v,)))(x),
        "grad of grad": lambda: jax.grad(lambda x: jnp.vdot(grad(params, x, ct), v))(x),
        "jvp of grad": lambda: jax.jvp(lambda x: grad(params, x, ct), (x,), (v,)),
    }
    for program in programs.values():
        with pytest.raises(moe.errors.UnsupportedError, match="max_rounds=2: make it with capacity_factor=2"):
            program()
