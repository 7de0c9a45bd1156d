"""What the compilers say about the memory of the layer and of ``dispatch``: the facts that ``Plan.memory`` must meet.

``tests/data/compiled_memory.json`` has a line for each program. ``python tests/compiled_memory.py`` compiles them all
again and writes the file; words after it choose the lines that have them all, as in ``h100:8 padded``. A program takes
20 seconds to several minutes.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax.layer.params import param_spec
from moe_jax.tools.bench.programs import with_backward

FILE = Path(__file__).parent / "data" / "compiled_memory.json"
PROGRAMS = ("forward", "backward", "dispatch")  # "backward": forward and backward
# (tokens, hidden, ffn, experts, top k, shared experts) of each workload: A, A64, B and C of docs/performance.md, a
# small one, and DeepSeek-V3.
WORKLOADS = {
    "A": (1024, 1024, 1024, 32, 4, 0),
    "A64": (1024, 1024, 1024, 64, 4, 0),
    "B": (2048, 2048, 768, 128, 8, 0),
    "C": (1024, 7168, 2048, 64, 8, 0),
    "S": (512, 512, 1024, 16, 2, 0),
    "D": (1024, 7168, 2048, 256, 8, 1),
}


def facts() -> list[dict[str, Any]]:
    """The stored lines: what was compiled, and bytes by the compiler's word."""
    return json.loads(FILE.read_text())


def name_of(fact: dict[str, Any]) -> str:
    """A line in short, as pytest shows it."""
    last = mesh_of(fact) + (f",chunks={fact['chunks']}" if fact["chunks"] > 1 else "")
    last += ",weighed" if fact["weigh_inputs"] else ""
    words = (fact["target"], fact["workload"], fact["program"], fact["dtype"], fact["param_dtype"], fact["transport"])
    return " ".join((*words, last))


def mesh_of(fact: dict[str, Any]) -> str:
    """The mesh in words."""
    return f"ep={fact['ep']},tp={fact['tp']}" + (f",nodes={fact['nodes']}" if fact["nodes"] > 1 else "")


def plan_of(fact: dict[str, Any], mesh: Any = None) -> moe.Plan:
    """The plan of the layer; without a mesh, on one of which only the shape exists."""
    if mesh is None:
        sizes = {"node": fact["nodes"], "ep": fact["ep"] // fact["nodes"], "tp": fact["tp"]}
        sizes = {name: size for name, size in sizes.items() if size > 1 or name != "node"}
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    tokens, hidden, _, experts, top_k, shared = WORKLOADS[fact["workload"]]
    return moe.make_plan(
        mesh,
        tokens_per_rank=tokens,
        hidden=hidden,
        num_experts=experts,
        top_k=top_k,
        dtype=fact["dtype"],
        num_shared_experts=shared,
        transport=fact["transport"],
        hardware=fact["target"].split(":")[0],
    )


def total(fact: dict[str, Any]) -> int:
    """What the program needs by its compiler's word.

    XLA:TPU lets temporaries spread while memory is plentiful: their sum is up to twice what lies in memory at the
    largest moment, and comes down where memory is short. So there it is the peak that counts. XLA:CPU leaves
    temporaries out of the peak that it reports, and XLA:GPU's peak is the sum.
    """
    is_tpu = fact["target"].startswith("v")
    return fact["peak"] if is_tpu else fact["argument"] + fact["output"] + fact["temporary"]


def build(devices: Sequence[Any], fact: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """For ``compile_for``: the program of a line over the target's devices."""
    mesh = moe.make_mesh(ep=fact["ep"], tp=fact["tp"], nodes=fact["nodes"], devices=devices)
    plan, ffn = plan_of(fact, mesh), WORKLOADS[fact["workload"]][2]
    spec = PartitionSpec(plan.token_axes)

    def placed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    x = placed((plan.tokens_per_rank * mesh.size, plan.hidden), plan.dtype, spec)
    if fact["program"] == "dispatch":
        ids = placed((plan.tokens_per_rank * mesh.size, plan.top_k), jnp.int32, spec)

        def sent(x, ids):
            return moe.dispatch(x, ids, plan).x

        return jax.shard_map(sent, mesh=mesh, in_specs=spec, out_specs=spec), (x, ids)
    init, apply = moe.moe_on_mesh(
        mesh, plan, moe.RouterConfig(), ffn=ffn, chunks=fact["chunks"], weigh_inputs=fact["weigh_inputs"]
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = {
        name: placed(a.shape, fact["router" if name == "router" else "param_dtype"], param_spec(name, plan))
        for name, a in shapes.items()
    }
    return (apply, (params, x)) if fact["program"] == "forward" else (with_backward(apply), (params, x, x))


def measured(fact: dict[str, Any]) -> dict[str, Any]:
    """The line with what the compiler says of the program today."""
    report = moe.compile_for(fact["target"], f"{Path(__file__).stem}:build", fact)
    return {
        **fact,
        "temporary": report.temporary_bytes,
        "argument": report.argument_bytes,
        "output": report.output_bytes,
        "peak": report.peak_bytes,
    }


def write(lines: Sequence[dict[str, Any]]) -> None:
    """One line of the file for each program."""
    FILE.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")


def chosen(words: Sequence[str], lines: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Places of the lines that have all the words."""
    yield from (place for place, line in enumerate(lines) if set(words) <= set(name_of(line).split()))


if __name__ == "__main__":
    known = facts()
    for place in chosen(sys.argv[1:], known):
        known[place] = measured(known[place])
        print(name_of(known[place]), f"{total(known[place]):,} B", flush=True)
        write(known)
