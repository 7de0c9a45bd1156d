"""What the compiled program contains: collectives, scatters, and the native instruction where a platform has it."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import TRANSPORTS, mesh_of

import moe_jax as moe

T, H, F, EXPERTS, K = 32, 16, 24, 16, 2

_INSTRUCTION = re.compile(
    r"= \(?(?P<type>[a-z]+\d*)\[(?P<shape>[\d,]*)\].*? "
    r"(?P<op>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all|scatter)(?:-start)?\("
)


def layer_program(ep, tp, transport, *, gradient=False, nodes=1, **options):
    mesh = moe.make_mesh(ep=ep, tp=tp, nodes=nodes)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, transport=transport,
        **{"dtype": "float32", "capacity_factor": 1.0, **options},
    )  # fmt: skip
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((T * ep * tp, H), plan.dtype)
    run = apply
    if gradient:
        run = jax.grad(lambda params, x: jnp.sum(apply(params, x)[0]), argnums=(0, 1))
    return jax.jit(run).trace(params, x), plan


def instructions(traced):
    """Counter of (op, "int" or "float", "loop" or "inline") over the compiled program, and the shapes seen."""
    counts, shapes = collections.Counter(), collections.defaultdict(set)
    for line in traced.lower().compile().as_text().splitlines():
        found = _INSTRUCTION.search(line)
        if not found:
            continue
        kind = "float" if found["type"][0] in "fb" else "int"
        place = "loop" if "/while/body/" in line else "inline"
        counts[found["op"], kind, place] += 1
        shapes[found["op"]].add(tuple(int(d) for d in found["shape"].split(",") if d))
    return counts, shapes


@pytest.mark.quick("4-2")
@pytest.mark.parametrize("ep,tp", [(2, 1), (8, 1), (4, 2)])
def test_forward_budget(ep, tp):
    """Two all-to-alls of rows per round, one all-gather of counts; only integers scattered; no weights gathered."""
    counts, shapes = instructions(layer_program(ep, tp, "padded")[0])
    assert counts["all-to-all", "float", "inline"] == 2
    assert counts["all-to-all", "float", "loop"] == 2
    assert counts["all-gather", "int", "inline"] == 1
    assert counts["all-gather", "int", "loop"] == counts["all-to-all", "int", "inline"] == 0
    assert not any(op == "scatter" and kind == "float" for op, kind, _ in counts)
    weights = {(EXPERTS // ep, H, F // tp), (EXPERTS, H, F // tp), (EXPERTS, H, F), (EXPERTS // ep, H, F)}
    transposed = {(a, c, b) for a, b, c in weights}
    assert not (weights | transposed) & shapes["all-gather"]
    if tp == 1:
        assert counts["all-gather", "float", "inline"] == 0
    else:  # rows gathered after the exchange, reduce-scattered before it
        assert counts["all-gather", "float", "inline"] == 1
        assert counts["reduce-scatter", "float", "inline"] == 1


@pytest.mark.quick("padded")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradient_scatters_no_floats(transport):
    counts, _ = instructions(layer_program(4, 2, transport, gradient=True)[0])
    assert not any(op == "scatter" and kind == "float" for op, kind, _ in counts)
    if transport == "padded":  # each adjoint is one exchange
        assert counts["all-to-all", "float", "inline"] == 4


def test_allgather_sends_tokens_once_and_sums_once():
    counts, _ = instructions(layer_program(4, 2, "allgather")[0])
    assert counts["all-to-all", "float", "inline"] == 0
    assert counts["reduce-scatter", "float", "inline"] == 1
    assert counts["all-gather", "float", "inline"] == 2  # tokens, and the weights of their pairs


@pytest.mark.slow
def test_collectives_do_not_grow_with_ep():
    few, _ = instructions(layer_program(2, 1, "padded", gradient=True)[0])
    many, _ = instructions(layer_program(8, 1, "padded", gradient=True)[0])
    assert few == many


@pytest.mark.slow
def test_one_window_needs_no_loop():
    """A capacity that holds the worst skew leaves nothing to repeat."""
    counts, _ = instructions(layer_program(4, 1, "padded", capacity_factor=4.0)[0])
    assert counts["all-to-all", "float", "loop"] == 0


@pytest.mark.quick("tpu-tpu-@tpu_custom_call-False", "cuda-gpu-xla.gpu.triton-False")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "platform,backend,kernel", [("tpu", "tpu", "@tpu_custom_call"), ("cuda", "gpu", "xla.gpu.triton")]
)
def test_ragged_lowers_to_the_native_instruction(platform, backend, kernel, gradient):
    traced, _ = layer_program(4, 2, "ragged", backend=backend, gradient=gradient)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") >= (4 if gradient else 2)
    assert kernel in text and "ragged_dot" not in text
    assert "stablehlo.all_gather" in text  # the counts
    assert "stablehlo.all_to_all" not in text


@pytest.mark.slow
def test_mesh_of_one_moves_nothing():
    counts, _ = instructions(layer_program(1, 1, "padded", gradient=True)[0])
    moved = {key: count for key, count in counts.items() if key[0] in ("all-to-all", "reduce-scatter")}
    assert not moved and not counts["all-gather", "float", "inline"], "a single device has nobody to talk to"


def test_auto_explains_its_choice():
    plan = layer_program(8, 1, "auto")[1]
    assert plan.transport in TRANSPORTS and plan.transport in plan.describe()
    assert "B sent" in plan.transport_reason
    assert mesh_of(8, 1).size == 8
