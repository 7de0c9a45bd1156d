"""combine_add_rms_norm against the oracle: values, every gradient, its roundings, and its single pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TRANSPORTS, expert_ids, mesh_of, over_mesh, small_integers

import moe_jax as moe
from moe_jax import reference

W, P, T, H, K, E = 4, 2, 5, 16, 2, 8
TOLERANCE = 2e-6  # fp32 sums of 16 squares and one square root, relative to the largest entry


def make_plan(transport="padded", dtype="float32"):
    return moe.make_plan(
        mesh_of(W, P), tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype=dtype, transport=transport
    )


def inputs(rng):
    lead = (W, P, T)
    ids = expert_ids("random", rng, (*lead, K), E, W)
    ids[0, 0, 0] = -1  # one token that went nowhere: its total is the residual alone
    return dict(
        x=small_integers(rng, (*lead, H)),
        ids=ids,
        weights=small_integers(rng, (*lead, K)),
        residual=small_integers(rng, (*lead, H)) + 0.5,
        gamma=np.broadcast_to(small_integers(rng, (H,)), (W, P, H)),
        shared=small_integers(rng, (*lead, H)),
    )


def close(got, expected):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1.0)


def outputs(plan, ids):
    def run(rows, weights, residual, gamma, shared):
        handle = moe.dispatch(jnp.zeros((T, H), plan.dtype), ids, plan).handle
        return moe.combine_add_rms_norm(rows, weights, handle, residual, gamma, eps=1e-3, shared_x=shared)

    return run


@pytest.mark.quick("padded", "allgather")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_equals_oracle(transport):
    rng, plan = np.random.default_rng(0), make_plan(transport)
    given = inputs(rng)
    sent = reference.dispatch(given["x"], given["ids"], num_experts=E)
    ct_y, ct_x = rng.normal(size=(2, W, P, T, H)).astype(np.float32)
    ct_rstd = rng.normal(size=(W, P, T)).astype(np.float32)

    def shard(x, ids, weights, residual, gamma, shared, *cts):
        rows = moe.dispatch(x, ids, plan).x / P  # tp ranks hold partial sums
        got, pull = jax.vjp(outputs(plan, ids), rows, weights, residual, gamma, shared)
        return got, pull(cts)

    (y, rstd, x), (_, d_weights, d_residual, d_gamma, d_shared) = jax.jit(over_mesh(mesh_of(W, P), shard))(
        *given.values(), ct_y, ct_rstd, ct_x
    )
    rows = [[rank / P for rank in ranks] for ranks in sent.rows]
    combined = reference.combine(rows, given["weights"], sent) + given["shared"]
    gamma = given["gamma"][0, 0]
    want_y, want_rstd, want_x = reference.add_rms_norm(combined, given["residual"], gamma, eps=1e-3)
    np.testing.assert_array_equal(x, want_x)
    close(rstd, want_rstd)
    close(y, want_y)
    d_x, want_gamma = reference.add_rms_norm_vjp(ct_y, ct_rstd, ct_x, combined, given["residual"], gamma, eps=1e-3)
    close(d_residual, d_x)
    close(d_shared, d_x)
    close(np.asarray(d_gamma, np.float64).sum((0, 1)), want_gamma)
    close(d_weights, reference.combine_vjp(d_x, rows, given["weights"], sent)[1])


def test_bf16_rounds_where_the_operator_does():
    """x is the rounded total; rstd comes from the unrounded one; y is rounded before and after gamma."""
    rng, plan = np.random.default_rng(1), make_plan(dtype="bfloat16")
    given = inputs(rng)
    given["residual"] = rng.normal(size=(W, P, T, H))
    bf16 = {name: jnp.asarray(given[name], jnp.bfloat16) for name in ("x", "residual", "gamma", "shared")}
    given |= bf16

    def shard(x, ids, weights, residual, gamma, shared):
        rows = moe.dispatch(x, ids, plan).x / P
        return outputs(plan, ids)(rows, weights, residual, gamma, shared)

    y, rstd, x = jax.jit(over_mesh(mesh_of(W, P), shard))(*given.values())
    wide = {name: np.asarray(value, np.float64) for name, value in bf16.items()}
    sent = reference.dispatch(wide["x"], given["ids"], num_experts=E)
    rows = [[rank / P for rank in ranks] for ranks in sent.rows]
    combined = reference.combine(rows, given["weights"], sent) + wide["shared"]
    _, want_rstd, total = reference.add_rms_norm(combined, wide["residual"], wide["gamma"][0, 0], eps=1e-3)
    total = total.astype(np.float32)  # exact: small integers plus a bf16
    np.testing.assert_array_equal(np.asarray(x, np.float32), total.astype(jnp.bfloat16).astype(np.float32))
    close(rstd, want_rstd)
    scaled = (total * np.asarray(rstd)[..., None]).astype(jnp.bfloat16).astype(np.float32)
    want_y = (scaled * wide["gamma"].astype(np.float32)[:, :, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), want_y.astype(np.float32))


def test_one_pass_over_the_rows():
    """Between what the exchange returned and the three results, XLA keeps no fp32 array of the size of x."""
    plan = make_plan(dtype="bfloat16")

    def shard(x, ids, weights, residual, gamma):
        sent = moe.dispatch(x, ids, plan)
        return moe.combine_add_rms_norm(sent.x, weights, sent.handle, residual, gamma)

    lead = (W, P, T)
    shapes = [(*lead, H), (*lead, K), (*lead, K), (*lead, H), (W, P, H)]
    dtypes = ["bfloat16", "int32", "float32", "bfloat16", "bfloat16"]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    text = jax.jit(over_mesh(mesh_of(W, P), shard)).lower(*args).compile().as_text()
    entry = text[text.index("ENTRY") :]
    wide = [line for line in entry.splitlines() if re.search(rf"= f32\[(1,1,)?{T},({K},)?{H}\]", line)]
    fused = [line for line in wide if "fusion" in line]
    assert len(fused) <= 1, "\n".join(wide)  # the total itself, at most: read by the norm and by the results


@pytest.mark.parametrize("eps", [-1e-6, float("inf"), float("nan")])
def test_bad_eps_is_named(eps):
    plan = make_plan()

    def shard(x, ids):
        sent = moe.dispatch(x, ids, plan)
        weights, gamma = jnp.ones((T, K)), jnp.ones(H)
        return moe.combine_add_rms_norm(sent.x, weights, sent.handle, x, gamma, eps=eps)

    with pytest.raises(ValueError, match="eps="):
        jax.eval_shape(over_mesh(mesh_of(W, P), shard), jnp.zeros((W, P, T, H)), jnp.zeros((W, P, T, K), jnp.int32))
