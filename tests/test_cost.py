"""Costs of a plan against what the compiled layer contains: bytes on the wire and flops to the last one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.hardware import MACHINES, Link, Machine, Torus
from moe_jax.hlo.contract import contract_of
from moe_jax.kernels import table
from moe_jax.plan.cost import PHASES

TOKENS, HIDDEN, EXPERTS, TOP_K, FFN = 32, 16, 16, 2, 24
SIZES = {"tokens_per_rank": TOKENS, "hidden": HIDDEN, "num_experts": EXPERTS, "top_k": TOP_K, "dtype": "float32"}
DROP = {"overflow": "drop"}  # one round: no loop to compile
CODED = {"quant": "int8", "combine_quant": "fp8_e4m3", "backward_quant": "int8"} | DROP
SHARED = {"num_shared_experts": 2, "dtype": "bfloat16"} | DROP
FP16 = {"num_shared_experts": 1, "dtype": "float16", "num_const_experts": 1, "num_copy_experts": 2} | DROP


def even_groups(lhs, rhs, group_sizes, *, transpose_rhs, each):
    """The products of an even load and no others: as if every group had ``each`` rows. Nobody runs it."""
    batches = lhs[: rhs.shape[0] * each].reshape(rhs.shape[0], each, -1)
    product = jnp.einsum("gsn,ghn->gsh" if transpose_rhs else "gsh,ghn->gsn", batches, rhs)
    return jnp.pad(product.reshape(rhs.shape[0] * each, -1), ((0, len(lhs) - rhs.shape[0] * each), (0, 0)))


def even_outer(lhs, rhs, group_sizes, *, dtype, each):
    lhs, rhs = (a[: len(group_sizes) * each].reshape(len(group_sizes), each, -1) for a in (lhs, rhs))
    return jnp.einsum("gsh,gsn->ghn", lhs, rhs).astype(dtype)


@pytest.fixture(scope="module", autouse=True)
def even_back_ends():
    """Back ends "even 32" and the like: their products can be counted in a compiled program, and are not in loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_TABLE", dict(table._TABLE))
        for each in (8, 16, 32):
            kernels = {"grouped_matmul": even_groups, "grouped_outer": even_outer}
            kernels = {name: functools.partial(kernel, each=each) for name, kernel in kernels.items()}
            moe.register_backend(moe.Backend(name=f"even {each}", kernels=kernels))
        yield


class Case(tuple):
    """(mesh, options of the plan, activation), hashable; on the back end of its even load unless options name one."""

    def __new__(cls, mesh, activation="swiglu", **options):
        each = TOKENS * TOP_K * mesh["ep"] * mesh.get("tp", 1) // EXPERTS
        options = {"backend": f"even {each}"} | options
        return super().__new__(cls, (tuple(mesh.items()), tuple(options.items()), activation))

    @functools.cached_property
    def mesh(self):
        return moe.make_mesh(**dict(self[0]))

    @property
    def options(self):
        return SIZES | dict(self[1])

    @functools.cached_property
    def plan(self):
        return moe.make_plan(self.mesh, **self.options)

    def cost(self, phase):
        return self.plan.cost(FFN, activation=self[2])[phase]

    def layer(self, phase):
        """(function, arguments): ``moe_on_mesh``, with the gradients of parameters and x in the second phase."""
        init, apply = moe.moe_on_mesh(self.mesh, self.plan, moe.RouterConfig(), ffn=FFN, activation=self[2])
        params = jax.eval_shape(init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((self.plan.tokens_per_rank * self.mesh.size, HIDDEN), self.plan.dtype)

        def with_gradients(params, x, ct):
            y, pull, stats = jax.vjp(apply, params, x, has_aux=True)
            return y, stats, pull(ct)

        return (jax.jit(apply), (params, x)) if phase == PHASES[0] else (jax.jit(with_gradients), (params, x, x))


@functools.cache
def compiled(case, phase):
    function, arguments = case.layer(phase)
    lowered = function.lower(*arguments)
    return lowered.compile({"xla_backend_optimization_level": 0})  # of machine code; HLO is what is read here


PADDED = Case({"ep": 8}, transport="padded")
CASES = {
    "padded": PADDED,
    "padded, tp, bf16, shared": Case({"ep": 4, "tp": 2}, transport="padded", **SHARED),
    "padded, quantised": Case({"ep": 4}, transport="padded", **CODED),
    "padded, replicas, fp16, special, gelu": Case({"ep": 2, "tp": 2, "dp": 2}, "gelu", transport="padded", **FP16),
    "padded, weights split over replicas": Case(
        {"ep": 2, "tp": 2, "dp": 2}, transport="padded", param_axes="dp", **DROP
    ),
    "allgather": Case({"ep": 8}, transport="allgather"),
    "allgather, tp, bf16, shared": Case({"ep": 2, "tp": 2}, transport="allgather", **SHARED),
    "allgather, quantised": Case({"ep": 4}, transport="allgather", **CODED),
    "hierarchy, tp, bf16, shared": Case({"ep": 4, "tp": 2, "nodes": 2}, transport="hierarchy", **SHARED),
    "hierarchy, quantised": Case({"ep": 4, "nodes": 2}, transport="hierarchy", **CODED),
}


@pytest.mark.quick(
    "padded, tp, bf16, shared-forward + backward", "allgather-forward", "hierarchy, tp, bf16, shared-forward"
)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wire_bytes_are_those_of_the_compiled_layer(case, phase):
    assert case.cost(phase).wire_bytes == contract_of(compiled(case, phase)).inline_wire_bytes > 0
    assert case.cost(phase).even_wire_bytes == case.cost(phase).wire_bytes
    assert case.cost(phase).inside_bytes + case.cost(phase).between_bytes == case.cost(phase).wire_bytes


@pytest.mark.quick("tp 2-forward + backward")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mesh", [{"ep": 8}, {"ep": 4, "tp": 2}], ids=["tp 1", "tp 2"])
def test_wire_bytes_of_the_native_ragged_exchange(mesh, phase):
    """On a CPU it is emulated, so the program is the one that goes to a TPU; one window, so that there is no loop."""
    case = Case(mesh, transport="ragged", backend="tpu", capacity_factor=float(mesh["ep"]))
    function, arguments = case.layer(phase)
    found = stable_wire_bytes(function.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text())
    cost = case.plan.cost(FFN, platform="tpu")[phase]
    assert cost.wire_bytes == found
    ep, exchanges = mesh["ep"], 1 if phase == PHASES[0] else 2
    unused = (ep - 1) * TOKENS * TOP_K  # of the slots of an inbox, which is the operand on the way back
    assert cost.wire_bytes - cost.even_wire_bytes == exchanges * unused * HIDDEN * 4 * (ep - 1) // ep


FACTORS = {"all_gather": lambda group: group, "all_reduce": lambda _: 2}
COLLECTIVE = re.compile(
    r"(all_to_all|all_gather|all_reduce|reduce_scatter)\b.*?replica_groups = "
    r"(?:dense<\[\[([\d, ]+)\]|#stablehlo.replica_group_mesh_axes<mesh = @(\w+), axes = \[(.*?)\]>).*?"
    r" : \(tensor<([\dx]*)([a-z]+\d+)>",
    re.DOTALL,
)


def stable_wire_bytes(text):
    """What leaves a device in all collectives of a StableHLO program. JAX 0.12 names the axes of most groups."""
    total, sizes = 0, {}
    for mesh, axes in re.findall(r"sdy\.mesh @(\w+) = <\[(.*?)\]>", text):
        sizes[mesh] = {name: int(size) for name, size in re.findall(r'"(\w+)"=(\d+)', axes)}
    for op, group, mesh, axes, extents, dtype in COLLECTIVE.findall(text):
        named = [sizes[mesh][name] for name in re.findall(r'name = "(\w+)"', axes)]
        members = len(group.split(",")) if group else math.prod(named)
        handed = math.prod(map(int, extents.split("x")[:-1])) * int(dtype[1:]) // 8
        total += FACTORS.get(op, lambda _: 1)(members) * handed * (members - 1) // members
    return total


def dot_flops(text):
    """2 * m * n * k of every product of matrices outside loops, which stand for further rounds."""
    total = 0
    for line in text.splitlines():
        if line.endswith("{"):
            extents = {}
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line)
        if not found:
            continue
        extents[found[1]] = [int(n) for n in found[2].split(",") if n]
        dot = re.search(r" dot\(%([\w.\-]+), .*lhs_contracting_dims=\{(\d+)\}", line)
        if dot and "/while/" not in line and 1 not in extents[found[1]]:  # no product with a vector
            total += 2 * math.prod(extents[found[1]]) * extents[dot[1]][int(dot[2])]
    return total


@pytest.mark.quick("padded, tp, bf16, shared-forward + backward", "allgather-forward")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [name for name in CASES if "hierarchy" not in name])
def test_flops_are_those_of_the_compiled_layer(name, phase):
    case = CASES[name]
    plan, cost = case.plan, case.cost(phase)
    assert cost.flops == dot_flops(compiled(case, phase).as_text()) > cost.router_flops
    assert cost.router_flops == (1 if phase == PHASES[0] else 3) * 2 * TOKENS * HIDDEN * plan.num_ids


def test_memory_traffic_by_hand():
    """Pass by pass: what is read, then what is written. 8 ranks of 2 experts, 32 even rows each, 20 slots per pair."""
    row, pairs, slots, even = HIDDEN * 4, TOKENS * TOP_K, 160, 64
    weights, inner = 2 * HIDDEN * FFN * 4, even * FFN * 4
    matrices = 4 * (TOKENS * HIDDEN + HIDDEN * EXPERTS + TOKENS * EXPERTS)
    products = 3 * weights + 3 * even * row + 6 * inner  # each projection: both operands, the result; the activation
    gradients = 6 * weights + (2 + 2 + 2 + 3) * even * row + 14 * inner  # 3 to add gate's and up's cotangents of rows
    moved = 2 * slots + 2 * slots + 2 * slots  # pack, exchange, permute
    home = 2 * slots + 2 * slots + 2 * pairs + pairs + TOKENS  # unpermute, exchange, unpack, sum
    forward, both = (PADDED.cost(phase).traffic_bytes for phase in PHASES)
    assert forward == matrices + products + (moved + home) * row
    assert both - forward == 2 * matrices + gradients + (moved + home + 2 * (pairs + TOKENS)) * row

    everyone = 8 * TOKENS
    moved = TOKENS + everyone + 2 * slots  # gather, permute
    home = everyone * (TOP_K + 1) + everyone + TOKENS  # partial sums, reduce-scatter
    scores = 2 * TOKENS + 2 * slots + 2 * everyone * TOP_K  # cast, weighted cotangents, <row, cotangent>
    forward, both = (CASES["allgather"].cost(phase).traffic_bytes for phase in PHASES)
    assert forward == matrices + products + (moved + home) * row
    assert both - forward == 2 * matrices + gradients + (moved + home + scores) * row


@pytest.mark.parametrize("transport", ["padded", "ragged", "hierarchy", "allgather"])
def test_kernels_that_work_in_slots_leave_passes_out(transport):
    """On a GPU, by hand: what is not copied, and what one kernel makes. Other back ends make all passes there."""
    names = ("node", "ep", "tp")
    gpu, copied = (
        moe.make_plan(
            AbstractMesh((2, 4, 1), names),
            **(SIZES | {"transport": transport}),
            hardware=plain_machine(),
            backend=backend,
        )
        for backend in ("auto", "xla")
    )
    slots = gpu.num_rows(gpu.pair_capacity) * HIDDEN * 4 * (transport != "allgather")  # there rows are picked in order
    rows, inner = 64 * HIDDEN * 4, 64 * FFN * 4
    # 1. Forward: rows are copied into the order of the experts and out of it. They are read for gate and for up, which
    #    are written, and read for the activation, instead of read once.
    forward = 4 * slots + rows + 2 * inner + 2 * inner
    # 2. With the backward pass gate and up are kept in either case. Cotangents are copied too, the activation and its
    #    derivative are two passes instead of one, and cotangents of rows are added by a pass.
    both = 2 * 4 * slots + rows + 2 * inner + 2 * inner + 2 * rows
    for phase, passes in zip(PHASES, (forward, both), strict=True):
        assert copied.cost(FFN)[phase].traffic_bytes - gpu.cost(FFN)[phase].traffic_bytes == passes
        assert copied.cost(FFN)[phase].wire_bytes == gpu.cost(FFN)[phase].wire_bytes


def abstract(ep=8, **options):
    return moe.make_plan(AbstractMesh((ep, 1), ("ep", "tp")), **(SIZES | options))


@pytest.mark.parametrize("dtype,item", [("float32", 4), ("bfloat16", 2)])
def test_one_device_moves_rows_by_two_gathers(dtype, item):
    """The same of any transport: there, back, sum; and with cotangents of pairs and of weights. Nothing is sent."""
    row, wide, pairs = HIDDEN * item, HIDDEN * 4, TOKENS * TOP_K
    for transport in ("auto", "allgather"):
        plan = abstract(ep=1, transport=transport, dtype=dtype)
        forward, both = (plan.cost(0, platform="gpu")[phase] for phase in PHASES)
        router = 4 * (TOKENS * HIDDEN + HIDDEN * EXPERTS + TOKENS * EXPERTS)
        moved = 5 * pairs * row + TOKENS * wide
        assert forward.traffic_bytes == router + moved
        assert both.traffic_bytes == 3 * router + 2 * moved + 2 * (pairs * row + TOKENS * wide)
        assert forward.wire_bytes == both.wire_bytes == 0
        assert plan.workspace() == {
            "outbox": 0, "inbox": 0, "return": pairs * row, "rows": pairs * row,
            "integers": 4 * (3 * pairs + 2 * EXPERTS),
        }  # fmt: skip
    assert "exchanges nothing" in abstract(ep=1).describe()


def test_only_cpus_cast_rows_for_sums_of_tp_ranks():
    """There and back between bf16 and fp32, rows that arrived and their sums, on every way home."""
    for tp, dtype in ((2, "bfloat16"), (2, "float32"), (1, "bfloat16")):
        mesh = AbstractMesh((4, tp), ("ep", "tp"))
        plan = moe.make_plan(mesh, **(SIZES | {"dtype": dtype, "transport": "padded"}))
        for passes, phase in enumerate(PHASES, 1):
            cpu, gpu = (plan.cost(FFN, platform=platform)[phase].traffic_bytes for platform in ("cpu", "gpu"))
            slots = 4 * plan.pair_capacity
            assert cpu - gpu == (passes * 3 * slots * 2 * HIDDEN * 4 if (tp, dtype) == (2, "bfloat16") else 0)


BIG = {"tokens_per_rank": 4096, "hidden": 4096, "num_experts": 64, "top_k": 8, "transport": "padded"}


def test_seconds_and_the_bound_follow_the_rates():
    for name, machine in MACHINES.items():
        for dtype, flops in (("float32", machine.flops32), ("bfloat16", machine.flops16)):
            cost = abstract(**BIG, dtype=dtype).cost(2048, hardware=name)["forward"]
            products = (cost.flops - cost.router_flops) / flops + cost.router_flops / machine.flops32
            assert (cost.hardware, cost.platform) == (name, machine.platform)
            assert cost.compute_seconds == pytest.approx(products)
            assert cost.memory_seconds == pytest.approx(cost.traffic_bytes / machine.memory_bandwidth)
            parts = {"compute": cost.compute_seconds, "memory": cost.memory_seconds, "wire": cost.wire_seconds}
            parts["latency"] = cost.latency_seconds
            assert cost.bound[1] == max(parts.values()) == parts[cost.bound[0]]
    assert abstract(**BIG).cost(2048, platform="cpu")["forward"].bound[0] == "compute"
    assert abstract(**BIG).cost(1, platform="cpu")["forward"].bound[0] == "memory"
    copied = abstract(tokens_per_rank=8, hidden=4096).cost(2048, num_replicas=16, hardware=plain_machine())
    assert copied["forward + backward"].bound[0] == "wire"  # the gradients of the experts' weights


def plain_machine(**figures):
    """Round figures of no real machine, so that no fit of a real one moves a test: 4 devices in a node."""
    figures = {
        "name": "plain", "platform": "gpu", "flops16": 1e15, "flops32": 1e14, "memory_bytes": 2**36,
        "memory_bandwidth": 1e12, "inside": Link(bytes_per_second=1e11, latency=1e-5),
        "between": Link(bytes_per_second=1e10, latency=2e-5), "devices_per_node": 4, "launch_seconds": 1e-6,
    } | figures  # fmt: skip
    return Machine(**figures)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("transport", ["padded", "ragged", "allgather", "hierarchy"])
def test_a_cost_is_the_sum_of_its_phases(transport, phase):
    """Each has the time of what bounds it and of what nothing hides; bytes are those of an even load."""
    mesh = AbstractMesh((2, 2, 4, 2), ("dp", "node", "ep", "tp"))
    plan = moe.make_plan(mesh, **(SIZES | {"transport": transport, "num_shared_experts": 1}), hardware=plain_machine())
    cost = plan.cost(FFN)[phase]
    assert [p.name for p in cost.phases] == ["route", "dispatch", "products", "activation", "combine", "gradients"]
    for p in cost.phases:
        assert p.seconds == max(p.compute_seconds, p.memory_seconds) + p.wire_seconds + p.latency_seconds
        assert p.bound[1] == max(p.compute_seconds, p.memory_seconds, p.wire_seconds, p.latency_seconds)
    assert cost.seconds == pytest.approx(sum(p.seconds for p in cost.phases))
    assert cost.flops == sum(p.flops for p in cost.phases)
    assert cost.traffic_bytes == sum(p.traffic_bytes for p in cost.phases)
    assert cost.inside_bytes + cost.between_bytes == cost.wire_bytes
    assert sum(p.inside_bytes + p.between_bytes for p in cost.phases) == cost.even_wire_bytes <= cost.wire_bytes
    by_name = {p.name: p for p in cost.phases}
    assert bool(by_name["gradients"].seconds) == (phase == PHASES[1])
    assert by_name["dispatch"].between_bytes and by_name["combine"].between_bytes and by_name["activation"].launches
    assert not by_name["products"].wire_seconds and by_name["products"].flops == cost.flops - cost.router_flops


def test_bytes_between_nodes_by_hand():
    """8 ranks on 2 nodes of 4: of the 7 others each sends blocks to, 4 are outside; counts enter a node once."""
    plan = abstract(transport="padded", overflow="drop", hardware=plain_machine())
    cost = plan.cost(FFN)["forward"]
    rows = 2 * 4 * plan.pair_capacity * HIDDEN * 4  # there and back, to four ranks
    counts = EXPERTS * 4 * 4 // 4  # one part in four of what each of the four ranks outside says
    sums = 2 * ((EXPERTS + 2) * 4 * 7 // 8) * 4 // 28 + 2 * ((EXPERTS + 1) * 4 * 7 // 8) * 4 // 28
    assert cost.between_bytes == pytest.approx(rows + counts + sums, abs=3)
    assert plan.cost(FFN, hardware="v5p")["forward"].between_bytes == 0
    dispatch = cost.phases[1]
    assert dispatch.between_bytes == rows // 2 and dispatch.inside_bytes == rows // 2 * 3 // 4
    assert dispatch.wire_seconds == pytest.approx(rows / 2 / 1e10)  # both links work at once, this is the slower
    assert dispatch.between_seconds == dispatch.wire_seconds
    assert dispatch.latency_seconds == pytest.approx(2e-5 + 1e-6)  # of the exchange between nodes, and to pack rows


def test_whole_groups_share_a_node():
    """Groups of 3 in nodes of 4: one device of each node stays unused, and no group reaches into the next node."""
    sizes = SIZES | {"num_experts": 6}
    for axes, outside in (((("dp", 2), ("ep", 3)), False), ((("dp", 2), ("ep", 6)), True)):
        names, extents = zip(*axes, strict=True)
        plan = moe.make_plan(AbstractMesh(extents, names), **sizes, hardware=plain_machine())
        dispatch = plan.cost(FFN)["forward"].phases[1]
        assert bool(dispatch.between_bytes) == outside


@pytest.mark.parametrize("axes,outside", [
    ({"ep": 8, "tp": 1}, 4), ({"ep": 2, "tp": 4}, 1), ({"ep": 4, "tp": 2}, 2), ({"dp": 4, "ep": 4, "tp": 1}, 0),
    ({"ep": 4, "tp": 1, "dp": 4}, 3), ({"node": 2, "ep": 2, "tp": 1}, 2), ({"node": 2, "ep": 8, "tp": 1}, 12),
    ({"ep": 6, "tp": 1}, 4),
])  # fmt: skip
def test_who_shares_a_node_follows_from_the_order_of_the_axes(axes, outside):
    """Nodes of 4 devices, filled along the last axis first; an axis "node" may make them smaller, never larger."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    plan = moe.make_plan(mesh, **(SIZES | {"num_experts": 48, "transport": "padded"}), hardware=plain_machine())
    dispatch = plan.cost(FFN)["forward"].phases[1]
    assert dispatch.between_bytes == outside * plan.pair_capacity * HIDDEN * 4


def test_seconds_grow_with_bytes():
    """With tokens, width, choices and capacity; and a wider recipe never takes less than a narrower one."""
    machine = plain_machine()

    def times(**options):
        return [
            c.seconds for c in abstract(**({"transport": "padded", "hardware": machine} | options)).cost(FFN).values()
        ]

    plain = times()
    for more in ({"tokens_per_rank": 4 * TOKENS}, {"hidden": 4 * HIDDEN}, {"top_k": 4}, {"capacity_factor": 6.0}):
        assert all(larger > smaller for larger, smaller in zip(times(**more), plain, strict=True))
    wide = {"hidden": 4096, "tokens_per_rank": 1024}
    narrow = {"quant": "int8", "combine_quant": "int8", "backward_quant": "int8"}
    assert all(less < more for less, more in zip(times(**wide, **narrow), times(**wide), strict=True))


def test_data_parallelism_adds_the_gradients_of_the_experts():
    """Each holder of a copy hands over all of them, in fp32; in a forward pass replicas share statistics alone."""
    plan = moe.make_plan(AbstractMesh((4, 8, 1), ("dp", "ep", "tp")), **SIZES, transport="padded")
    alone, copied = abstract(transport="padded"), plan.cost(FFN)
    experts = 3 * (EXPERTS // 8) * HIDDEN * FFN * 4
    both = copied["forward + backward"].wire_bytes - alone.cost(FFN)["forward + backward"].wire_bytes
    forward = copied["forward"].wire_bytes - alone.cost(FFN)["forward"].wire_bytes
    assert both - forward >= 2 * experts * 3 // 4 and forward < 100
    assert plan.num_replicas == 4 and copied == alone.cost(FFN, num_replicas=4)


def test_weights_split_over_replicas_are_gathered_and_their_gradients_scattered():
    """A forward pass gathers what others hold; a backward pass leaves each its part, added over other replicas."""
    mesh = AbstractMesh((2, 4, 8, 1), ("pod", "data", "ep", "tp"))
    split, whole = (
        moe.make_plan(mesh, **SIZES, transport="padded", param_axes=axes).cost(FFN) for axes in ("data", ())
    )
    experts = 3 * (EXPERTS // 8) * HIDDEN * FFN * 4
    forward, both = (split[phase].wire_bytes - whole[phase].wire_bytes for phase in PHASES)
    assert forward == experts * 3 // 4
    assert both == forward + experts * 3 // 4 + 2 * (experts // 4) // 2 - 2 * experts * 7 // 8
    phases = {phase.name: phase for phase in split["forward"].phases}
    assert phases["products"].inside_bytes == forward and phases["products"].wire_seconds > 0


def test_latency_bounds_a_decode_step():
    """4 tokens per device, wide as DeepSeek-V3: exchanges of nothing take as long, and products read their weights."""
    sizes = {"tokens_per_rank": 4, "hidden": 7168, "num_experts": 256, "top_k": 8, "dtype": "bfloat16"}
    fast = plain_machine(devices_per_node=8, inside=Link(bytes_per_second=1e12, latency=1e-5))
    for hardware in ("h100", fast):
        cost = abstract(**sizes, transport="padded", hardware=hardware).cost(2048)["forward"]
        phases = {phase.name: phase for phase in cost.phases}
        assert phases["dispatch"].bound[0] == phases["combine"].bound[0] == phases["route"].bound[0] == "latency"
        assert phases["products"].bound[0] == "memory"
        assert (
            abstract(**sizes | {"tokens_per_rank": 4096}).cost(2048, hardware=hardware)["forward"].bound[0] != "latency"
        )


@pytest.mark.parametrize("hardware", ["h100", "b200", "mi300x"])
def test_hierarchy_is_cheaper_between_nodes_where_a_token_has_many_choices(hardware):
    """8 choices on 4 nodes cross 2.6 times at most as hierarchy, and 6 as padded; one choice crosses no oftener."""
    mesh = AbstractMesh((4, 8, 1), ("node", "ep", "tp"))
    sizes = {"tokens_per_rank": 4096, "hidden": 7168, "num_experts": 256, "dtype": "bfloat16", "capacity_factor": 1.0}
    for top_k in (8, 1):
        padded, hierarchy = (
            moe.make_plan(mesh, **sizes, top_k=top_k, transport=name, hardware=hardware).cost(0)["forward + backward"]
            for name in ("padded", "hierarchy")
        )
        assert (hierarchy.between_bytes < padded.between_bytes / 1.5) == (top_k == 8)
        assert (hierarchy.seconds < padded.seconds) == (top_k == 8)


def test_questions_before_machines_are_bought():
    """DeepSeek-V3's layer on 64 cards, 8 in a node: what copies and int8 on the wire change, and what tp does."""
    sizes = {"tokens_per_rank": 4096, "hidden": 7168, "num_experts": 256, "top_k": 8, "num_shared_experts": 1}

    def cost(axes, **options):
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        plan = moe.make_plan(mesh, **sizes, **options, hardware="h100", transport="padded")
        return plan.cost(2048)["forward + backward"]

    copies, spread, split = (
        cost(axes) for axes in ({"dp": 8, "ep": 8, "tp": 1}, {"ep": 64, "tp": 1}, {"ep": 32, "tp": 2})
    )
    # 1. Copies keep rows inside the node and pay for the gradients of experts between nodes.
    gradients = {phase.name: phase for phase in copies.phases}["gradients"]
    assert copies.between_bytes == pytest.approx(gradients.between_bytes, rel=0.01)
    assert {phase.name: phase for phase in spread.phases}["dispatch"].between_bytes > spread.between_bytes / 3
    # 2. tp sends as many rows on, and adds what its ranks share inside the node.
    assert split.inside_bytes > spread.inside_bytes
    # 3. A byte for a number instead of two saves almost half of the rows' bytes, and nothing of the gradients'.
    names = ("quant", "combine_quant", "backward_quant")
    narrow = cost({"ep": 64, "tp": 1}, **dict.fromkeys(names, "int8"))
    assert 0.45 < narrow.wire_bytes / spread.wire_bytes < 0.55 and narrow.seconds < spread.seconds


@pytest.mark.parametrize("passes,phase", list(enumerate(PHASES, 1)))
def test_a_ragged_exchange_costs_what_its_platform_asks(passes, phase):
    """On TPU passes over its rows at both ends, some times as slow as their bytes say; on GPU a share of the wire."""
    plan = abstract(transport="ragged", backend="xla")
    plain = plan.cost(FFN, hardware=plain_machine(devices_per_node=8))[phase]
    shared = plan.cost(FFN, hardware=plain_machine(devices_per_node=8, ragged_share=0.02))[phase]
    relaid = plan.cost(FFN, hardware=plain_machine(devices_per_node=8, relayout_passes=1.5))[phase]
    row, pairs, slots = HIDDEN * 4, TOKENS * TOP_K, 8 * plan.pair_capacity
    exchanges = 2 * passes
    assert shared.traffic_bytes == plain.traffic_bytes
    assert relaid.traffic_bytes - plain.traffic_bytes == 1.5 * exchanges * 2 * (pairs + slots) * row
    moved = exchanges * pairs * row * 7 // 8
    assert plain.wire_seconds == pytest.approx(plain.even_wire_bytes / 1e11)
    assert shared.wire_seconds == pytest.approx((plain.even_wire_bytes + 49 * moved) / 1e11)
    assert relaid.wire_seconds == plain.wire_seconds


@pytest.mark.parametrize("transport", ["allgather", "hierarchy", "padded"])
def test_sums_on_tpus_pass_choice_by_choice(transport):
    """Where a token's rows are summed away from it: of each choice the row twice more, and the sum so far."""
    plan = moe.make_plan(AbstractMesh((2, 4, 1), ("node", "ep", "tp")), **SIZES, transport=transport)
    gpu, tpu = (plan.cost(FFN, hardware=plain_machine(platform=platform)) for platform in ("gpu", "tpu"))
    tokens = {"allgather": 8 * TOKENS, "hierarchy": 2 * TOKENS, "padded": 0}[transport]
    forward, both = (tpu[phase].traffic_bytes - gpu[phase].traffic_bytes for phase in PHASES)
    assert forward == tokens * TOP_K * (2 + 1) * HIDDEN * 4
    assert both == tokens * TOP_K * (2 * (2 + 1) + 2) * HIDDEN * 4


def test_an_all_to_all_on_a_torus_passes_through_other_devices():
    """Rows of padded and ragged reach a share of the links; what is gathered a larger one, that of a corner."""
    torus = Torus(dimensions=2, wraps_from=16)
    nodes = {"between": None, "devices_per_node": None}
    for transport, share in (("padded", torus.all_to_all_share(8)), ("allgather", torus.gather_share(8))):
        plan = abstract(transport=transport, hidden=4096)
        plain, slowed = (
            plan.cost(FFN, hardware=plain_machine(**nodes, torus=t))["forward"].phases[1] for t in (None, torus)
        )
        assert slowed.wire_seconds == pytest.approx(plain.wire_seconds / share) and share < 1


def test_describe_says_what_it_knows():
    plan = PADDED.plan
    short, long = plan.describe(), plan.describe(ffn=FFN)
    for phase, cost in plan.cost(FFN).items():
        line = next(line for line in long.splitlines() if line.startswith(f"cost       {phase}:"))
        for count in (cost.wire_bytes, cost.flops, cost.traffic_bytes):
            assert f"{count:,}" in line
        assert f"bound by {cost.bound[0]}" in line and "nominal rates of cpu" in line
        assert f"{cost.wire_bytes:,} B leave the device" in short and f"{cost.flops:,}" not in short
    assert "under an even load" in abstract(transport="ragged").describe() and "under an even" not in short
    assert "w_gate" not in short and plan.describe(ffn=FFN, activation="gelu") != long
    own_ranks = abstract(num_shared_experts=1, num_shared_ranks=1, num_experts=14)
    assert "cost  " not in own_ranks.describe()
    with pytest.raises(moe.errors.UnsupportedError, match="num_shared_ranks=1"):
        own_ranks.describe(ffn=FFN)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"ffn": -1}, "ffn=-1"),
        ({"ffn": 2.0}, "ffn=2.0"),
        ({"ffn": 25}, "ffn=25 must be divisible by tp=2"),
        ({"ffn": 24, "activation": "elu"}, "activation='elu'"),
        ({"ffn": 24, "num_replicas": 0}, "num_replicas=0"),
        ({"ffn": 24, "platform": "npu"}, "platform='npu'"),
        ({"ffn": 24, "hardware": "h1"}, "hardware='h1'"),
        ({"ffn": 24, "platform": "gpu", "hardware": "h100"}, "both name rates"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    plan = moe.make_plan(AbstractMesh((4, 2), ("ep", "tp")), **SIZES)
    with pytest.raises(moe.errors.InvalidArgumentError, match=re.escape(words)):
        plan.cost(**arguments)
