"""An equivalence test of a Mixture-of-Experts of your own: beside the float64 oracle, and the layer over a mesh.

It needs chex. Run: python examples/chex_equivalence_test.py
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
T, H, F, E, K = 24, 16, 8, 8, 2
ROUTER = moe.RouterConfig(renormalize=True)


def my_moe(params, x):
    """Yours: here every expert sees every token, and most of that is thrown away."""
    scores = jax.nn.softmax(x @ params["router"])
    weights, expert_ids = jax.lax.top_k(scores, K)
    weights = weights / weights.sum(axis=1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("th,ehf->tef", x, params["w_gate"])) * jnp.einsum("th,ehf->tef", x, params["w_up"])
    rows = jnp.einsum("tef,efh->teh", hidden, params["w_down"])
    return jnp.einsum("tk,tkh->th", weights, jnp.take_along_axis(rows, expert_ids[..., None], axis=1))


def layer(params, x):
    """Ours, over 4 ranks of 2 experts each."""
    mesh = moe.make_mesh(ep=4)
    plan = moe.make_plan(mesh, tokens_per_rank=T // 4, hidden=H, num_experts=E, top_k=K, dtype="float32")
    _, apply = moe.moe_on_mesh(mesh, plan, ROUTER, ffn=F)
    return apply(params, x)[0]


class Equivalence(parameterized.TestCase):
    @parameterized.named_parameters(("my_moe", my_moe), ("layer", layer))
    def test_result_and_gradients(self, function):
        rng = np.random.default_rng(0)
        shapes = {"router": (H, E), "w_gate": (E, H, F), "w_up": (E, H, F), "w_down": (E, F, H)}
        params = {name: (rng.normal(size=shape) / np.sqrt(H)).astype(np.float32) for name, shape in shapes.items()}
        x, ct = (rng.normal(size=(T, H)).astype(np.float32) for _ in range(2))

        @jax.jit
        def run(params, x, ct):
            y, pull_back = jax.vjp(function, params, x)
            return y, *pull_back(ct)

        y, d_params, d_x = run(params, x, ct)
        want, _ = moe.reference.moe_layer(params, x, ROUTER, top_k=K)
        want_params, want_x = moe.reference.moe_layer_vjp(params, x, ct, ROUTER, top_k=K)
        chex.assert_tree_all_finite((y, d_params, d_x))
        chex.assert_trees_all_equal_shapes_and_dtypes(d_params, params)
        chex.assert_trees_all_close((y, d_x), (want, want_x), rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(d_params, {name: want_params[name] for name in params}, rtol=1e-4, atol=1e-5)
        print(f"{function.__name__}: the result and the gradients of x and {len(params)} weights are the oracle's")


if __name__ == "__main__":
    absltest.main()
