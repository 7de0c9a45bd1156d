"""The transport "hierarchy" against oracles that loop over pairs: exact, for every mesh, round and routing pattern.

Data are small integers, so that every sum is exact; rows, slots and weights that nobody may read hold NaN.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import PATTERNS, expert_ids, over_mesh, small_integers

import moe_jax as moe
from moe_jax import quant, reference
from moe_jax.transports import HIERARCHY
from moe_jax.transports.hierarchy import open_hierarchy

MESHES = [(2, 2, 2), (4, 2, 1), (1, 4, 1)]  # nodes, ranks of each, tp
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((2, 2, 1), (2, 4, 1))]
T, K, H, BYTES = 5, 3, 4, 6
LOCAL = 2  # experts per rank


def send(x, maps, plan):
    return HIERARCHY.send(x, None, maps, plan, ordered=True).tokens


def collect(rows, weights, maps, plan, recipe=None):
    return HIERARCHY.collect(rows, weights, None, maps, plan, ordered=True, recipe=recipe).rows


def make(nodes, per_node, tp, **options):
    """The mesh and a plan with rounds of 2 rows per pair of ranks."""
    mesh = moe.make_mesh(ep=nodes * per_node, nodes=nodes, tp=tp)
    ep = nodes * per_node
    factor = 2 * ep / (T * K) - 1e-6
    options = {"dtype": "float32", "poison": True, "capacity_factor": factor, "num_experts": LOCAL * ep, **options}
    plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, top_k=K, transport="padded", **options)
    assert plan.pair_capacity == 2
    return mesh, plan


def all_in_one(plan, capacity, x, message, destination, start, rows, weights, ct):
    """Everything that the module gives for one round. Per shard."""
    num_rows = plan.num_rows(capacity)
    maps, group_sizes, recv_counts = open_hierarchy(destination, start, capacity, plan, num_rows=num_rows)
    d_rows, d_weights = HIERARCHY.collect_adjoint(rows, weights, ct, maps, plan, ordered=True)
    return {
        "rows": send(x, maps, plan),
        "messages": send(message, maps, plan),
        "group_sizes": group_sizes,
        "recv_counts": recv_counts,
        "y": collect(rows, weights, maps, plan),
        "sum": collect(rows, None, maps, plan),
        "d_rows": d_rows,
        "d_weights": d_weights,
        "node_outbox_token": maps.node_outbox_token,
    }


@functools.cache
def program(nodes, per_node, tp, capacity):
    mesh, plan = make(nodes, per_node, tp)
    return jax.jit(over_mesh(mesh, functools.partial(all_in_one, plan, capacity), (plan.ep_axis, "tp")))


class Case:
    """One generated case with every rank visible, and what each round of it must give."""

    def __init__(self, nodes, per_node, tp, pattern, seed=0):
        rng = np.random.default_rng([nodes, per_node, tp, seed])
        self.key, self.num_nodes, self.per_node = (nodes, per_node, tp), nodes, per_node
        W, P = nodes * per_node, tp
        self.lead = (W, P)
        if pattern == "repeated":  # pairs of a token may meet at one expert, or all of them at one
            self.ids = rng.integers(0, 2 * LOCAL, (W, P, T, K)).astype(np.int32)
            self.ids[:, :, ::2] = 1
        elif pattern == "one_node":
            self.ids = expert_ids("random", rng, (W, P, T, K), per_node * LOCAL, per_node)
        else:
            self.ids = expert_ids(pattern, rng, (W, P, T, K), LOCAL * W, W)
        self.x, self.ct = small_integers(rng, (W, P, T, H)), small_integers(rng, (W, P, T, H))
        self.message = rng.integers(0, 256, (W, P, T, BYTES)).astype(np.uint8)
        self.weights = small_integers(rng, (W, P, T, K))
        self.weights[self.ids < 0] = np.nan
        self.sent = reference.dispatch(self.x, self.ids, num_experts=LOCAL * W)
        self.rng = rng

    def inside(self, w, start, capacity):
        """Which rows of the whole dispatch at rank w lie in the stretch: those of a list are counted from 0."""
        counted, inside = {}, []
        for p, source, _t, _k in self.sent.origins[w][0]:
            place = counted[p, source] = counted.get((p, source), -1) + 1
            inside.append(start <= place < start + capacity)
        return np.array(inside, bool)

    def round(self, start, capacity):
        """[W] of (origins of the rows of the stretch, experts of these rows)."""
        found = []
        for w in range(self.lead[0]):
            inside = self.inside(w, start, capacity)
            experts = np.repeat(np.arange(LOCAL), self.sent.group_sizes[w, 0])
            found.append((self.sent.origins[w][0][inside], experts[inside]))
        return found

    def expected_counts(self):
        W, P = self.lead
        counts = np.zeros((W, P, P, W, LOCAL), int)
        for w, p, t, k in np.ndindex(W, P, T, K):
            if self.ids[w, p, t, k] >= 0:
                rank, expert = divmod(self.ids[w, p, t, k], LOCAL)
                counts[rank, :, p, w, expert] += 1
        return counts


def run(case, start, capacity):
    """One round through the program, with rows that are random where they may be read: (rows in, results)."""
    W, P = case.lead
    num_rows = P * W * capacity
    rows = np.full((W, P, num_rows, H), np.nan, np.float32)
    for w, (origins, _) in enumerate(case.round(start, capacity)):
        rows[w, :, : len(origins)] = small_integers(case.rng, (P, len(origins), H))
    starts = np.full(case.lead, start, np.int32)
    got = program(*case.key, capacity)(case.x, case.message, case.ids, starts, rows, case.weights, case.ct)
    return rows, {name: np.asarray(value) for name, value in got.items()}


def check_round(case, start, capacity):
    """Asserts that every result of a round equals what loops over its pairs give."""
    W, P = case.lead
    rows, got = run(case, start, capacity)
    y, plain, d_weights = np.zeros(case.x.shape), np.zeros(case.x.shape), np.zeros(case.ids.shape)
    across = {(w, p, m): set() for w, p, m in np.ndindex(W, P, case.num_nodes)}
    for w, (origins, experts) in enumerate(case.round(start, capacity)):
        count, node = len(origins), w // case.per_node
        for p in range(P):
            np.testing.assert_array_equal(got["group_sizes"][w, p], np.bincount(experts, minlength=LOCAL))
            assert np.isnan(got["rows"][w, p, count:]).all() and (got["messages"][w, p, count:] == 0xFF).all()
        for row, (p, source, t, k) in enumerate(origins):
            token, weight = (source, p, t), case.weights[source, p, t, k]
            value = rows[w, :, row].sum(axis=0, dtype=np.float64)
            y[token] += weight * value
            plain[token] += value
            d_weights[source, p, t, k] = case.ct[token] @ value
            across[source, p, node].add(t)
            for peer in range(P):
                np.testing.assert_array_equal(got["rows"][w, peer, row], case.x[token])
                np.testing.assert_array_equal(got["messages"][w, peer, row], case.message[token])
                np.testing.assert_array_equal(got["d_rows"][w, peer, row], weight * case.ct[token])
    np.testing.assert_array_equal(got["recv_counts"], case.expected_counts())
    np.testing.assert_array_equal(got["y"], y)
    np.testing.assert_array_equal(got["sum"], plain)
    np.testing.assert_array_equal(got["d_weights"], d_weights)
    slots = got["node_outbox_token"].reshape(W, P, case.num_nodes, -1)
    for (w, p, node), tokens in across.items():  # a slot for every (token, node), and no other
        assert [t for t in slots[w, p, node] if t >= 0] == sorted(tokens)
    return rows, got


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_round_of_everything(mesh):
    """The rows are the oracle's own, in its order, and collect and its adjoint are exact."""
    for pattern in (*PATTERNS, "one_node", "repeated"):
        case = Case(*mesh, pattern)
        _, got = check_round(case, 0, T * K)
        for w, p in np.ndindex(*case.lead):
            expected = case.sent.rows[w][p]
            np.testing.assert_array_equal(got["rows"][w, p, : len(expected)], expected)
        np.testing.assert_array_equal(got["group_sizes"], case.sent.group_sizes)


@pytest.mark.quick("mesh0")
@pytest.mark.parametrize("mesh", MESHES)
def test_rounds_cover_every_pair_once(mesh):
    """Rounds of 2 rows per pair of ranks, each exact; a pair of another round is not there."""
    for pattern in ("random", "masked", "repeated", "none"):
        case, seen = Case(*mesh, pattern, seed=1), 0
        longest = case.expected_counts().sum(axis=-1).max()
        for start in range(0, max(longest, 1), 2):
            _, got = check_round(case, start, 2)
            seen += got["group_sizes"][:, 0].sum()
        assert seen == (case.ids >= 0).sum()
        _, beyond = run(case, start + 2, 2)
        assert not beyond["group_sizes"].any() and not beyond["y"].any() and (beyond["node_outbox_token"] < 0).all()


@pytest.mark.quick("4-3")
@pytest.mark.parametrize("choices,capacity", [(1, 1), (1, 4), (4, 3)])
def test_odd_sizes(choices, capacity):
    """Another number of choices than K, slots that are no multiple of anything, with and without blocks."""
    mesh, plan = make(2, 2, 2)
    rng = np.random.default_rng(choices)
    destination = rng.integers(-1, 4 * LOCAL, (4, 2, T, choices)).astype(np.int32)
    x = small_integers(rng, (4, 2, T, H))

    def shard(x, destination):
        maps, sizes, _ = open_hierarchy(destination, 0, capacity, plan, num_rows=8 * capacity)
        return collect(send(x, maps, plan), None, maps, plan), sizes

    y, sizes = jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp")))(x, destination)
    kept = np.zeros((4, 2, T))
    for w, p, rank in np.ndindex(4, 2, 4):
        mine = [(destination[w, p, t, c], t) for t in range(T) for c in range(choices)]
        for _slot, t in sorted(pair for pair in mine if pair[0] // LOCAL == rank)[:capacity]:
            kept[w, p, t] += 2  # the rows of both tp ranks come back
    np.testing.assert_array_equal(y, kept[..., None] * x)
    assert sizes.sum() == kept.sum()


def test_sources_in_another_order():
    """As ``layout`` has it: within an expert, sources p * W + w stand in the order given."""
    mesh, plan = make(2, 2, 2)
    rng = np.random.default_rng(5)
    order, ids = rng.permutation(8).astype(np.int32), rng.integers(-1, 4 * LOCAL, (4, 2, T, K)).astype(np.int32)
    x = np.arange(4 * 2 * T, dtype=np.float32).reshape(4, 2, T, 1)

    def shard(x, ids):
        num_rows = plan.num_rows(T * K)
        maps, _, _ = open_hierarchy(ids, 0, T * K, plan, num_rows=num_rows, source_order=jnp.array(order))
        rows = send(x, maps, plan)
        return rows, collect(rows, None, maps, plan)

    rows, y = jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp")))(x, ids)
    for w, p in np.ndindex(4, 2):
        expected = []
        for expert, source in [(w * LOCAL + local, source) for local in range(LOCAL) for source in order]:
            tp, ep = divmod(source, 4)
            expected += [x[ep, tp, t, 0] for t, _ in np.argwhere(ids[ep, tp] == expert)]
        np.testing.assert_array_equal(rows[w, p, : len(expected), 0], expected)
    np.testing.assert_array_equal(y[..., 0], 2 * (ids >= 0).sum(axis=-1) * x[..., 0])


def rounded(partials):
    return partials.astype(ml_dtypes.bfloat16)


def int8_and_back(partials):
    shape = partials.shape
    values, scale = reference.quant.quantize("int8_group8", rounded(partials).reshape(-1, shape[-1]))
    return reference.quant.dequantize("int8_group8", values, scale).reshape(shape)


@pytest.mark.quick("int8_group8-int8_and_back-4-2")
@pytest.mark.parametrize("nodes,per_node", [(1, 4), (4, 2)])
@pytest.mark.parametrize("name,travel", [("none", rounded), ("int8_group8", int8_and_back)])
def test_partial_sums_are_rounded_once_per_node(nodes, per_node, name, travel):
    mesh, plan = make(nodes, per_node, 1, dtype="bfloat16")
    W, rng = nodes * per_node, np.random.default_rng(nodes)
    ids = expert_ids("random", rng, (W, 1, T, K), LOCAL * W, W)
    values = rng.integers(-200, 201, (W * LOCAL, H)).astype(np.float32)  # an expert answers with its own numbers
    weights = rng.integers(1, 9, (W, 1, T, K)).astype(np.float32)

    def shard(ids, weights, table):
        maps, sizes, _ = open_hierarchy(ids, 0, T * K, plan, num_rows=W * T * K)
        rows = jnp.repeat(table, sizes, axis=0, total_repeat_length=W * T * K).astype(jnp.bfloat16)
        return collect(rows, weights, maps, plan, recipe=quant.recipe(name, "bfloat16"))

    got = jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp")))(ids, weights, values.reshape(W, 1, LOCAL, H))
    terms = weights[..., None] * values[ids]  # integers below 2 ** 11: exact
    node = ids // (LOCAL * per_node)
    partials = np.stack([np.where((node == m)[..., None], terms, 0).sum(axis=3) for m in range(nodes)])
    expected = travel(partials).astype(np.float32).sum(axis=0, dtype=np.float32)
    np.testing.assert_array_equal(got, expected)
    assert (expected != terms.sum(axis=3)).any(), "nothing was rounded: the numbers are too small"


_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<op>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def node_traffic(text, per_node, tp):
    """(op, kind of number, numbers that one device sends to each other node) of every collective between nodes."""
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        groups = device_groups(line)
        if all(len(set(group // (per_node * tp))) == 1 for group in groups):
            continue
        shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match["type"])
        size = sum(math.prod(int(d) for d in dims.split(",") if d) for _, dims in shapes)
        num_nodes = len(set(groups[0] // (per_node * tp)))
        found.append((match["op"], shapes[0][0][0], size // num_nodes))
    return found


def device_groups(line):
    """Replica groups of an HLO line: listed, as an iota such as [2,4]<=[4,2]T(1,0), or as axes of a mesh (JAX 0.12)."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^{}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes, ranks = re.findall(r"'(\w+)'", named[2]), np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        inner, members = [list(sizes).index(axis) for axis in axes], math.prod(sizes[axis] for axis in axes)
        return list(np.moveaxis(ranks, inner, range(-len(axes), 0)).reshape(-1, members))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not iota:
        listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)[1]
        return [np.array(group.split(","), int) for group in re.findall(r"\{([\d,]+)\}", listed)]
    shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
    return list(np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape))


def test_groups_by_hand():
    """The same groups in every way in which they are written."""
    ways = ["{{0,1,4,5},{2,3,6,7}}", "[2,4]<=[2,2,2]T(1,0,2)", "mesh['node'=2,'ep'=2,'tp'=2] {'node','tp'}"]
    for way in ways:
        groups = device_groups(f"%a = f32[64]{{0}} all-to-all(%p), channel_id=1, replica_groups={way}")
        assert [group.tolist() for group in groups] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.quick("15")
@pytest.mark.parametrize("capacity", [1, 2, T * K])
def test_a_token_crosses_once(capacity):
    """One float all-to-all between nodes sends at most T rows per pair of nodes; two of integers to open."""
    mesh, plan = make(2, 2, 2)

    def shard(x, ids):
        maps, _, _ = open_hierarchy(ids, 0, capacity, plan, num_rows=8 * capacity)
        return send(x, maps, plan)

    x, ids = np.zeros((4, 2, T, H), np.float32), np.zeros((4, 2, T, K), np.int32)
    text = jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp"))).lower(x, ids).compile().as_text()
    traffic = node_traffic(text, 2, 2)
    assert [entry for entry in traffic if entry[1] == "f"] == [("all-to-all", "f", min(T, 2 * capacity) * H)]
    assert [entry[:2] for entry in traffic if entry[1] != "f"] == [("all-to-all", "s")] * 2
    chunked = [line for line in text.splitlines() if " all-to-all(" in line and "/while/body/" in line]
    assert bool(chunked) == (capacity > plan.pair_capacity), "chunks where the stretch is longer"


def test_what_comes_back_crosses_once_too():
    """Per collect: a partial sum per token and node, and its weights on the way out; the adjoint likewise."""
    mesh, plan = make(2, 2, 1)

    def shard(x, ids, weights):
        maps, _, _ = open_hierarchy(ids, 0, 2, plan, num_rows=8)
        rows = jnp.tile(x, (2, 1))[:8]
        y = collect(rows, weights, maps, plan)
        return y, HIERARCHY.collect_adjoint(rows, weights, x, maps, plan, ordered=True)

    x, ids = np.zeros((4, 1, T, H), np.float32), np.zeros((4, 1, T, K), np.int32)
    text = (
        jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp")))
        .lower(x, ids, np.zeros((4, 1, T, K), np.float32))
        .compile()
        .as_text()
    )
    traffic = node_traffic(text, 2, 1)
    assert sorted(size for _, kind, size in traffic if kind == "f") == [4 * K] * 2 + [4 * H]  # weights, dots, sums
    assert [size for _, kind, size in traffic if kind == "u"] == [4 * (H + K) * 4]  # cotangents with weights, as bytes
    assert not re.search(r"= f\d+\[[\d,]*\]\S* scatter\(", text), "floats are gathered, never scattered"


def test_no_tokens_trace():
    """A plan for no tokens can be opened, as far as shapes go."""
    mesh, plan = make(2, 2, 1)
    opened = over_mesh(mesh, lambda ids: open_hierarchy(ids, 0, 1, plan, num_rows=4)[1:], (plan.ep_axis, "tp"))
    sizes, counts = jax.eval_shape(opened, jax.ShapeDtypeStruct((4, 1, 0, K), jnp.int32))
    assert sizes.shape == (4, 1, LOCAL) and counts.shape == (4, 1, 1, 4, LOCAL)


@pytest.mark.parametrize("nodes,per_node,tp", [(2, 2, 2), pytest.param(4, 2, 1, marks=pytest.mark.slow)])
def test_public_operators(nodes, per_node, tp):
    """dispatch and combine over nodes: the same rows, codes and weights as "padded", and exact sums and adjoints."""
    W, rng = nodes * per_node, np.random.default_rng(5)
    ids = expert_ids("masked", rng, (W, tp, T, K), LOCAL * W, W)
    x, ct = (small_integers(rng, (W, tp, T, H)) for _ in range(2))
    weights = small_integers(rng, (W, tp, T, K))

    def run(transport):
        mesh, plan = make(nodes, per_node, tp, quant="int8", poison=False)
        plan = dataclasses.replace(plan, transport=transport)

        def shard(x, ids, weights, ct):
            sent = moe.dispatch(x, ids, plan, combine_weights=weights)

            def there_and_back(x, weights):
                sent = moe.dispatch(x, ids, plan, combine_weights=weights)
                rows = moe.dequantize(sent) * sent.row_weights[:, None]
                return moe.combine(rows, weights, sent.handle)

            pull = jax.vjp(there_and_back, x, weights)[1]
            written = jnp.arange(sent.x.shape[0]) < jnp.sum(sent.group_sizes)
            parts = (sent.x, sent.scales, sent.row_weights)
            rows = [jnp.where(written.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in parts]
            return rows, sent.group_sizes, pull(ct)[0]

        return jax.tree.map(np.asarray, jax.jit(over_mesh(mesh, shard, (plan.ep_axis, "tp")))(x, ids, weights, ct))

    for got, want in zip(jax.tree.leaves(run("hierarchy")), jax.tree.leaves(run("padded")), strict=True):
        np.testing.assert_array_equal(got, want)
