"""Compiles everything that is timed for a workload."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import TRANSPORTS, RouterConfig
from moe_jax.hlo.contract import Contract, contract_of
from moe_jax.layer.experts import is_gated
from moe_jax.layer.on_mesh import moe_on_mesh
from moe_jax.plan import Plan, make_plan
from moe_jax.tools.bench.baselines import all_experts_layer, dense_limit, minimal_layer, one_hot_layer
from moe_jax.tools.bench.workloads import Data, Workload, check_steerable, make_data

LIMIT, LAYER = "dense limit", "layer"
MINIMAL, RAGGED_DOT, ONE_HOT, ALL_EXPERTS = "minimal", "ragged_dot", "one-hot capacity", "all experts"
BASELINES = (MINIMAL, RAGGED_DOT, ONE_HOT, ALL_EXPERTS)
CONTENDERS = (*BASELINES, *(name for name in TRANSPORTS if name != "auto"))  # the layer over another transport
PASSES = ("forward", "forward + backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program.

    Attributes:
      name: the layer, the dense limit, or a contender.
      phase: one of PASSES.
      compiled: the program.
      arguments: what it is called with.
      contract: what it contains.
      compile_seconds: how long it took to compile.
    """

    name: str
    phase: str
    compiled: Callable
    arguments: tuple[Any, ...]
    contract: Contract
    compile_seconds: float

    def run(self) -> Any:
        """Calls the program, waits for its results, and returns them."""
        return jax.block_until_ready(self.compiled(*self.arguments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A workload on a mesh, ready to be compiled.

    Attributes:
      workload: its sizes and routes.
      mesh: where it runs.
      plan: the plan of its layer.
      data: parameters and tokens.
      apply: the ``apply`` of its layer.
      contenders: what the layer is compared with, names in CONTENDERS.
    """

    workload: Workload
    mesh: Mesh
    plan: Plan
    data: Data
    apply: Callable
    contenders: tuple[str, ...] = BASELINES

    @property
    def limit_flops(self) -> float:
        """The flops of the dense limit's forward pass on one device; a multiplication and an addition count as two."""
        rows, products = math.prod(self.data.rows.shape[1:3]), 3 if is_gated(self.workload.activation) else 2
        return 2.0 * products * rows * self.plan.hidden * self.workload.ffn / self.plan.tp_size


def make_layer_plan(workload: Workload, mesh: Mesh | AbstractMesh, dtype: str, quant: str) -> Plan:
    """The plan of a layer with rows in ``dtype`` that travel both ways as ``quant``.

    Raises:
      InvalidArgumentError, ConfigError, MeshError: sizes and mesh do not go together.
    """
    check_steerable(workload)
    return make_plan(mesh, **_plan_arguments(workload, dtype), quant=quant, combine_quant=quant)


def make_layer(workload: Workload, mesh: Mesh, dtype: str, quant: str) -> tuple[Plan, Callable, Callable]:
    """The plan of ``make_layer_plan``, and the ``init`` and ``apply`` of its layer; it raises the same errors."""
    plan = make_layer_plan(workload, mesh, dtype, quant)
    init, apply = _layer(workload, mesh, plan)
    return plan, init, apply


def make_setting(
    workload: Workload, mesh: Mesh, dtype: str, quant: str, contenders: Sequence[str] = BASELINES
) -> Setting:
    """The layer of ``make_layer``, its data, and all ``contenders`` but itself; it raises the same errors."""
    plan, init, apply = make_layer(workload, mesh, dtype, quant)
    data = make_data(workload, plan, mesh, init)
    others = tuple(name for name in contenders if name != plan.transport)
    return Setting(workload=workload, mesh=mesh, plan=plan, data=data, apply=apply, contenders=others)


def compile_programs(setting: Setting, phase: str) -> Iterator[Program]:
    """The dense limit, the layer and all contenders, for one of PASSES."""
    data, backward = setting.data, phase == PASSES[1]
    limit = dense_limit(setting.mesh, setting.plan, setting.workload.activation)[PASSES.index(phase)]
    yield _compile(LIMIT, phase, limit, (data.params, data.rows, data.ct_rows)[: 2 + backward])
    for name in (LAYER, *setting.contenders):
        apply = _apply_of(name, setting)
        function = with_backward(apply) if backward else apply
        yield _compile(name, phase, function, (data.params, data.x, data.ct)[: 2 + backward])


def _compile(name: str, phase: str, function: Callable, arguments: tuple[Any, ...]) -> Program:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Program(
        name=name,
        phase=phase,
        compiled=compiled,
        arguments=arguments,
        contract=contract_of(compiled),
        compile_seconds=seconds,
    )


def with_backward(apply: Callable) -> Callable:
    """(params, x, ct) -> (results of ``apply``, gradients of params and x)."""

    def run(params, x, ct):
        y, pull, aux = jax.vjp(apply, params, x, has_aux=True)
        return (y, aux), pull(ct)

    return run


def _apply_of(name: str, setting: Setting) -> Callable:
    """``apply`` of the layer or of a contender."""
    mesh, plan, activation = setting.mesh, setting.plan, setting.workload.activation
    if name == LAYER:
        return setting.apply
    if name == MINIMAL:
        return minimal_layer(mesh, plan, activation)
    if name == RAGGED_DOT:
        return _worst_case_layer(setting)
    if name == ONE_HOT:
        return one_hot_layer(mesh, plan, activation)
    if name == ALL_EXPERTS:
        return all_experts_layer(mesh, plan, activation)
    return make_layer(on_transport(setting.workload, name), mesh, plan.dtype, plan.quant)[2]


def _worst_case_layer(setting: Setting) -> Callable:
    """The layer on ``lax.ragged_dot``, with unquantised rows, in one round that holds everything at any skew."""
    arguments = _plan_arguments(setting.workload, setting.plan.dtype)
    changed = {"backend": "xla", "capacity_factor": float(setting.plan.ep_size), "transport": setting.plan.transport}
    plan = make_plan(setting.mesh, **{**arguments, **changed, "overflow": "dropless"})
    return _layer(setting.workload, setting.mesh, plan)[1]


def on_transport(workload: Workload, transport: str) -> Workload:
    """``workload`` with ``transport`` to move its rows."""
    return dataclasses.replace(workload, options=(*workload.options, ("transport", transport)))


def _layer(workload: Workload, mesh: Mesh, plan: Plan) -> tuple[Callable, Callable]:
    return moe_on_mesh(mesh, plan, RouterConfig(), ffn=workload.ffn, activation=workload.activation)


def _plan_arguments(workload: Workload, dtype: str) -> dict[str, Any]:
    sizes = {
        "tokens_per_rank": workload.tokens,
        "hidden": workload.hidden,
        "num_experts": workload.num_experts,
        "top_k": workload.top_k,
    }
    return {**sizes, "dtype": dtype, **dict(workload.options)}
