"""How a plan is made: every argument checked at once, every default resolved."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import OVERFLOWS
from moe_jax.errors import InvalidArgumentError, MeshError, choice_violations, flag_violations, raise_all
from moe_jax.hardware import Machine, machine_of
from moe_jax.kernels.table import PLATFORMS, describe_backend, registrations, resolve_all
from moe_jax.plan import checks
from moe_jax.plan.axes import AUTO, extent, resolve_axes
from moe_jax.plan.cost import PHASES, Cost, rows_cost
from moe_jax.plan.describe import cost_words
from moe_jax.plan.plan import Plan
from moe_jax.plan.size import balanced_rows
from moe_jax.plan.transport_table import transport_names, transport_of


def make_plan(
    mesh: Mesh | AbstractMesh,
    *,
    tokens_per_rank: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: str = "bfloat16",
    num_shared_experts: int = 0,
    num_shared_ranks: int = 0,
    num_zero_experts: int = 0,
    num_copy_experts: int = 0,
    num_const_experts: int = 0,
    quant: str = "none",
    combine_quant: str = "none",
    transport: str = "auto",
    overflow: str = "dropless",
    capacity_factor: float | None = None,
    backend: str = "auto",
    product: str | None = None,
    backward_quant: str = "none",
    poison: bool = False,
    ep_axis: str | tuple[str, ...] = AUTO,
    tp_axis: str | tuple[str, ...] | None = AUTO,
    token_axes: str | tuple[str, ...] = AUTO,
    param_axes: str | tuple[str, ...] = (),
    hardware: str | Machine | None = None,
) -> Plan:
    """Checks everything about a layer on a mesh at once, resolves every default, and returns the static plan.

    Args:
      mesh: any mesh. Only names, sizes, the platform and the kind of its devices are read. Devices are taken to be
        laid out as ``make_mesh`` does it: along the last axis first, and so node by node.
      tokens_per_rank: T, tokens per device; may be 0. Fewer true tokens are given by a mask.
      hidden: H.
      num_experts: E physical routed experts, divisible by the expert-parallel size.
      top_k: K, at least 1 and at most the number of ids, E plus the zero, copy and constant experts.
      dtype: "float32", "bfloat16" or "float16", of the rows.
      num_shared_experts: Ns, experts that every token goes to.
      num_shared_ranks: S. 0: shared experts are computed beside the exchange, where the token is. Otherwise they live
        on the first S expert-parallel ranks, S / Ns of them for each, and routed experts on the others, E / (ep - S)
        on each. Every token of source rank r also goes to rank (r mod S / Ns) + s * S / Ns for each shared expert s.
        For ``dispatch`` and ``combine``; the layer does not serve it.
      num_zero_experts, num_copy_experts, num_const_experts: experts that add nothing, the token itself, or a mix of the
        token and a constant vector; their ids follow E, they send no row. See ``moe_jax.layer.weightless``.
      quant: recipe of the rows on their way to the experts, see ``moe_jax.quant``; "none" sends them as they are.
      combine_quant: recipe of the rows on their way back; any that takes no scale of the caller's.
      product: "a2", "a3" or "a5": also refuse what CANN's operators refuse on that hardware, see
        ``moe_jax.hardware.ascend``; None: whatever is possible.
      transport: "padded" (all_to_all of equal blocks), "ragged" (ragged_all_to_all), "allgather" (all tokens out,
        reduce-scatter back), "hierarchy" (a token crosses to each node of a mesh with a "node" axis once, and one
        partial sum comes back; without that axis all ranks are one node, inside which rows go from rank to rank), or
        "auto": whichever should take the least time to move rows in a forward and a backward pass of the layer on
        ``hardware``, see ``moe_jax.plan.cost``; "ragged" not on CPUs, and "hierarchy" only where experts are spread
        over several axes. Where one device holds all experts, it takes "padded". ``Plan.describe()`` has the times of
        all candidates, and says what an axis of nodes would change.
      overflow: "dropless": what does not fit into a round waits for the next; "drop": it is dropped and counted. Each
        pair of ranks keeps the front of its list, which is sorted by expert: the last experts of a rank lose most.
      capacity_factor: rows that a pair of ranks can move in a round of the layer, relative to the balanced load,
        T * K / ep; None: 1.25, and four standard deviations of a uniform router at least. Never more than T * K. A call
        of ``dispatch`` alone has room for T * K rows, whatever this is, unless overflow is dropped; so has the layer
        where one device holds all experts (ep = tp = 1), which exchanges nothing.
      backward_quant: recipe of the cotangents of rows, on both ways; any that ``combine_quant`` may be.
      backend: a registered back end; several joined by "+", of which the first that has a kernel serves it; or "auto":
        those for the platform and the kind of ``hardware``. ``Plan.describe()`` says which serves what.
      poison: fill every slot and row that nobody may read with NaN, to prove that nobody does. For tests.
      ep_axis: the axis over which experts are spread, or a tuple of several, outermost first; of several, the last one
        lies inside a node, and the others go from node to node. "auto": "ep", or ("node", "ep") if there is a "node".
      tp_axis: the axis along which every expert is split, or a tuple of several; None: there is none. "auto": "tp",
        where the mesh has it.
      token_axes: all axes over which tokens are spread, outermost first; those of ``ep_axis`` and ``tp_axis`` must be
        among them, and any other one is a data axis, along which the whole group of ranks is there again. "auto": the
        axes of ``ep_axis`` and ``tp_axis``, and all others before them where neither was named. What is left of the
        mesh is left alone: every device along such an axis does the same.
      param_axes: data axes along which the weights of experts are split as well, H of each matrix in equal parts. The
        layer gathers them for use, and their gradients are reduced and scattered. (): a copy for every replica.
      hardware: the machine that the plan is for: a name in ``moe_jax.hardware.MACHINES`` such as "h100", the path of a
        TOML file that describes one, or a ``Machine``. The platform, what "auto" takes and all costs follow it, and
        nothing of the process that makes the plan counts: the mesh may be an ``AbstractMesh``, or one of CPU devices,
        on which the plan's program can be traced and lowered, and runs as well. Devices of any other platform than the
        machine's are refused; within a platform the kind is not compared, and back ends are those for the machine's.
        None: the machine that the mesh's devices are, or JAX's own where the mesh has none.

    Raises:
      InvalidArgumentError: lists every rule that is broken.
      MeshError: the same, where it is the mesh or its axes that are wrong.

    >>> import moe_jax as moe
    >>> moe.emulate_devices(4)  # leave this out where there are accelerators
    >>> moe.make_plan(moe.make_mesh(ep=4), tokens_per_rank=16, hidden=8, num_experts=8, top_k=2).pair_capacity
    20
    """
    # 1. Everything that is wrong is found before anything is said.
    axes, wrong_mesh = resolve_axes(mesh, ep_axis, tp_axis, token_axes, param_axes)
    shape = {} if wrong_mesh else dict(mesh.shape)
    ep_size, tp_size, num_shards = (extent(names, shape) for names in (axes.ep, axes.tp, axes.params))
    mesh_sizes = None if wrong_mesh else (ep_size, tp_size)
    sizes = {
        "tokens_per_rank": tokens_per_rank,
        "hidden": hidden,
        "num_experts": num_experts,
        "top_k": top_k,
        "num_shared_experts": num_shared_experts,
        "num_shared_ranks": num_shared_ranks,
        "num_zero_experts": num_zero_experts,
        "num_copy_experts": num_copy_experts,
        "num_const_experts": num_const_experts,
    }
    recipes = {"quant": quant, "combine_quant": combine_quant, "backward_quant": backward_quant}
    given, wrong_hardware = (None, []) if hardware is None else checks.find_hardware(hardware)
    violations = [
        *wrong_mesh,
        *checks.size_violations(mesh_sizes, sizes),
        *checks.shard_violations(hidden, num_shards),
        *checks.dtype_violations(dtype),
        *choice_violations("transport", transport, ("auto", *transport_names())),
        *choice_violations("overflow", overflow, OVERFLOWS),
        *checks.backend_violations(backend),
        *checks.capacity_violations(capacity_factor),
        *flag_violations("poison", poison),
        *checks.recipe_violations(hidden, recipes),
        *checks.product_violations(product, mesh_sizes, dtype, transport, recipes, sizes),
        *wrong_hardware,
        *([] if given is None or wrong_mesh else checks.platform_violations(mesh, given)),
    ]
    raise_all(violations, "make_plan", MeshError if wrong_mesh else InvalidArgumentError)

    # 2. Every default is resolved. NumPy's numbers become Python's, which hash and print alike.
    sizes = {name: int(value) for name, value in sizes.items()}
    dtype = str(jnp.dtype(dtype))
    machine, kind = (given, given.kinds[0] if given.kinds else "") if given else _machine_of_mesh(mesh)
    names = _back_ends(machine, kind) if backend == "auto" else backend
    tokens, most = sizes["tokens_per_rank"], sizes["tokens_per_rank"] * sizes["top_k"]
    balanced = balanced_rows(tokens, sizes["top_k"], ep_size, sizes["num_shared_ranks"])
    pair_capacity = _pair_capacity(balanced, most, capacity_factor)
    if ep_size * tp_size == 1 and overflow == "dropless":
        pair_capacity = max(1, most)  # nothing is exchanged, and all rows are there in one round
    plan = Plan(
        ep_axis=axes.ep,
        tp_axis=axes.tp[0] if len(axes.tp) == 1 else axes.tp or None,
        token_axes=axes.tokens,
        param_axes=axes.params,
        mesh_axes=tuple((name, int(size)) for name, size in shape.items()),
        ep_size=ep_size,
        tp_size=tp_size,
        num_nodes=extent(axes.ep[:-1], shape),
        dtype=dtype,
        transport=transport,
        transport_reason="as asked",
        overflow=overflow,
        pair_capacity=pair_capacity,
        hardware=machine,
        platform=machine.platform,
        backend=names,
        backend_reason=describe_backend(names) + ("; as asked" if backend != "auto" else _for_kind(machine, kind)),
        kernels=registrations(names),
        poison=bool(poison),
        quant=quant,
        combine_quant=combine_quant,
        backward_quant=backward_quant,
        **sizes,
    )
    # 3. A transport is chosen last, for it is the plan itself that says what each of them costs.
    if transport != "auto":
        remark = transport_of(plan).remark(plan)
        return dataclasses.replace(plan, transport_reason=f"as asked; {remark}") if remark else plan
    if not plan.exchanges:
        reason = "one device holds all experts, so the layer exchanges nothing"
        return dataclasses.replace(plan, transport="padded", transport_reason=reason)
    return _with_least_time(plan)


def _with_least_time(plan: Plan) -> Plan:
    """``plan`` with the transport that should take the least time to move rows."""
    costs, sources = {}, []
    for name in transport_names():
        candidate = dataclasses.replace(plan, transport=name)
        transport = transport_of(candidate)
        if not transport.automatic(candidate):
            continue
        sources.append(transport.source_of_rates(plan.hardware))
        costs[name] = rows_cost(candidate)
    chosen = min(costs, key=lambda name: costs[name].seconds)
    words = ", ".join(
        f"{name} {cost_words(costs[name])}" for name in sorted(costs, key=lambda name: costs[name].seconds)
    )
    reason = f"least time to move rows, {PHASES[1]}, by the figures of {plan.hardware.name}: {words}"
    reason = "; ".join([reason, *filter(None, [*sources, _of_nodes(plan, costs[chosen])])])
    return dataclasses.replace(plan, transport=chosen, transport_reason=reason)


def _of_nodes(plan: Plan, taken: Cost) -> str:
    """What "hierarchy" would take if the mesh said which ranks share a node; "" where it would not be faster."""
    node, inside = plan.hardware.devices_per_node, plan.ep_size * plan.tp_size
    if plan.ep_axis[:-1] or "node" in dict(plan.mesh_axes):
        return ""
    if node is None or inside <= node or inside % node or node % plan.tp_size:
        return ""
    ep, nodes = plan.ep_axis[-1], inside // node
    sizes = dict(plan.mesh_axes) | {"node": nodes, ep: plan.ep_size // nodes}

    def spread(names):
        return tuple(each for name in names for each in (("node", ep) if name == ep else (name,)))

    plan = dataclasses.replace(
        plan,
        mesh_axes=tuple((name, sizes[name]) for name in spread(name for name, _ in plan.mesh_axes)),
        ep_axis=("node", ep),
        token_axes=spread(plan.token_axes),
        num_nodes=nodes,
        transport="hierarchy",
    )
    cost = rows_cost(plan)
    if cost.seconds >= taken.seconds:
        return ""
    return f'on a mesh with an axis "node" of {nodes}, hierarchy would take {cost_words(cost)}'


def _machine_of_mesh(mesh: Mesh | AbstractMesh) -> tuple[Machine, str]:
    """What the mesh's devices are, or JAX's own where it has none, and what JAX calls their kind."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return machine_of(device.platform, device.device_kind), device.device_kind


def _for_kind(machine: Machine, kind: str) -> str:
    """Why "auto" took its back ends. JAX may have several words for one kind, so a listed one goes by its own name."""
    is_listed = any(map(kind.startswith, machine.kinds))
    return f"; for {machine.name}" if is_listed else f"; for {machine.platform} devices of kind {kind!r}"


def _back_ends(machine: Machine, kind: str) -> str:
    """The back ends that "auto" stands for; those for any platform where none can be registered for the machine's."""
    return resolve_all(machine.platform, kind) if machine.platform in PLATFORMS else "xla"


def _pair_capacity(balanced: float, most: int, capacity_factor: float | None) -> int:
    """Rows that one rank may send another in one round; at least 1 and at most ``most``, the worst skew."""
    if capacity_factor is None:
        capacity = math.ceil(max(1.25 * balanced, balanced + 4 * math.sqrt(balanced)))
    else:
        capacity = math.ceil(min(float(min(capacity_factor, 1e9)) * balanced, most))
    return max(1, min(capacity, most))
