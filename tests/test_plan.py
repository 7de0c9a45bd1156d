"""Plans: a product's limits, what a row costs on the wire, what buffers take, and the choice of a transport."""

import functools
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.hardware import MACHINES, machine_of

SIZES = {"tokens_per_rank": 64, "hidden": 7168, "num_experts": 256, "top_k": 8}


def make(ep=16, tp=1, **options):
    return moe.make_plan(AbstractMesh((ep, tp), ("ep", "tp")), **(SIZES | options))


PRODUCT_RULES = [  # product, at the edge, just past it, words of the refusal
    ("a3", {"hidden": 8192}, {"hidden": 8193}, "hidden=8193"),
    ("a3", {"hidden": 1024}, {"hidden": 1023}, "hidden=1023"),
    ("a3", {"transport": "padded", "hidden": 8192}, {"transport": "hierarchy", "hidden": 8192}, "hidden=8192"),
    ("a3", {"tokens_per_rank": 512}, {"tokens_per_rank": 513}, "tokens_per_rank=513"),
    ("a3", {"num_experts": 1024, "ep": 128}, {"num_experts": 1152, "ep": 128}, "num_experts=1152"),
    ("a3", {"top_k": 16}, {"top_k": 17}, "top_k=17"),
    ("a3", {"quant": "int8"}, {"quant": "mx_e4m3"}, "quant='mx_e4m3'"),
    ("a3", {"quant": "int8"}, {"quant": "fp8_e4m3"}, "quant='fp8_e4m3'"),
    ("a3", {"dtype": "float16"}, {"dtype": "float32"}, "dtype='float32'"),
    ("a3", {"combine_quant": "int8_group8"}, {"combine_quant": "mx_e4m3"}, "combine_quant='mx_e4m3'"),
    ("a3", {"tp": 2, "num_experts": 16}, {"tp": 2, "num_experts": 32}, "local_experts_with_tp"),
    ("a5", {"quant": "mx_e4m3"}, {"quant": "int8_group8"}, "quant='int8_group8'"),
    ("a5", {"combine_quant": "mx_e4m3"}, {"combine_quant": "int8"}, "combine_quant='int8'"),
    ("a2", {"num_shared_experts": 0}, {"num_const_experts": 1}, "num_const_experts=1"),
    ("a2", {"ep": 16}, {"ep": 24, "num_experts": 240}, "ep=24"),
]


@pytest.mark.parametrize("product,legal,illegal,words", PRODUCT_RULES)
def test_a_product_refuses_what_its_operators_refuse(product, legal, illegal, words):
    make(**legal, product=product)
    make(**illegal)  # nothing is wrong with it elsewhere
    with pytest.raises(moe.errors.InvalidArgumentError, match=words):
        make(**illegal, product=product)


def test_pairs_per_token_count_shared_experts_on_ranks_of_their_own():
    plan = make()
    assert plan.pairs_per_token == plan.num_copies == plan.top_k  # by either name
    shared = make(num_shared_experts=1, num_shared_ranks=1, num_experts=plan.ep_size - 1)
    assert shared.pairs_per_token == shared.top_k + 1


@pytest.mark.parametrize(
    "quant,bytes_per_row",
    [("none", 2 * 7168), ("int8", 7168 + 4), ("fp8_e4m3_group128", 7168 + 4 * 56), ("mx_e2m1", 3584 + 224)],
)
def test_workspace_counts_the_message_of_a_quantised_row(quant, bytes_per_row):
    plan = make(quant=quant, transport="padded")
    slots = plan.ep_size * plan.pair_capacity
    assert plan.workspace()["outbox"] == plan.workspace()["inbox"] == slots * bytes_per_row
    assert plan.workspace()["rows"] == plan.num_rows(plan.pair_capacity) * 2 * 7168
    assert f"out {quant}" in plan.describe()


@pytest.mark.parametrize("hardware", ["cpu", "h100", "v5e"])
@pytest.mark.parametrize("options", [{}, {"quant": "int8"}, {"top_k": 1}, {"tokens_per_rank": 4}, {"ep": 2}])
def test_auto_takes_the_least_time_to_move_rows(hardware, options):
    """Wire, memory and latency by the machine's figures; the reason has them for every candidate, best first."""
    chosen, seconds = make(hardware=hardware, **options), {}
    for name in ("padded", "allgather", *(["ragged"] if hardware != "cpu" else [])):
        cost = make(hardware=hardware, transport=name, **options).cost(0)["forward + backward"]
        seconds[name] = cost.seconds
        for figure in (f"{1e3 * seconds[name]:.3g} ms", f"{cost.even_wire_bytes:,}", f"{cost.traffic_bytes:,}"):
            assert f"{name} " in chosen.transport_reason and figure in chosen.transport_reason
    assert seconds[chosen.transport] == min(seconds.values())
    places = {name: chosen.transport_reason.index(f" {name} ") for name in seconds}
    assert sorted(places, key=lambda name: places[name]) == sorted(seconds, key=lambda name: seconds[name])
    assert f"figures of {hardware}" in chosen.transport_reason
    assert ("2 % of" in chosen.transport_reason) == (hardware == "h100")  # where the share of the wire is from


@pytest.mark.parametrize("hardware", ["h100", "v5p", "v5e"])
@pytest.mark.parametrize("sizes", [(1024, 32, 4, 1024), (2048, 128, 8, 2048), (7168, 64, 8, 1024)], ids=["A", "B", "C"])
def test_auto_sends_equal_blocks_where_a_ragged_exchange_is_dear(hardware, sizes):
    """By the compilers' own estimates on TPU, and what is published of GPUs; it was ragged before they were known."""
    hidden, experts, top_k, tokens = sizes
    options = {"ep": 8, "hidden": hidden, "num_experts": experts, "top_k": top_k, "tokens_per_rank": tokens}
    plan = make(**options, hardware=hardware)
    padded, ragged = (make(**options, hardware=hardware, transport=name).cost(0) for name in ("padded", "ragged"))
    figure = "ragged_share" if plan.platform == "gpu" else "relayout_passes"
    assert plan.transport == "padded" and plan.hardware.source_of(figure) in plan.describe()
    assert all(padded[phase].seconds < ragged[phase].seconds for phase in padded)


AOT_SIZES = {"tokens_per_rank": 256, "hidden": 512, "num_experts": 32, "top_k": 4, "dtype": "bfloat16"}


@pytest.mark.compilers
def test_auto_takes_the_best_by_the_report_of_the_compiler():
    """For H100: bytes beside products at the memory's rate, and the wire of the cost model, whose bytes are exact."""
    needs("h100:8")
    mesh, seconds = moe.make_mesh(ep=8), {}
    for name in ("padded", "ragged", "allgather"):
        plan = moe.make_plan(mesh, **AOT_SIZES, transport=name, hardware="h100")
        init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=512)
        x = jax.ShapeDtypeStruct((8 * 256, 512), plan.dtype)
        report = moe.compile_for("h100:8", jax.jit(apply), jax.eval_shape(init, jax.random.key(0)), x)
        cost = plan.cost(512)["forward"]
        others = report.work.other_bytes / plan.hardware.memory_bandwidth
        seconds[name] = others + cost.wire_seconds + cost.latency_seconds
    assert make(ep=8, hardware="h100", **AOT_SIZES).transport == min(seconds, key=lambda name: seconds[name]), seconds


def test_auto_weighs_hierarchy_where_the_mesh_spans_nodes():
    """It is a candidate on a mesh with an axis "node" alone; without one the plan says what the axis would change."""
    options = {"tokens_per_rank": 4096, "hardware": "h100"}
    nodes = moe.make_plan(AbstractMesh((4, 8, 1), ("node", "ep", "tp")), **(SIZES | options))
    flat = make(ep=32, **options)
    assert "hierarchy " in nodes.transport_reason and flat.transport != "hierarchy"
    seconds = {}
    for name in ("padded", "ragged", "allgather", "hierarchy"):
        plan = moe.make_plan(AbstractMesh((4, 8, 1), ("node", "ep", "tp")), **(SIZES | options), transport=name)
        seconds[name] = plan.cost(0)["forward + backward"].seconds
    assert nodes.transport == min(seconds, key=lambda name: seconds[name]) == "hierarchy"
    assert 'an axis "node" of 4, hierarchy would take' in flat.transport_reason
    assert f"{1e3 * seconds['hierarchy']:.3g} ms" in flat.transport_reason
    for inside in (make(ep=8, **options), make(ep=32, tokens_per_rank=4096, hardware="v5p"), nodes):
        assert "would take" not in inside.transport_reason


def test_auto_leaves_out_what_the_compiler_refuses():
    """A ragged exchange between more than 16 v5e; who asks for it is told."""
    large = make(ep=64, tokens_per_rank=1024, hardware="v5e")
    assert large.transport == "padded" and "ragged" not in large.transport_reason
    assert "ragged" in make(ep=16, hardware="v5e").transport_reason
    words = "refuses a ragged exchange on more than 16 devices"
    assert words in make(ep=64, hardware="v5e", transport="ragged").transport_reason
    for other in ({"ep": 16, "hardware": "v5e"}, {"ep": 64, "hardware": "v5p"}):
        assert words not in make(**other, transport="ragged").transport_reason


def test_describe_names_chunks_and_capacity_where_they_matter():
    """Rows that travel while others are multiplied; rows of an exchange that carry nothing."""
    big = make(ep=8, tokens_per_rank=4096, hardware="v5e", transport="padded").describe(ffn=2048)
    (line,) = [line for line in big.splitlines() if line.startswith("chunks ")]
    assert int(line.split()[1]) in (2, 4, 8) and "would take" in line
    assert "capacity_factor=1.0 would take" in big
    small = make(ep=8, tokens_per_rank=4, hardware="h100", transport="padded").describe(ffn=2048)
    assert "chunks " not in small
    tight = make(ep=8, tokens_per_rank=4096, hardware="v5e", transport="padded", capacity_factor=1.0)
    assert "capacity_factor=1.0" not in tight.describe(ffn=2048)


# Picked from a longer list for their margins: they hold the choice still, and do not show how often it is right.
MEASURED = [  # tokens, hidden, experts, top_k, ep, what took least CPU time, forward + backward, on emulated devices
    (512, 512, 16, 1, 8, "padded"),
    (512, 512, 16, 2, 8, "padded"),
    (512, 512, 16, 8, 8, "padded"),
    (256, 1024, 128, 8, 8, "padded"),
    (256, 1024, 32, 8, 2, "allgather"),
]


@pytest.mark.parametrize("tokens,hidden,experts,top_k,ep,fastest", MEASURED)
def test_auto_takes_what_was_measured_to_be_fastest(tokens, hidden, experts, top_k, ep, fastest):
    sizes = {"tokens_per_rank": tokens, "hidden": hidden, "num_experts": experts, "top_k": top_k, "dtype": "float32"}
    assert make(ep=ep, **sizes).transport == fastest


def test_hierarchy_has_a_workspace_and_says_its_nodes():
    mesh = AbstractMesh((2, 8, 1), ("node", "ep", "tp"))
    plan = moe.make_plan(mesh, **SIZES, transport="hierarchy")
    assert plan.num_nodes == 2 and plan.ep_size == 16
    assert plan.workspace()["node_slots"] == 2 * 2 * 64 * 2 * 7168  # no token crosses to a node twice


@pytest.mark.parametrize("overflow", ["dropless", "drop"])
@pytest.mark.parametrize("transport", ["padded", "ragged", "allgather", "hierarchy"])
def test_workspace_of_dispatch_is_what_a_call_makes(transport, overflow):
    """Shapes of what dispatch returns give the extents of its buffers, worst skew or not."""
    tokens, hidden, top_k = 24, 16, 3
    mesh = AbstractMesh((2, 4, 2), ("node", "ep", "tp"))
    plan = moe.make_plan(
        mesh, tokens_per_rank=tokens, hidden=hidden, num_experts=16, top_k=top_k, dtype="float32",
        transport=transport, overflow=overflow,
    )  # fmt: skip
    everywhere = P(("node", "ep", "tp"))
    run = jax.shard_map(
        functools.partial(moe.dispatch, plan=plan), mesh=mesh, in_specs=everywhere, out_specs=everywhere
    )
    given = ((tokens * 16, hidden), jnp.float32), ((tokens * 16, top_k), jnp.int32)
    place = NamedSharding(mesh, everywhere)  # JAX asks for it where axes are Explicit, the default of newer JAX
    sent = jax.eval_shape(run, *(jax.ShapeDtypeStruct(*shape, sharding=place) for shape in given))
    maps = {name: array for name, array in vars(sent.handle.maps).items() if name != "exchange"}
    sizes, extents = plan.workspace("dispatch"), {name: array.shape[0] // 16 for name, array in maps.items()}
    assert sizes["rows"] == sent.x.shape[0] // 16 * hidden * 4
    assert (sizes == plan.workspace()) == (overflow == "drop")
    if transport == "allgather":
        assert sizes["inbox"] == extents["pair_row"] * tokens * hidden * 4
        return
    assert sizes["inbox"] == extents["inbox_row"] * hidden * 4
    assert sizes["outbox"] == extents["outbox_pair"] * hidden * 4
    if transport == "hierarchy":
        assert sizes["node_slots"] == 2 * extents["node_outbox_token"] * hidden * 4


def test_a_plan_says_what_both_calls_take():
    """DeepSeek-V3 on 32 ranks: half a gigabyte of rows in a round of the layer, 14 in a call of dispatch alone."""
    plan = make(ep=32, tokens_per_rank=4096, transport="padded")
    layer, alone = plan.workspace()["rows"], plan.workspace("dispatch")["rows"]
    assert layer == 32 * plan.pair_capacity * 7168 * 2 < 0.6 * 2**30
    assert alone == 32 * 4096 * 8 * 7168 * 2 == 14 * 2**30
    text = plan.describe()
    for figure in (f"{layer:,} B", f"{alone:,} B", f"{32 * plan.pair_capacity} rows", f"{32 * 4096 * 8} rows"):
        assert figure.removesuffix(" rows") in text
    assert "dispatch alone" in text and "a round of the layer" in text
    with pytest.raises(moe.errors.InvalidArgumentError, match="call='combine' is unknown"):
        plan.workspace("combine")


def test_hierarchy_without_nodes_is_one_node():
    """As make_mesh(nodes=1) has it, so that a program for any number of nodes has one case; and it says so."""
    plan = make(transport="hierarchy")
    assert plan.num_nodes == 1 and plan.ep_axis == ("ep",)
    assert "one node" in plan.describe() and "one node" not in make(transport="padded").describe()
    nodes = moe.make_plan(AbstractMesh((2, 8, 1), ("node", "ep", "tp")), **SIZES, transport="hierarchy")
    assert nodes.transport_reason == "as asked"


@pytest.mark.parametrize("hardware", ["h100", "v5e", "a3"])
def test_a_plan_for_a_named_machine_is_the_same_wherever_it_is_made(hardware):
    """On a mesh without devices and on one of CPU devices; back ends and platform are those of the machine."""
    sizes = SIZES | {"num_experts": 16}
    here = moe.make_plan(moe.make_mesh(ep=2, tp=2, dp=2), **sizes, hardware=hardware)
    axes, machine = {"dp": 2, "ep": 2, "tp": 2}, MACHINES[hardware]
    anywhere = moe.make_plan(AbstractMesh(tuple(axes.values()), tuple(axes)), **sizes, hardware=machine)
    assert here == anywhere and here.describe(ffn=8) == anywhere.describe(ffn=8)
    assert (here.hardware, here.platform, here.num_replicas) == (machine, machine.platform, 2)
    assert here.backend == {"h100": "hopper", "v5e": "tpu_lite", "a3": "xla"}[hardware]
    assert "2 replicas over dp, on " + hardware in here.describe()


def test_a_named_machine_asks_no_devices(monkeypatch):
    """A plan for another machine is arithmetic: JAX, whose start fixes the number of devices, is not started."""
    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, lambda *args, name=name, **kwargs: pytest.fail(f"jax.{name} was called"))
    plan = moe.make_plan(AbstractMesh((2, 8, 1), ("node", "ep", "tp")), **SIZES, hardware="h100")
    assert plan.cost(64) and plan.memory(64) and plan.describe(ffn=64)


def test_a_plan_for_a_named_machine_is_that_of_a_host_with_such_devices():
    """Devices stand in for those of the machine, under each name that JAX has for their kind."""
    for name in ("h100", "v5p"):
        machine = MACHINES[name]
        named = make(hardware=name)
        for kind in machine.kinds:
            assert make_on(machine.platform, kind) == named
    unlisted = make_on("gpu", "NVIDIA RTX 6000")
    assert unlisted.hardware == machine_of("gpu", "NVIDIA RTX 6000") and unlisted.backend == "gpu"
    assert "kind 'NVIDIA RTX 6000'" in unlisted.backend_reason


def make_on(platform, kind):
    """The plan that ``make`` makes on a host whose devices are of that kind."""
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [device])
        return make()


def test_a_plan_without_a_machine_is_for_the_devices_that_are_there():
    plan = moe.make_plan(moe.make_mesh(ep=2), **SIZES)
    assert plan.hardware == MACHINES["cpu"] and plan == moe.make_plan(moe.make_mesh(ep=2), **SIZES, hardware="cpu")
    assert make(ep=2).hardware == MACHINES["cpu"] and plan.num_replicas == 1


def test_devices_of_another_platform_are_refused(monkeypatch):
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    mesh = unittest.mock.Mock(spec=jax.sharding.Mesh, shape={"ep": 2, "tp": 1}, devices=np.array([[device]] * 2))
    assert moe.make_plan(mesh, **SIZES, hardware="v5p").hardware.name == "v5p"
    with pytest.raises(
        moe.errors.InvalidArgumentError, match="hardware='h100' is of platform 'gpu' and the mesh has 'tpu'"
    ):
        moe.make_plan(mesh, **SIZES, hardware="h100")


@pytest.mark.parametrize(
    "hardware,words", [("h1000", "did you mean 'h100'"), (3, "hardware=3"), ("no/such.toml", "no/such")]
)
def test_a_machine_that_there_is_not_is_named(hardware, words):
    with pytest.raises(moe.errors.InvalidArgumentError, match=words):
        make(hardware=hardware)
