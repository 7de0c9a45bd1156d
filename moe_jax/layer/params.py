"""The layer's parameters on a mesh: their shapes, first values and layouts, and what is wrong with those given.

All of it is read from the table in ``moe_jax.parameters``.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax import collectives
from moe_jax.activations import Choice, activation_of, check_activation
from moe_jax.config import RouterConfig, router_violations
from moe_jax.errors import (
    InvalidArgumentError,
    MeshError,
    MissingArgumentError,
    MoEError,
    ShapeError,
    UnsupportedError,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_shape,
    check_type,
    raise_all,
    suggest,
)
from moe_jax.kernels import FLOAT_DTYPES
from moe_jax.mesh import mesh_violations
from moe_jax.parameters import BY_NAME, TABLE, Parameter, rows_of
from moe_jax.plan import Plan
from moe_jax.plan.checks import check_shared, width_of_shared

Array = jax.Array


def param_specs(
    plan: Plan,
    router: RouterConfig | None,
    *,
    activation: Choice = "swiglu",
    use_bias: bool = False,
    shared_activation: Choice | None = None,
    gated_shared: bool = False,
    expert_scale: bool = False,
) -> dict[str, PartitionSpec]:
    """How the parameters of ``moe_on_mesh`` lie on the mesh of ``plan``, by name.

    Expert weights are split over the expert-parallel axes and, along F, over tp; along H over ``plan.param_axes``, if
    there are any. All others are replicated. The arguments are those of ``moe_on_mesh``.

    Raises:
      InvalidArgumentError, MissingArgumentError, UnsupportedError: as ``moe_on_mesh``.

    >>> from jax.sharding import PartitionSpec as P
    >>> import moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> plan = moe.make_plan(moe.make_mesh(ep=2), tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> moe.param_specs(plan, moe.RouterConfig())["w_down"] == P("ep", "tp", None)
    True
    """
    check_layer_plan(plan)
    check_shared(plan, None, shared_activation, gated_shared)
    flags = {"use_bias": use_bias, "gated_shared": gated_shared, "expert_scale": expert_scale}
    return {row.name: param_spec(row.name, plan) for row in _asked(plan, router, activation, shared_activation, flags)}


def abstract_params(
    mesh: Mesh | AbstractMesh,
    plan: Plan,
    router: RouterConfig | None,
    *,
    ffn: int = 1024,
    activation: Choice = "swiglu",
    use_bias: bool = False,
    num_logical_experts: int | None = None,
    param_dtype: str = "float32",
    router_hidden: int | None = None,
    shared_ffn: int | None = None,
    shared_activation: Choice | None = None,
    gated_shared: bool = False,
    expert_scale: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of ``moe_on_mesh`` without their values: shapes, dtypes and shardings, by name.

    They are what ``init`` of ``moe_on_mesh`` would return, as ``jax.ShapeDtypeStruct``: to restore a checkpoint into,
    or to lower and compile a program for devices that are not here. The arguments are those of ``moe_on_mesh``.

    Raises:
      InvalidArgumentError, MissingArgumentError, MeshError, UnsupportedError: as ``moe_on_mesh``.

    >>> import moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=32)["w_down"].shape
    (4, 32, 8)
    """
    check_layer_plan(plan)
    check_shared(plan, shared_ffn, shared_activation, gated_shared)
    flags = {"use_bias": use_bias, "gated_shared": gated_shared, "expert_scale": expert_scale}
    rows = _asked(plan, router, activation, shared_activation, flags)
    check_mesh_of(mesh, plan)
    check_count("ffn", ffn)
    check_width(f"ffn={ffn}", ffn, plan)
    check_choice("param_dtype", param_dtype, FLOAT_DTYPES)
    if num_logical_experts is not None:
        check_count("num_logical_experts", num_logical_experts)
    if router is not None:
        check_router(router, plan, num_logical_experts)
    if router_hidden is not None:
        check_count("router_hidden", router_hidden)
        if router is None:
            raise InvalidArgumentError(f"router_hidden={router_hidden} was given and router is None; leave one out")
    extents = extents_of(plan, num_logical_experts=num_logical_experts, router_hidden=router_hidden)
    extents |= {"ffn": int(ffn), "shared_ffn": width_of_shared(plan, int(ffn), shared_ffn)}
    abstract = {}
    for row in rows:
        shape, sharding = tuple(extents[dim] for dim in row.dims), NamedSharding(mesh, param_spec(row.name, plan))
        abstract[row.name] = jax.ShapeDtypeStruct(shape, jnp.dtype(param_dtype), sharding=sharding)
    return abstract


def _asked(
    plan: Plan,
    router: RouterConfig | None,
    activation: Choice,
    shared_activation: Choice | None,
    flags: Mapping[str, bool],
) -> list[Parameter]:
    """The parameters that ``init`` makes: all that the layer needs, and the optional ones whose option is set.

    ``flags``: the options of optional parameters. It checks the arguments but for the plan and the shared expert's.
    """
    if router is not None:
        check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...), or None")
    check_activation(activation)
    for name, flag in flags.items():
        check_flag(name, flag)
    if flags["expert_scale"] and router is None:
        raise InvalidArgumentError("expert_scale=True was given and router is None, which has no weights to scale")
    rows = _known_rows(plan, router, activation, shared_activation)
    return [row for row in rows if not row.option or flags[row.option]]


def draw(key: Array, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """First values: normal weights of variance 1 / fan-in, drawn in fp32, and one number where nothing is summed over.

    Each parameter draws from a key of its own, made from its name, so that none depends on which others there are.
    """
    params = {}
    for name, of in abstract.items():
        row = BY_NAME[name]
        values = jnp.full(of.shape, row.first, jnp.float32)
        if row.fan_in:
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            values = jax.random.normal(own_key, of.shape, jnp.float32) / math.sqrt(of.shape[row.dims.index(row.fan_in)])
        params[name] = values.astype(of.dtype)
    return params


def place(params: Mapping[str, Any], mesh: Mesh, plan: Plan) -> dict[str, Array]:
    """Parameters that come from elsewhere, such as a checkpoint, laid out over the mesh as ``moe_on_mesh`` wants them.

    An array of JAX's own moves from device to device. Of any other array only the parts are read whose devices belong
    to this process, so a memory-mapped file is read in parts, and each process may hold the experts of its own devices
    alone.

    Args:
      params: whole arrays by name, in any float dtype, which they keep (float64 needs JAX's 64-bit types, else it
        becomes float32); see ``moe_on_mesh`` for names and shapes. There may be fewer than a layer needs.
      mesh: the mesh that the plan was made from.
      plan: static.

    Raises:
      InvalidArgumentError: lists every name that no layer knows, and every array that cannot be that of ``plan``.
      MeshError: the mesh is not the plan's, or has no devices.

    >>> import numpy as np, moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> moe.place({"w_down": np.ones((4, 32, 8), np.float32)}, mesh, plan)["w_down"].sharding.spec[0]
    'ep'
    """
    check_layer_plan(plan)
    check_mesh_of(mesh, plan)
    if not isinstance(mesh, Mesh):
        raise MeshError("mesh is an AbstractMesh, which has no devices to place arrays on; pass the jax.sharding.Mesh")
    check_type("params", params, Mapping, "pass a dict of arrays by name")
    rows = {name: BY_NAME[name] for name in params if name in BY_NAME}
    found = [f"{name!r} is unknown; {suggest(name, BY_NAME)}" for name in params if name not in BY_NAME]
    extents: dict[str, Any] = extents_of(plan)
    extents |= {dim: _width(params, dim) for dim in ("ffn", "shared_ffn", "ids", "router_hidden")}
    found += _misshapen(params, rows, extents, "over the mesh")
    raise_all(found, "params")
    if isinstance(extents["ffn"], int):
        check_width(f"params: an expert is {extents['ffn']} wide, which", extents["ffn"], plan)

    def placed(name: str, array: Any) -> Array:
        sharding = NamedSharding(mesh, param_spec(name, plan))
        if isinstance(array, Array):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))

    return {name: placed(name, array) for name, array in params.items()}


def param_spec(name: str, plan: Plan) -> PartitionSpec:
    """How the parameter ``name`` of the layer lies on the mesh of ``plan``."""
    axes = {"experts": plan.ep_axis, "ffn": plan.tp_axis, "expert_hidden": plan.param_axes}
    split = [axes.get(dim) or None for dim in BY_NAME[name].dims]
    return PartitionSpec(*split) if any(split) else PartitionSpec()


def gathered(experts: dict[str, Array], plan: Plan) -> dict[str, Array]:
    """The experts' weights by role, whole along H: gathered over ``plan.param_axes``, where they are split.

    The adjoint sums the gradients of all replicas, and leaves every device its part.
    """
    split = {row.role: row.dims.index("expert_hidden") for row in rows_of("experts") if "expert_hidden" in row.dims}
    with jax.named_scope("gather_params"):
        return {
            role: collectives.gather_params(weights, split[role], plan) if role in split else weights
            for role, weights in experts.items()
        }


def extents_of(
    plan: Plan,
    *,
    num_logical_experts: int | None = None,
    on_device: bool = False,
    router_hidden: int | None = None,
) -> dict[str, int]:
    """The extent of every axis in the table, but for the widths of experts, which a plan does not know.

    Args:
      num_logical_experts: the experts that the router scores beside the weightless ones; None: it scores instances.
      on_device: whether the experts are those of one device, with the part of H that it holds, and not all of them.
      router_hidden: the width of what the router sees; None: it sees the tokens.
    """
    return {
        "ids": plan.num_ids + (0 if num_logical_experts is None else num_logical_experts - plan.num_experts),
        "hidden": plan.hidden,
        "router_hidden": plan.hidden if router_hidden is None else router_hidden,
        "expert_hidden": plan.hidden // (plan.num_param_shards if on_device else 1),
        "experts": plan.num_local_experts if on_device else plan.num_experts,
        "constants": plan.num_const_experts,
        "one": 1,
    }


def check_layer_plan(plan: Plan) -> None:
    """Raises unless ``plan`` is one that the layer can serve."""
    check_type("plan", plan, Plan, "build one with moe_jax.make_plan(...)")
    if plan.dispatch_recipe is not None and plan.dispatch_recipe.needs_smooth:
        raise UnsupportedError(f"plan.quant={plan.quant!r} needs scales, which the layer has not; use quant='int8'")
    if plan.num_shared_ranks:
        raise UnsupportedError(
            f"plan.num_shared_ranks={plan.num_shared_ranks}: the layer computes shared experts beside the exchange; "
            "make the plan with num_shared_ranks=0, or call dispatch and combine yourself"
        )


def check_mesh_of(mesh: Mesh | AbstractMesh, plan: Plan) -> None:
    """Raises unless ``plan`` was made from a mesh such as ``mesh``."""
    for text in mesh_violations(mesh):
        raise MeshError(text)
    if dict(mesh.shape) != dict(plan.mesh_axes):
        raise MeshError(
            f"mesh has axes {dict(mesh.shape)} and the plan was made for ep={plan.ep_size}, tp={plan.tp_size} on one "
            f"with {dict(plan.mesh_axes)}; make the plan from this mesh"
        )


def check_width(what: str, ffn: int, plan: Plan) -> None:
    """Raises unless experts of width ``ffn`` can be split over tp."""
    if ffn % plan.tp_size:
        raise InvalidArgumentError(f"{what} must be divisible by tp={plan.tp_size}")


def check_router(router: RouterConfig, plan: Plan, num_logical_experts: int | None) -> None:
    """Raises one error that lists every way in which ``router`` cannot choose among the ids of ``plan``."""
    scored = extents_of(plan, num_logical_experts=num_logical_experts)["ids"]
    experts = f"the {scored} experts that the router scores"
    raise_all(router_violations(router, scored, experts, plan.top_k, "plan.top_k"), "router and plan")


def check_params(
    params: Any,
    plan: Plan,
    router: RouterConfig | None,
    activation: Choice,
    shared_activation: Choice | None,
    *,
    on_device: bool,
    table: Array | None = None,
    routed: bool = False,
    router_x: Array | None = None,
    needed: Collection[str] = (),
) -> None:
    """Raises one error that lists all that is wrong with ``params``, those of one device or of the whole mesh.

    ``routed``: whether choices are made outside, so that the router's parameters may be there, or not.
    ``router_x``: what the router sees instead of the tokens, [..., H_r].
    ``needed``: optional parameters that must be there.
    """
    check_type("params", params, dict, "pass a dict of arrays by name")
    num_logical_experts = None if table is None else table.shape[0]
    router_shape = () if routed else getattr(params.get("router"), "shape", ())
    if len(router_shape) == 2:
        scored = router_shape[1] - (plan.num_ids - plan.num_experts)
        if table is None and 0 < scored < plan.num_experts:
            raise MissingArgumentError(
                f"table is missing: the router of params scores {scored} experts, and the plan has num_experts="
                f"{plan.num_experts}, which must be instances of those; pass table=placement.table(), of a placement "
                f"such as moe_jax.rebalance makes, or make a plan with num_experts={scored}"
            )
        if table is not None and scored != num_logical_experts:
            raise ShapeError(
                f"table has shape {table.shape}, and the router of params scores {scored} experts; expected a row for "
                "each of them, as placement.table() has"
            )
    where = "on each device" if on_device else "over the mesh"
    extents: dict[str, Any] = extents_of(
        plan,
        num_logical_experts=num_logical_experts,
        on_device=on_device,
        router_hidden=None if router_x is None else router_x.shape[-1],
    )
    extents |= {dim: _width(params, dim) for dim in ("ffn", "shared_ffn")}
    if routed:  # nobody reads the router
        extents["router_hidden"] = _width(params, "router_hidden")
    rows = {row.name: row for row in _known_rows(plan, router, activation, shared_activation)}
    if routed:
        rows |= {row.name: row for row in rows_of("router")}
    found = [f"{name!r} is unknown here; {suggest(name, rows)}" for name in params if name not in rows]
    found += _misshapen(params, rows, extents, where)
    for name, row in rows.items():
        is_needed = not row.option or name in needed
        if name not in params and is_needed and not (routed and row.part == "router"):
            shape = tuple(extents[dim] for dim in row.dims)
            found.append(f"{name!r} is missing; its shape {where} is {shape}")
    raise_all(found, "params")


def _misshapen(
    params: Mapping[str, Any], rows: Mapping[str, Parameter], extents: Mapping[str, Any], where: str
) -> list[str]:
    """What is wrong with the shapes and dtypes of those ``params`` that are in ``rows``."""
    found = []
    for name in rows:
        if name in params:
            try:
                check_shape(
                    repr(name), params[name], tuple(extents[dim] for dim in rows[name].dims), f"its extents {where}"
                )
                check_dtype(repr(name), params[name], (jnp.floating,))
            except MoEError as error:
                found.append(str(error))
    return found


def _known_rows(
    plan: Plan, router: RouterConfig | None, activation: Choice, shared_activation: Choice | None
) -> list[Parameter]:
    """The parameters that a layer with this plan, router (None: the choices are made outside) and activations knows."""
    facts = {
        "gated": activation_of(activation).gated,
        "shared_gated": activation_of(activation if shared_activation is None else shared_activation).gated,
        "selection_bias": router is not None and router.selection_bias,
        "shared": plan.num_shared_experts > 0,
        "constants": plan.num_const_experts > 0,
    }
    hold = {fact for fact, holds in facts.items() if holds}
    return [row for row in TABLE if row.needs <= hold and (router is not None or row.part != "router")]


def _width(params: Mapping[str, Any], dim: str) -> int | str:
    """The extent of ``dim`` in the first well-formed array that has it; the letter F, to be printed, if none has.

    Matrices come first, so that of a matrix and a bias that do not fit, it is the bias that is wrong.
    """
    for row in sorted(TABLE, key=lambda row: not row.fan_in):
        shape = getattr(params.get(row.name), "shape", ())
        if dim in row.dims and (len(shape) > 1 if row.fan_in else len(shape) == len(row.dims)):
            return shape[row.dims.index(dim) - len(row.dims)]
    return "F"
