"""Experts over rows that lie in slots, as the tests of grouping and of activations take them."""

import jax
import numpy as np
from helpers import small_integers
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.transports import InboxOrder

L, H, F = 5, 6, 4
M, A = 23, 29  # rows, and slots that they may lie in where they have an order


def make_plan(mesh=(1, 1), *, num_experts=L, tokens=M, top_k=1, **options):
    """A plan for a mesh that need not be there, where ranks multiply M rows of L experts."""
    options = {"dtype": "float32", "hidden": H, "poison": True, **options}
    mesh = AbstractMesh(mesh, ("ep", "tp"))
    return moe.make_plan(mesh, tokens_per_rank=tokens, num_experts=num_experts, top_k=top_k, **options)


def draw_experts(rng, activation, biases, *, exact=True):
    shapes = {"w_gate": (L, H, F), "w_up": (L, H, F), "w_down": (L, F, H)}
    shapes |= {"b_gate": (L, F), "b_up": (L, F), "b_down": (L, H)} if biases else {}
    if activation == "gelu":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_gate")}
    if not exact:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    factors = {"up": 16} if activation == "gelu" else {"gate": 128}
    return {name: small_integers(rng, shape) * factors.get(name[2:], 1) for name, shape in shapes.items()}


def shapes_of(dtype="float32", *, biases=True):
    """Experts, what arrived, its order, the counts and a cotangent, as shapes."""
    experts = draw_experts(np.random.default_rng(0), "swiglu", biases)
    experts = {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in experts.items()}
    arrived = jax.ShapeDtypeStruct((A, H), dtype)
    integers = (jax.ShapeDtypeStruct((extent,), "int32") for extent in (M, A, L))
    row_inbox, inbox_row, group_sizes = integers
    return experts, arrived, InboxOrder(row_inbox, inbox_row), group_sizes, arrived
