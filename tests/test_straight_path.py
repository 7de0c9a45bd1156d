"""How many functions of ours a token passes in a trace of the layer: the way through the code stays short.

Nothing is compiled. A function counts once, however often it is called; comprehensions and lambdas do not count. The
kernels and the table that finds them are left out, since they differ by platform. The way to a product ends there.
"""

import os
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of
from jax import lax
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.kernels import products

ROOT = os.path.dirname(moe.__file__) + os.sep
TOKENS, HIDDEN = 16, 32


def ours(code):
    """Whether a code object is a function of the package that counts."""
    name = code.co_filename.removeprefix(ROOT)
    return name != code.co_filename and not name.startswith("kernels") and not code.co_name.startswith("<")


def trace(monkeypatch, function, *args):
    """(the functions entered in a trace of ``function``, and how many frames lie between it and each of two things).

    By name: "wire", an exchange of float rows, and "product", a call of a back end's kernel.
    """
    entered, frames = set(), {"wire": [], "product": []}

    def on_event(frame, event, _):
        if event == "call" and ours(frame.f_code):
            entered.add(frame.f_code)

    def watched(watch, called, counts=lambda *_: True):
        def call(*operands, **options):
            if counts(*operands):
                frame, depth = sys._getframe(1), 0
                while frame:
                    depth += ours(frame.f_code)
                    frame = frame.f_back
                frames[watch].append(depth)
            return called(*operands, **options)

        return call

    def is_float(rows, *_):
        return jnp.issubdtype(rows.dtype, jnp.floating)

    for name in ("all_to_all", "all_gather"):
        monkeypatch.setattr(lax, name, watched("wire", getattr(lax, name), is_float))
    monkeypatch.setattr(products, "call_kernel", watched("product", products.call_kernel))
    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        jax.make_jaxpr(function)(*args)
    finally:
        sys.setprofile(before)
    return entered, frames


def test_the_count_by_hand(monkeypatch):
    def layer(x):  # not ours: it lies in a file of the tests
        return moe.update_selection_bias(x, x, rate=1.0)

    entered, frames = trace(monkeypatch, layer, jnp.ones(2))
    names = {code.co_name for code in entered}
    assert names == {"update_selection_bias", "check_rank", "check_array", "check_dtype", "check_shape"}
    assert not frames["wire"] and not frames["product"]


# Two of these frames are the machinery of derivatives, and three with "allgather", whose exchange has one of its own.
@pytest.mark.parametrize(
    "transport,most,deepest", [("padded", 118, 11), ("allgather", 110, 12), ("hierarchy", 124, 11)]
)
def test_the_way_of_a_row_is_short(monkeypatch, transport, most, deepest):
    mesh = moe.make_mesh(ep=8, nodes=2) if transport == "hierarchy" else mesh_of(8, 1)
    sizes = {"tokens_per_rank": TOKENS, "hidden": HIDDEN, "num_experts": 16, "top_k": 4, "dtype": "float32"}
    plan = moe.make_plan(mesh, **sizes, transport=transport)
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=64)
    params, x = jax.eval_shape(init, jax.random.key(0)), jax.ShapeDtypeStruct((8 * TOKENS, HIDDEN), "float32")
    entered, frames = trace(monkeypatch, apply, params, x)
    assert 100 < len(entered) <= most, sorted(code.co_qualname for code in entered)
    assert 0 < frames["wire"][0] <= deepest
    assert 0 < frames["product"][0] <= 13

    ids = jax.ShapeDtypeStruct((8 * TOKENS, 4), "int32")
    spec = P(plan.token_axes)
    sent = jax.shard_map(lambda x, ids: moe.dispatch(x, ids, plan).x, mesh=mesh, in_specs=spec, out_specs=spec)
    _, frames = trace(monkeypatch, sent, x, ids)
    assert 0 < frames["wire"][0] <= 10
