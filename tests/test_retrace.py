"""Tables, masks, choices, weights, scales and counts are data: a program is traced once.

Other values of them change what it gives and nothing else. Each program is run on many values, and the results
must differ.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import DTYPES, elastic_info
from fused_cases import lists
from helpers import over_ep, small_integers

import moe_jax as moe
from moe_jax import aclnn
from moe_jax.recovery.window import buffer_reset, make_window

W, T, K, H, LOCAL = 4, 3, 2, 8, 2
E = W * LOCAL
INSTANCES = 3  # at most, of a logical expert
TOLD_APART = 6  # values of each argument


def traced_once(shard, *, nodes=1):
    """``shard`` over arrays [W, ...] as a program that may be traced a single time, its gradients included."""
    mesh = moe.make_mesh(ep=W, nodes=nodes)
    chex.clear_trace_counter()  # it counts by name
    mapped = over_ep(shard, mesh)
    return jax.jit(chex.assert_max_traces(lambda *args: mapped(*args), 1))


def everywhere(array):
    return np.broadcast_to(array, (W, *np.shape(array)))


def rank_tables(rng):
    """Switched off, everybody, and survivors in some order."""
    yield np.array([0, *rng.integers(-9, 99, 3 + 2 * W)], np.int32)
    yield moe.make_rank_table(W, np.ones(W, bool), num_experts=E)
    for size in (2, 3, 3, 1):
        yield elastic_info(W, rng.permutation(W)[:size].tolist(), 0, LOCAL * size)


def eplb_tables(rng):
    """Logical expert e has instances of its own, among those that every rank table leaves."""
    for _ in range(TOLD_APART):
        table = np.zeros((E, 1 + INSTANCES), np.int32)
        table[:, 0] = rng.integers(1, INSTANCES + 1, E)
        table[:, 1:] = rng.integers(0, LOCAL, (E, INSTANCES))
        yield table


# Name -> values of one argument of the whole way, while the others stay.
VALUES = {
    "rank_table": lambda rng: map(everywhere, rank_tables(rng)),
    "eplb_table": lambda rng: map(everywhere, eplb_tables(rng)),
    "expert_ids": lambda rng: (rng.integers(0, E, (W, T, K)).astype(np.int32) for _ in range(TOLD_APART)),
    "token_mask": lambda rng: (rng.random((W, T, K)) < share for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "weights": lambda rng: (small_integers(rng, (W, T, K)) for _ in range(TOLD_APART)),
    "scales": lambda rng: (everywhere(rng.uniform(0.5, 2, (E, H)).astype(np.float32)) for _ in range(TOLD_APART)),
    "link_mask": lambda rng: (everywhere(rng.random(W) < 0.5) for _ in range(TOLD_APART)),
}


def start():
    """Values that make every argument matter."""
    rng = np.random.default_rng(0)
    table = np.tile(np.array([2, 0, 1, 0], np.int32), (E, 1))
    table[:, 1], table[:, 2] = np.arange(E), (np.arange(E) + 3) % E
    return {
        "x": (rng.standard_normal((W, T, H)) * 8).astype(DTYPES["bfloat16"]),
        "expert_ids": np.stack([rng.permutation(E)[:K] for _ in range(W * T)]).reshape(W, T, K).astype(np.int32),
        "eplb_table": everywhere(table),
        "weights": rng.uniform(0.5, 1.5, (W, T, K)).astype(np.float32),
        "token_mask": np.ones((W, T, K), bool),
        "rank_table": everywhere(moe.make_rank_table(W, None, num_experts=E)),
        "scales": everywhere(np.linspace(0.5, 2, E * H, dtype=np.float32).reshape(E, H)),
        "link_mask": everywhere(np.ones(W, bool)),
    }


def run_all(program, names, window=None):
    """One trace for all values of all names; each of them changes the result. -> the number of results that differ."""
    base, results = start(), 0
    for name in names:
        seen = set()
        for values in VALUES[name](np.random.default_rng(1)):
            given = base | {name: np.ascontiguousarray(values)}
            outs = jax.tree.leaves(program({key: np.array(value) for key, value in given.items()}))
            seen.add(b"".join(np.asarray(out).tobytes() for out in outs))
        assert len(seen) > 2, f"{name} does not matter"
        results += len(seen)
    assert program._cache_size() == 1
    return results


# --- the core ---------------------------------------------------------------------------------------------------------


def core(plan, axes, rows_of, *, with_window):
    """The whole way, in one function of all data; with its gradients."""

    def forward(x, weights, given):
        rank = jax.lax.axis_index(axes)
        ids, _ = moe.update_expert(given["expert_ids"], given["eplb_table"], rank=rank, ep_size=W)
        options = {"token_mask": given["token_mask"], "rank_table": given["rank_table"], "combine_weights": weights}
        options |= {"smooth_scales": given["scales"]} if plan.quant != "none" else {}
        if with_window:
            used = moe.dispatch(x, ids, plan, **options, window=moe.make_receive_window(plan, with_weights=True))
            options["window"] = buffer_reset(used.window, given["link_mask"], axes)
        sent = moe.dispatch(x, ids, plan, **options)
        written = jnp.arange(sent.x.shape[0])[:, None] < jnp.sum(sent.group_sizes)
        rows = jnp.where(written, rows_of(sent), 0)
        y = moe.combine(rows * 2, weights, sent.handle)
        return jnp.sum(y.astype(jnp.float32) ** 2), (y, sent.group_sizes, sent.stats)

    def shard(given):
        run = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
        (_, aux), gradients = run(given["x"], given["weights"], given)
        return aux, gradients

    return shard


CORE = ["rank_table", "eplb_table", "expert_ids", "token_mask", "weights"]
TRANSPORTS = [
    ("padded", "int8", True, [*CORE, "scales", "link_mask"]),
    ("hierarchy", "none", False, CORE),
    pytest.param("ragged", "fp8_e4m3", True, [*CORE, "scales", "link_mask"], marks=pytest.mark.slow),
    pytest.param("allgather", "int8", False, [*CORE, "scales"], marks=pytest.mark.slow),
]


@pytest.mark.quick("padded-int8-True-names0")
@pytest.mark.parametrize(("transport", "quant", "with_window", "names"), TRANSPORTS)
def test_core(transport, quant, with_window, names):
    nodes = 2 if transport == "hierarchy" else 1
    plan = moe.make_plan(
        moe.make_mesh(ep=W, nodes=nodes), tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="bfloat16",
        transport=transport, quant=quant,
    )  # fmt: skip
    run = core(plan, plan.ep_axis, moe.dequantize, with_window=with_window)
    run_all(traced_once(run, nodes=nodes), names)


def test_receive_window_of_the_last_step():
    """The window and its step are data too: many steps, one trace."""
    plan = moe.make_plan(
        moe.make_mesh(ep=W), tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="bfloat16", transport="padded"
    )

    def shard(window, x, ids, mask):
        sent = moe.dispatch(x, ids, plan, window=buffer_reset(window, mask, "ep"))
        return sent.window, sent.stats.num_stale

    program, given = traced_once(shard), start()
    window = jax.tree.map(lambda a: np.tile(a, (W, *[1] * a.ndim)), moe.make_receive_window(plan))
    stale = []
    for lost in (None, 2, 2, 0, None):
        mask = np.arange(W) != lost
        window, held = program(window, given["x"], given["expert_ids"], np.tile(mask, (W, 1)))
        window = jax.device_get(window)
        stale.append(int(np.sum(held)))
    assert stale[0] == stale[-1] == 0 and min(stale[1:-1]) > 0


@pytest.mark.quick("all_to_allv_grouped_matmul")
@pytest.mark.parametrize("name", ["grouped_matmul_all_to_allv", "all_to_allv_grouped_matmul"])
def test_counts_of_the_grouped_pair(name):
    def shard(x, weight, send, recv):
        def run(x, weight):
            y = getattr(moe, name)(x, weight, send, recv, "ep", recv_capacity=24)[0]
            return jnp.sum(y * y), y

        (_, y), gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, weight)
        return y, gradients

    program, rng, seen = traced_once(shard), np.random.default_rng(0), set()
    x, weight = small_integers(rng, (W, 24, H)), small_integers(rng, (W, LOCAL, H, 3))
    for most in (0, 1, 2, 3, 3, 3):
        y, _ = program(x, weight, *lists(rng.integers(0, most + 1, (W, W, LOCAL))))
        seen.add(np.asarray(y).tobytes())
    assert len(seen) == 6 and program._cache_size() == 1


# --- the facade -------------------------------------------------------------------------------------------------------


def facade(group, comm_alg, quant_mode):
    """The reference's chain: update expert, dispatch, barrier, combine."""
    numbers = {"group_ep": group, "ep_world_size": W, "moe_expert_num": E, "comm_alg": comm_alg}

    def shard(given):
        chosen = aclnn.moe_update_expert(given["expert_ids"], given["eplb_table"], world_size=W, group_ep=group)
        ids, common = chosen.balanced_expert_ids, {"elastic_info": given.get("rank_table")}
        common["x_active_mask"] = given.get("token_mask")
        sent = aclnn.moe_distribute_dispatch_v4(
            given["x"], ids, given["scales"] if quant_mode else None, expert_scales=given["weights"],
            quant_mode=quant_mode, **common, **numbers,
        )  # fmt: skip
        rows = sent.expand_x.astype(jnp.float32)
        rows = rows * sent.dynamic_scales[:, None] if quant_mode else rows
        rows = aclnn.distribute_barrier(rows.astype(jnp.bfloat16), group=group, world_size=W)
        out = aclnn.moe_distribute_combine_v4(
            rows, ids, sent.assist_info_for_combine, sent.ep_recv_counts, given["weights"],
            expand_scales=sent.expand_scales, **common, **numbers,
        )  # fmt: skip
        return sent, out

    return shard


def test_facade():
    run_all(traced_once(facade("ep", "", 2)), [*CORE, "scales"])


@pytest.mark.slow
def test_facade_over_nodes():
    """There the reference takes no mask and no table."""
    shard = facade(("node", "ep"), "hierarchy", 0)

    def without(given):
        return shard({name: given[name] for name in ("x", "expert_ids", "eplb_table", "weights")})

    run_all(traced_once(without, nodes=2), ["eplb_table", "expert_ids", "weights"])


def test_facade_by_executors():
    """An executor is made while tracing, from shapes: it is no reason to trace again."""

    def shard(given):
        arrays = {"expert_ids": given["expert_ids"], "eplb_table": given["eplb_table"]}
        arrays |= {"expert_scales": given["weights"], "pruning_threshold": given["scales"][0, :K] / 4}
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        _, executor = aclnn.moe_update_expert_get_workspace_size(**shapes, world_size=W)
        window = make_window(2, 3, jnp.float32, W)
        window = moe.Window(data=window.data + 1, counts=window.counts + 1, step=window.step)
        mask = given["link_mask"].astype(jnp.int32)
        return executor(**arrays), aclnn.moe_distribute_buffer_reset(mask, window, group_ep="ep", ep_world_size=W)

    run_all(traced_once(shard), ["eplb_table", "expert_ids", "weights", "scales", "link_mask"])


def test_barrier_with_tables():
    """The identity, so nothing tells one table from another but the single trace."""

    def shard(x, table):
        limit = np.array([600_000_000], np.int32)
        return aclnn.distribute_barrier_v2(x, limit, table, group="ep", world_size=W)

    program = traced_once(shard)
    x = np.arange(W, dtype=np.float32)[:, None]
    for table in rank_tables(np.random.default_rng(0)):
        np.testing.assert_array_equal(program(x, everywhere(table)), x)


# --- by themselves ----------------------------------------------------------------------------------------------------


def compiled(caplog, function, *args):
    """What ``function`` gives, and the programs that were compiled for it."""
    caplog.clear()
    with jax.log_compiles():
        result = function(*args)
    return result, [record.args[0] for record in caplog.records if record.msg.startswith("Compiling")]


@pytest.mark.slow
def test_layer_outside_a_program_is_one_program(caplog):
    """``init`` and ``apply`` without jit: a single program each, and none for other values; nor for gradients."""
    mesh = moe.make_mesh(ep=2, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32")
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=4)
    keys = [jax.random.key(seed) for seed in range(2)]
    xs = [np.full((4 * T, H), value, np.float32) for value in range(2)]
    gradient = jax.grad(lambda params, x: apply(params, x)[0].sum())
    params, programs = compiled(caplog, init, keys[0])
    assert len(programs) == 1 and compiled(caplog, init, keys[1])[1] == []
    _, programs = compiled(caplog, apply, params, xs[0])
    assert len(programs) == 1 and compiled(caplog, apply, params, xs[1])[1] == []
    _, programs = compiled(caplog, gradient, params, xs[0])
    assert 2 <= len(programs) < 12 and compiled(caplog, gradient, params, xs[1])[1] == []


@pytest.mark.parametrize("lead", [(4 * T,), (2, 2, T), (2, 5)], ids=["plain", "of another shape", "with padding"])
def test_apply_is_one_equation(lead):
    """Traced only: whatever the shape of the tokens, nothing stands beside the program of the layer."""
    mesh = moe.make_mesh(ep=2, tp=2)
    plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32")
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=4)
    params = jax.eval_shape(init, jax.random.key(0))
    given = [jax.ShapeDtypeStruct((*lead, *last), kind) for last, kind in (((H,), jnp.float32), ((), bool))]
    equations = jax.make_jaxpr(apply)(params, *given).jaxpr.eqns
    assert [equation.params["name"] for equation in equations] == ["layer"]


def test_that_a_second_trace_is_seen():
    """What is static does trace again, and the guard says so."""
    program = traced_once(lambda x: x + 1)
    program(np.zeros((W, 2), np.float32))
    with pytest.raises(AssertionError, match="traced"):
        program(np.zeros((W, 3), np.float32))
