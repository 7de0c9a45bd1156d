"""The layer in chunks: the same values, counts by hand, and a compiled program in which no chunk waits for another.

What may overlap is read off the optimised program, as a graph of the instructions of its entry. One that calls other
computations (a choice, a loop, a fusion) does all that they do. Parts are known by their named scopes.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import TRANSPORTS, mesh_of, over_mesh
from layer_cases import (
    EXPERTS,
    F,
    H,
    K,
    T,
    assert_close,
    compare,
    make,
    make_params,
    steered_tokens,
    value_and_grads,
)

import moe_jax as moe
from moe_jax import errors, reference
from moe_jax.hlo import contract
from moe_jax.hlo import text as hlo
from moe_jax.tools.bench.programs import with_backward

PATTERNS = ["random", "one_rank", "masked"]
ROUTER = moe.RouterConfig()


def make_chunked(ep, tp, transport, chunks, **options):
    plan, *_ = make(ep, tp, transport, **options)
    return plan, *moe.moe_on_mesh(mesh_of(ep, tp), plan, ROUTER, ffn=F, use_bias=True, chunks=chunks)


# --- values -----------------------------------------------------------------------------------------------------------


def lists(routing, plan, chunks):
    """For each device, chunk and destination rank the pairs (token, k), by expert, then token, then k."""
    ids, per_chunk = np.asarray(routing.expert_ids), T // chunks
    for start in range(0, len(ids), per_chunk):
        pairs = [(ids[t, k], t, k) for t in range(start, start + per_chunk) for k in range(K) if ids[t, k] >= 0]
        for rank in range(plan.ep_size):
            yield [(t, k) for expert, t, k in sorted(pairs) if expert // plan.num_local_experts == rank]


def run_patterns(ep, tp, transport, chunks, *, repeats=1, capacity_factor=1.0):
    plan, init, apply = make_chunked(ep, tp, transport, chunks, capacity_factor=capacity_factor)
    run, rng = value_and_grads(apply), np.random.default_rng([ep, tp, chunks])
    capacity, seen = math.ceil(plan.pair_capacity / chunks), set()
    for pattern in PATTERNS * repeats:
        x, mask = steered_tokens(pattern, rng, T * ep * tp, ep)
        params = make_params(init, rng)
        stats = compare(run, params, x, mask, ROUTER, rng)
        _, routing = reference.moe_layer(params, x, ROUTER, top_k=K, token_mask=mask)
        longest = max(map(len, lists(routing, plan, chunks)))
        assert int(stats.num_rounds) == math.ceil(longest / capacity), pattern
        seen.add(int(stats.num_rounds))
    assert max(seen) > 1 or plan.max_rounds == 1


@pytest.mark.slow
@pytest.mark.quick("4-2-padded-2-1.25")
@pytest.mark.parametrize(
    "ep,tp,transport,chunks,capacity_factor",  # 1.25: further rounds, in loops; 8: all in the first
    [(4, 2, "padded", 2, 1.25), (8, 1, "ragged", 2, 8.0), (4, 2, "allgather", 4, 8.0)],
)
def test_equals_oracle(ep, tp, transport, chunks, capacity_factor):
    """Every chunk has its share of the capacity, and its own rounds; ``num_rounds`` are those of the busiest."""
    run_patterns(ep, tp, transport, chunks, capacity_factor=capacity_factor)


# Each transport on both meshes and with both numbers of chunks.
MANY = [(4, 2, *case) for case in zip(TRANSPORTS, (4, 2, 2), strict=True)]
MANY += [(8, 1, *case) for case in zip(TRANSPORTS, (2, 4, 4), strict=True)]
MANY += [(4, 2, "padded", T), (1, 2, "padded", 2)]  # one token at a time; nobody to exchange with


@pytest.mark.slow
@pytest.mark.parametrize("ep,tp,transport,chunks", MANY)
def test_equals_oracle_many(ep, tp, transport, chunks):
    """8 programs x 3 patterns x 5 = 120 generated cases, every gradient of each."""
    run_patterns(ep, tp, transport, chunks, repeats=5)


@pytest.mark.quick("2")
@pytest.mark.parametrize("chunks", [2, 4])
def test_drop_is_by_chunk(chunks):
    """Of each chunk a pair of ranks keeps the front of its list; the rest is counted and adds nothing."""
    rng = np.random.default_rng(1)
    plan, init, apply = make_chunked(4, 2, "padded", chunks, overflow="drop", shared=0)
    params, run = make_params(init, rng), jax.jit(apply)
    for pattern in PATTERNS:
        x, mask = steered_tokens(pattern, rng, T * 8, 4)
        y, stats = run(params, x, mask)
        _, routing = reference.moe_layer(params, x, ROUTER, top_k=K, token_mask=mask)
        found, capacity = list(lists(routing, plan, chunks)), math.ceil(plan.pair_capacity / chunks)
        assert int(stats.num_dropped) == sum(max(len(pairs) - capacity, 0) for pairs in found) > 0
        assert int(stats.num_rounds) == 1
        expected = np.zeros(x.shape)
        for t, k in (pair for pairs in found for pair in pairs[:capacity]):
            expert = routing.expert_ids[t, k]
            weights = {name: value[expert] for name, value in params.items() if name[:2] in ("w_", "b_")}
            expected[t] += routing.combine_weights[t, k] * reference.expert_ffn(x[t : t + 1], weights, "swiglu")[0]
        assert_close("y", y, expected)


def test_chunks_of_no_tokens():
    mesh = mesh_of(4, 2)
    plan = moe.make_plan(mesh, tokens_per_rank=0, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32")
    init, apply = moe.moe_on_mesh(mesh, plan, ROUTER, ffn=F, chunks=3)
    y, stats = jax.jit(apply)(make_params(init, np.random.default_rng(0)), np.zeros((0, H), np.float32))
    assert y.shape == (0, H) and int(stats.num_rounds) == 1 and int(stats.num_dropped) == 0


BAD_CHUNKS = [(0, "at least 1"), (-2, "at least 1"), (True, "at least 1"), (2.0, "at least 1"), ("2", "at least 1"),
              (None, "at least 1"), (3, "does not divide tokens_per_rank=8"), (16, "does not divide")]  # fmt: skip


@pytest.mark.parametrize("chunks,text", BAD_CHUNKS)
def test_bad_chunks(chunks, text):
    plan, _init, _ = make(4, 2)
    with pytest.raises(errors.InvalidArgumentError, match=rf"chunks={chunks!r}.*{text}"):
        moe.moe_on_mesh(mesh_of(4, 2), plan, ROUTER, ffn=F, chunks=chunks)

    def shard(x):
        return moe.moe_layer({}, x, plan, ROUTER, chunks=chunks)[0]

    with pytest.raises(errors.InvalidArgumentError, match=rf"chunks={chunks!r}.*{text}"):
        jax.eval_shape(over_mesh(mesh_of(4, 2), shard), np.zeros((4, 2, T, H), np.float32))


# --- what waits for what ----------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """An instruction of the entry, with what it contains."""

    op: str
    needs: tuple[str, ...]  # operands, and instructions that must be done before
    inside: tuple  # instructions: itself and all of the computations that it calls
    scopes: frozenset[str]

    @property
    def collectives(self):
        return [found for found in self.inside if found.op.removesuffix("-start") in contract.COLLECTIVES]

    @property
    def moves_rows(self):
        """Rows are fp32 here, and all that goes with them are integers."""
        named = (found for found in self.collectives if "exchange" in words(found))
        return any(hlo.is_float(found.type) for found in named)

    def multiplies(self, scope):
        return scope in self.scopes and any(found.op == "dot" for found in self.inside)


def words(instruction):
    """The scopes in the name that an instruction has from JAX, transformations taken off."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return frozenset(re.findall(r"[\w,\->]+", found[1])) if found else frozenset()


def graph_of(run, *operands):
    """name -> Node."""
    options = {"xla_backend_optimization_level": 0}  # of machine code, which nobody runs
    program = hlo.Program(jax.jit(run).lower(*operands).compile(compiler_options=options).as_text())

    def contained(instruction):
        yield instruction
        for callee, *_ in instruction.callees():
            for found in program.computations[callee].values():
                yield from contained(found)

    nodes = {}
    for name, instruction in program.computations[program.entry].items():
        inside = tuple(contained(instruction))
        waits = re.search(r"control-predecessors=\{([^}]*)\}", instruction.attributes)
        needs = (*instruction.operands, *re.findall(r"%([\w.\-]+)", waits[1] if waits else ""))
        nodes[name] = Node(instruction.op, needs, inside, frozenset().union(*map(words, inside)))
    return nodes


def behind(name, nodes):
    """Every instruction that ``name`` depends on."""
    seen, waiting = set(), [name]
    while waiting:
        for needed in nodes[waiting.pop()].needs:
            if needed not in seen:
                seen.add(needed)
                waiting.append(needed)
    return seen


def groups(names, nodes):
    """``names`` in sets such that nothing in one needs anything in another."""
    found = []
    for name in names:
        mine = {name} | (behind(name, nodes) & set(names))
        for other in [group for group in found if group & mine]:
            found.remove(other)
            mine |= other
        found.append(mine)
    return found


def program(transport, chunks, *, tp=1, backward=False, layers=1):
    """The graph of the layer with a shared expert on 8 devices, or of several in sequence."""
    return _program(transport, chunks, tp, backward, layers)


@functools.cache
def _program(transport, chunks, tp, backward, layers):
    _, init, apply = make_chunked(8 // tp, tp, transport, chunks)
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((T * 8, H), "float32")

    def stacked(params, x):
        for _ in range(layers):
            x, stats = apply(params, x)
        return x, stats

    return graph_of(with_backward(stacked), params, x, x) if backward else graph_of(stacked, params, x)


FORWARD, BACKWARD = 3, 6  # products of gated experts


def work_of(nodes):
    """(exchanges of rows of a first round, its expert products, loops over further rounds)."""
    exchanges = [name for name, node in nodes.items() if node.moves_rows]
    products = [name for name, node in nodes.items() if node.multiplies("experts")]
    loops = set(exchanges) & set(products)
    assert all(nodes[name].op == "while" for name in loops)
    return [n for n in exchanges if n not in loops], [n for n in products if n not in loops], sorted(loops)


@pytest.mark.quick("padded-1-1")
@pytest.mark.parametrize(
    "transport,tp,moves",  # exchanges of a chunk each way: with tp 2 also an all-gather or a reduce-scatter
    [("padded", 1, 1), ("padded", 2, 2), ("ragged", 1, 1), ("allgather", 1, 1)],
)
def test_no_chunk_waits_for_another(transport, tp, moves):
    """Layout, exchange, products and exchange back of a chunk need nothing that another one makes."""
    nodes, chunks = program(transport, 2, tp=tp), 2
    exchanges, products, loops = work_of(nodes)
    needed = set().union(*(behind(product, nodes) for product in products))
    layouts = [name for name in needed if nodes[name].op == "sort" and "layout" in nodes[name].scopes]
    parts = groups([*exchanges, *products, *layouts], nodes)
    assert len(parts) == len(loops) == chunks and len(products) == chunks * FORWARD
    assert len(layouts) >= chunks and len(exchanges) == 2 * moves * chunks
    for part in parts:
        mine = part & set(products)
        before = set().union(*(behind(product, nodes) for product in mine)) & set(exchanges)
        after = {name for name in exchanges if mine & behind(name, nodes)}
        assert before | after == part & set(exchanges) and len(before) == len(after) == moves
        (loop,) = [name for name in loops if mine & behind(name, nodes)]
        assert behind(loop, nodes) & set(exchanges) == before | after


@pytest.mark.slow
def test_no_chunk_waits_for_another_backward():
    """Of each chunk rows and cotangents go out and come back, through two sets of products."""
    nodes = program("padded", 2, backward=True)
    exchanges, products, loops = work_of(nodes)
    parts = groups([*exchanges, *products], nodes)
    assert len(parts) == 2 and len(loops) == 4 and len(exchanges) == 8
    for part in parts:  # a compiler may cut the loop of a product into several operations
        assert len(part & set(exchanges)) == 4 and len(part & set(products)) >= FORWARD + BACKWARD
        early = [name for name in part & set(exchanges) if not behind(name, nodes) & set(products)]
        assert len(early) == 2, "rows and cotangents go out before anything is multiplied"


def test_what_waits_is_seen():
    """The same reading of programs in which one half does wait for the other: two layers, one after the other."""
    nodes = program("padded", 1, layers=2)
    exchanges, products, loops = work_of(nodes)
    assert len(exchanges) == 4 and len(products) == 2 * FORWARD and len(loops) == 2
    assert len(groups([*exchanges, *products], nodes)) == 1
    first = {name for name in products if not behind(name, nodes) & set(loops)}
    assert len(first) == FORWARD
    for name in set(products) - first:
        assert first <= behind(name, nodes) and len(behind(name, nodes) & set(loops)) == 1


@pytest.mark.quick("2-padded", "2-allgather")
@pytest.mark.parametrize("transport", ["padded", "allgather"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_rows_go_out_before_anything_is_exchanged(transport, chunks):
    """Neither the counts nor any other collective stands before the rows on their way out."""
    nodes = program(transport, chunks)
    exchanges, products, _ = work_of(nodes)
    out = [name for name in exchanges if not behind(name, nodes) & set(products)]
    counts = [name for name, node in nodes.items() if node.collectives and "exchange_counts" in node.scopes]
    assert len(out) == len(counts) == chunks
    for name in out:
        assert not [needed for needed in behind(name, nodes) if nodes[needed].collectives]
    for product in products:  # which do need the counts
        assert behind(product, nodes) & set(counts)


@pytest.mark.quick("False")
@pytest.mark.parametrize("backward", [False, True])
def test_shared_expert_overlaps_the_exchange(backward):
    """Its products need no exchange of rows, and no exchange of rows needs them; nor do the counts."""
    nodes = program("padded", 2, backward=backward)
    exchanges, _, loops = work_of(nodes)
    shared = {name for name, node in nodes.items() if node.multiplies("shared_expert")}
    assert len(shared) == (9 if backward else 3)
    all_to_alls = [name for name, node in nodes.items() if any("all-to-all" in c.op for c in node.collectives)]
    assert set(all_to_alls) >= {*exchanges, *loops}
    for name in shared:
        assert not behind(name, nodes) & set(all_to_alls)
    for name in all_to_alls:
        assert not behind(name, nodes) & shared
