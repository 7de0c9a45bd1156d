"""The layer's parameters on a mesh: their shapes, first values and layouts, and what is wrong with those given.

All of it is read from the table in ``moe_jax.parameters``.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ACTIVATIONS, RouterConfig, router_violations
from moe_jax.errors import (
    InvalidArgumentError,
    MeshError,
    MoEError,
    UnsupportedError,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_rank,
    check_shape,
    check_type,
    raise_all,
    suggest,
)
from moe_jax.layer.experts import is_gated
from moe_jax.mesh import check_mesh
from moe_jax.parameters import BY_NAME, TABLE, Parameter
from moe_jax.plan import Plan

Array = jax.Array


def param_specs(
    plan: Plan, router: RouterConfig, *, activation: str = "swiglu", use_bias: bool = False
) -> dict[str, PartitionSpec]:
    """How the parameters of ``moe_on_mesh`` lie on the mesh of ``plan``, by name.

    Expert weights are split over the expert-parallel axes and, along F, over tp; all others are replicated. The
    arguments are those of ``moe_on_mesh``.

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
    check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...)")
    check_choice("activation", activation, ACTIVATIONS)
    check_flag("use_bias", use_bias)
    return {row.name: param_spec(row.name, plan) for row in drawn_rows(plan, router, activation, use_bias)}


def abstract_params(
    mesh: Mesh | AbstractMesh,
    plan: Plan,
    router: RouterConfig,
    *,
    ffn: int = 1024,
    activation: str = "swiglu",
    use_bias: bool = False,
    num_logical_experts: int | None = None,
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
    check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...)")
    check_mesh_of(mesh, plan)
    check_choice("activation", activation, ACTIVATIONS)
    check_flag("use_bias", use_bias)
    check_count("ffn", ffn)
    check_width(f"ffn={ffn}", ffn, plan)
    if num_logical_experts is not None:
        check_count("num_logical_experts", num_logical_experts)
    check_router(router, plan, num_logical_experts)
    extents = extents_of(plan, ffn=int(ffn), num_logical_experts=num_logical_experts)
    abstract = {}
    for row in drawn_rows(plan, router, activation, use_bias):
        shape, sharding = tuple(extents[dim] for dim in row.dims), NamedSharding(mesh, param_spec(row.name, plan))
        abstract[row.name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return abstract


def drawn_rows(plan: Plan, router: RouterConfig, activation: str, use_bias: bool) -> list[Parameter]:
    """The parameters that ``init`` makes: all that the layer knows, the optional ones ``use_bias`` decides about."""
    return [row for row in _known_rows(plan, router, activation) if use_bias or not row.optional]


def draw(key: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """First values in fp32: normal weights of variance 1 / fan-in, and zeros where nothing is summed over.

    Each parameter draws from a key of its own, made from its name, so that none depends on which others there are.
    """
    params = {}
    for name, shape in shapes.items():
        row = BY_NAME[name]
        if row.fan_in:
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            fan_in = shape[row.dims.index(row.fan_in)]
            params[name] = jax.random.normal(own_key, shape, jnp.float32) / math.sqrt(fan_in)
        else:
            params[name] = jnp.zeros(shape, jnp.float32)
    return params


def param_spec(name: str, plan: Plan) -> PartitionSpec:
    """How the parameter ``name`` of the layer lies on the mesh of ``plan``."""
    axes = {"experts": plan.ep_axis, "ffn": plan.tp_axis}
    split = [axes.get(dim) for dim in BY_NAME[name].dims]
    return PartitionSpec(*split) if any(split) else PartitionSpec()


def extents_of(
    plan: Plan, *, ffn: int, num_experts: int | None = None, num_logical_experts: int | None = None
) -> dict[str, int]:
    """The extent of every axis in the table.

    Args:
      ffn: F; the shared expert is as many times as wide as the plan has shared experts.
      num_experts: how many routed experts the weights hold; None: all of the plan's.
      num_logical_experts: the experts that the router scores; None: it scores the instances themselves.
    """
    return {
        "ids": num_scored(plan, num_logical_experts),
        "hidden": plan.hidden,
        "experts": plan.num_experts if num_experts is None else num_experts,
        "ffn": ffn,
        "shared_ffn": ffn * plan.num_shared_experts,
        "constants": plan.num_const_experts,
    }


def num_scored(plan: Plan, num_logical_experts: int | None) -> int:
    """E': how many ids the router scores, those of weightless experts included; None: it scores instances."""
    return plan.num_ids + (0 if num_logical_experts is None else num_logical_experts - plan.num_experts)


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
    check_mesh(mesh)
    ep_size = math.prod(mesh.shape.get(axis, 0) for axis in plan.ep_axis)
    if (ep_size, mesh.shape.get(plan.tp_axis), set(mesh.axis_names)) != (
        plan.ep_size,
        plan.tp_size,
        set(plan.token_axes),
    ):
        raise MeshError(
            f"mesh has axes {dict(mesh.shape)} and the plan was made for ep={plan.ep_size}, tp={plan.tp_size} over "
            f"{plan.token_axes}; make the plan from this mesh"
        )


def check_width(what: str, ffn: int, plan: Plan) -> None:
    """Raises unless experts of width ``ffn`` can be split over tp."""
    if ffn % plan.tp_size:
        raise InvalidArgumentError(f"{what} must be divisible by tp={plan.tp_size}")


def check_router(router: RouterConfig, plan: Plan, num_logical_experts: int | None) -> None:
    """Raises one error that lists every way in which ``router`` cannot choose among the ids of ``plan``."""
    scored = num_scored(plan, num_logical_experts)
    experts = f"the {scored} experts that the router scores"
    raise_all(router_violations(router, scored, experts, plan.top_k, "plan.top_k"), "router and plan")


def check_params(
    params: Any,
    plan: Plan,
    router: RouterConfig,
    activation: str,
    *,
    num_experts: int,
    where: str,
    table: Array | None = None,
) -> None:
    """Raises one error that lists all that is wrong with ``params``, of which ``num_experts`` experts lie ``where``."""
    check_type("params", params, dict, "pass a dict of arrays by name")
    if table is not None:
        check_rank("table", table, 2, "[E_logical, F]")
    num_logical_experts = None if table is None else table.shape[0]
    extents: dict[str, Any] = extents_of(plan, ffn=0, num_experts=num_experts, num_logical_experts=num_logical_experts)
    extents |= {"ffn": _width(params, "ffn"), "shared_ffn": _width(params, "shared_ffn")}
    rows = {row.name: row for row in _known_rows(plan, router, activation)}
    found = [f"{name!r} is unknown here; {suggest(name, rows)}" for name in params if name not in rows]
    for name, row in rows.items():
        shape = tuple(extents[dim] for dim in row.dims)
        if name in params:
            try:
                check_shape(repr(name), params[name], shape, f"its extents {where}")
                check_dtype(repr(name), params[name], (jnp.floating,))
            except MoEError as error:
                found.append(str(error))
        elif not row.optional:
            found.append(f"{name!r} is missing; its shape {where} is {shape}")
    raise_all(found, "params")


def _known_rows(plan: Plan, router: RouterConfig, activation: str) -> tuple[Parameter, ...]:
    """The parameters that a layer with this plan, router and activation knows."""
    facts = {
        "gated": is_gated(activation),
        "selection_bias": router.selection_bias,
        "shared": plan.num_shared_experts > 0,
        "constants": plan.num_const_experts > 0,
    }
    hold = {fact for fact, holds in facts.items() if holds}
    return tuple(row for row in TABLE if row.needs <= hold)


def _width(params: Mapping[str, Any], dim: str) -> int | str:
    """The extent of ``dim`` in the first well-formed matrix that has it; the letter F, to be printed, if none has."""
    for row in TABLE:
        shape = getattr(params.get(row.name), "shape", ())
        if dim in row.dims and row.fan_in and len(shape) > 1:
            return shape[row.dims.index(dim) - len(row.dims)]
    return "F"
