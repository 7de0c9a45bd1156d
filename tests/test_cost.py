"""Costs of a plan against what the compiled layer contains: bytes on the wire and flops to the last one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.hardware import MACHINES
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


@pytest.mark.quick("tp 1-forward", "tp 2-forward + backward")
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
    unused = (ep - 1) * TOKENS * TOP_K  # of the rows of an arrival buffer, which is the operand on the way back
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
            "send": 0, "arrival": 0, "return": pairs * row, "rows": pairs * row,
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


def test_seconds_and_the_bound_follow_the_rates():
    big = {"tokens_per_rank": 4096, "hidden": 4096, "num_experts": 64, "top_k": 8, "transport": "padded"}
    for name, machine in MACHINES.items():
        for dtype, flops in (("float32", machine.flops32), ("bfloat16", machine.flops16)):
            cost = abstract(**big, dtype=dtype).cost(2048, hardware=name)["forward"]
            products = (cost.flops - cost.router_flops) / flops + cost.router_flops / machine.flops32
            assert (cost.hardware, cost.platform) == (name, machine.platform)
            assert cost.compute_seconds == pytest.approx(products)
            assert cost.memory_seconds == pytest.approx(cost.traffic_bytes / machine.memory_bandwidth)
            assert cost.wire_seconds == pytest.approx(cost.wire_bytes / machine.inside.bytes_per_second)
            seconds = {"compute": cost.compute_seconds, "memory": cost.memory_seconds, "wire": cost.wire_seconds}
            assert cost.bound[1] == max(seconds.values()) == seconds[cost.bound[0]]
    assert abstract(**big).cost(2048, platform="cpu")["forward"].bound[0] == "compute"
    assert abstract(**big).cost(1, platform="cpu")["forward"].bound[0] == "memory"
    copied = abstract(tokens_per_rank=8, transport="padded").cost(2048, num_replicas=16, platform="gpu")
    assert copied["forward + backward"].bound[0] == "wire"  # the gradients of the experts' weights


@pytest.mark.parametrize("passes,phase", list(enumerate(PHASES, 1)))
def test_a_ragged_exchange_costs_what_its_platform_asks(passes, phase):
    """On TPU passes over its rows at both ends, 1.4 times as slow as their bytes say; on GPU a 50th of the wire."""
    plan = abstract(transport="ragged", backend="xla")
    cpu, gpu, tpu = (plan.cost(FFN, platform=platform)[phase] for platform in ("cpu", "gpu", "tpu"))
    row, pairs, slots = HIDDEN * 4, TOKENS * TOP_K, 8 * plan.pair_capacity
    exchanges = 2 * passes
    assert gpu.traffic_bytes == cpu.traffic_bytes
    assert tpu.traffic_bytes - cpu.traffic_bytes == int(1.4 * exchanges * 2 * (pairs + slots) * row)
    moved = exchanges * pairs * row * 7 // 8 + 7 * EXPERTS * 4  # rows, and the counts of all
    assert gpu.wire_seconds == pytest.approx(
        (gpu.even_wire_bytes + 49 * moved) / MACHINES["h100"].inside.bytes_per_second
    )
    assert tpu.wire_seconds == pytest.approx(tpu.even_wire_bytes / MACHINES["v5p"].inside.bytes_per_second)


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
        ({"ffn": 24, "activation": "relu"}, "activation='relu'"),
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
