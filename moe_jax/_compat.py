"""The only module that knows which JAX it runs on (0.10 to 0.12)."""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax._src import xla_bridge  # no public way to ask whether the back ends are up
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, ManualAxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import InvalidArgumentError, MeshError

shard_map = jax.shard_map

if TYPE_CHECKING:
    Device: TypeAlias = Any  # the compiled part of jaxlib has no stubs, so jax.Device is no type to a checker
else:
    Device = jax.Device

Class = TypeVar("Class", bound=type)


def exportable(cls: Class, *, to_json: Callable | None = None, from_json: Callable | None = None) -> Class:
    """Lets ``jax.export`` write and read programs that take or return ``cls``, a pytree or a NamedTuple.

    ``to_json``, ``from_json``: of what is static in its instances, the auxiliary data; without them there is none.
    """
    name = f"moe_jax.{cls.__name__}"
    if hasattr(cls, "_fields"):
        return jax.export.register_namedtuple_serialization(cls, serialized_name=name)
    to_json, from_json = to_json or list, from_json or tuple
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=lambda aux: json.dumps(to_json(aux)).encode(),
        deserialize_auxdata=lambda text: from_json(json.loads(text, object_hook=_with_tuples)),
    )


def exportable_static(cls: Class) -> Class:
    """A frozen dataclass of plain values as a static pytree, without leaves, that ``jax.export`` can write and read."""
    cls = jax.tree_util.register_static(cls)
    return exportable(cls, to_json=fields_of, from_json=lambda fields: cls(**fields))


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, for ``exportable``."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and static values have no lists."""
    return {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in table.items()}


def backends_are_initialized() -> bool:
    """True once a device query has fixed the number of CPU devices."""
    return xla_bridge.backends_are_initialized()


def config_value(name: str) -> Any:
    """The value of a setting of JAX, which makes its settings attributes of ``jax.config`` when it starts."""
    return getattr(jax.config, name)


def jitted(fn: Callable) -> jax.stages.Wrapped:
    """``fn`` if ``jax.jit`` made it, so that its shardings and donations are kept, else ``jax.jit(fn)``."""
    if hasattr(fn, "lower") and hasattr(fn, "trace"):
        return cast("jax.stages.Wrapped", fn)
    return jax.jit(fn)


def auto_mesh(devices: Any, axis_names: Sequence[str]) -> Mesh:
    """A mesh whose axes are all Auto (jax.make_mesh builds Explicit ones by default)."""
    return Mesh(devices, tuple(axis_names), axis_types=(AxisType.Auto,) * len(axis_names))


def lay_out(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    """``x`` as ``shard_map`` wants it for ``spec``: laid out so along the Explicit axes of ``mesh``.

    JAX moves nothing by itself along Explicit axes, and is not to be told about the Auto ones, along which it does.
    """
    explicit = explicit_axes(mesh)
    return jax.sharding.reshard(x, NamedSharding(mesh, only_axes(spec, explicit))) if explicit else x


def name_unit_axes_as(y: jax.Array, x: jax.Array, mesh: Any) -> jax.Array:
    """``y`` with the layout of ``x`` in its type, if theirs differ in nothing but which axes of size 1 they name."""
    if not explicit_axes(mesh):
        return y
    split = {axis for axis, size in mesh.shape.items() if size > 1}
    layouts = [only_axes(jax.typeof(array).sharding.spec, split) for array in (y, x)]
    if layouts[0] != layouts[1]:
        return y
    return jax.sharding.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec))


def explicit_axes(mesh: Any) -> set[str]:
    """The Explicit axes of a mesh: layouts along them are part of the types of arrays."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}


def only_axes(spec: PartitionSpec, kept: Any) -> PartitionSpec:
    """``spec`` without the axes that are not among ``kept``."""
    entries = (() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec)
    return PartitionSpec(*(tuple(name for name in entry if name in kept) or None for entry in entries))


def mesh_of_exported(exported: Any) -> AbstractMesh | None:
    """The mesh that an exported program's arguments are laid out over; None if none is."""
    for sharding in exported._in_named_shardings:  # the public in_shardings_hlo has lost the names
        if sharding is not None and sharding.mesh.size > 1:
            mesh = sharding.mesh
            return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=mesh.axis_types)
    return None


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which ``x`` is typed as varying; empty outside ``shard_map``."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def as_varying(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over ``axes`` too; the transpose of this step is the psum that sums replicas.

    Along axes of size 1 there is but one replica, and no collective.
    """

    def widen(leaf):
        missing = tuple(a for a in axes if a not in varying_axes(leaf) and lax.axis_size(a) > 1)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(widen, as_varying_over_units(tree, axes))


def as_varying_over_units(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over those of ``axes`` that have size 1. Nothing of it is left in the program."""

    def widen(leaf):
        missing = frozenset(a for a in axes if a not in varying_axes(leaf) and lax.axis_size(a) == 1)
        return _retype_unit_axes_p.bind(leaf, axes=missing, varying=True) if missing else leaf

    return jax.tree.map(widen, tree)


def as_varying_alike(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over ``axes`` and wherever another leaf does.

    Operands of one function with a gradient rule of its own need this: the rule makes cotangents that vary alike.
    """
    return as_varying(tree, sorted({*axes, *union_of_varying_axes(tree)}))


def vary_as_operands(*but: str) -> Callable[[Callable], Callable]:
    """For functions that communicate: their results vary over an axis of size 1 only if an operand does.

    Between collectives everything is typed as varying over all axes of the plan. What leaves a function is as its
    operands were, so that specs may name an axis along which nothing can differ or leave it out, and a result has the
    type that the carry of a loop, or a cotangent, has. Over axes of more devices results vary as they must.

    Args:
      but: arguments that do not count: results of ``combine`` lie as tokens do, wherever experts are.
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args, **options):
            result = function(*args, **options)  # first, as it says what is wrong with its arguments
            given = signature.bind(*args, **options).arguments
            leaves = jax.tree.leaves([value for name, value in given.items() if name not in but])
            arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
            return drop_unit_axes(result, union_of_varying_axes(arrays))

        return run

    return decorate


def drop_unit_axes(tree: Any, kept: Any = ()) -> Any:
    """Types no leaf as varying over a mesh axis of size 1, along which nothing can differ, unless it is among ``kept``.

    The identity: nothing of it is left in the compiled program, where a collective over one device would stay.
    """

    def narrow(leaf):
        axes = frozenset(axis for axis in varying_axes(leaf) if axis not in kept and lax.axis_size(axis) == 1)
        return _retype_unit_axes_p.bind(leaf, axes=axes, varying=False) if axes else leaf

    return jax.tree.map(narrow, tree)


# JAX itself goes from varying to invariant by collectives alone, and its way back has one for a transpose.
_retype_unit_axes_p = Primitive("retype_unit_axes")
mlir.register_lowering(_retype_unit_axes_p, lambda context, x, axes, varying: [x])
batching.defvectorized(_retype_unit_axes_p)
ad.deflinear2(
    _retype_unit_axes_p, lambda ct, x, axes, varying: [_retype_unit_axes_p.bind(ct, axes=axes, varying=not varying)]
)


@_retype_unit_axes_p.def_abstract_eval
def _retyped(x, *, axes, varying):
    now = x.manual_axis_type.varying
    return x.update(
        sharding=x.sharding.update(mesh=jax.sharding.get_abstract_mesh()),  # a constant may know of no mesh so far
        manual_axis_type=x.manual_axis_type.update(varying=now | axes if varying else now - axes),
    )


def on_one_device(aval: Any) -> Any:
    """The type of an array of which each device has its own, as a function of one device is traced with it."""
    mesh = aval.sharding.mesh if aval.sharding.mesh.empty else jax.sharding.get_abstract_mesh()
    return aval.update(manual_axis_type=ManualAxisType(), sharding=aval.sharding.update(mesh=mesh))


@contextlib.contextmanager
def lowering_for(platform: str | None) -> Iterator[None]:
    """Around the lowering of a kernel that is the same for every GPU.

    JAX 0.12 does without a GPU only if it is told of a kind, while a program may well be lowered here for GPUs
    elsewhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if platform != "cuda" or not hasattr(mesh, "abstract_device"):
        yield
        return
    if (mesh.abstract_device or jax.devices()[0]).platform in ("gpu", "cuda"):
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        yield


def union_of_varying_axes(tree: Any) -> tuple[str, ...]:
    """Every axis over which some leaf of ``tree`` varies, in a fixed order."""
    return tuple(sorted(frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))))


def bound_axis_size(axis: str) -> int | None:
    """The size of a mesh axis inside ``shard_map``; None where that axis is not bound."""
    try:
        return lax.axis_size(axis)
    except NameError:
        return None


def group_size(axes: tuple[str, ...]) -> int:
    """How many devices exchange along mesh axes that are bound here, such as those of ``bound_axes``."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def bound_axes(axis_name: Any, argument: str = "axis_name") -> tuple[str, ...]:
    """The mesh axes that an argument names, as a tuple; raises where they cannot serve here."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    named = isinstance(axes, (tuple, list)) and all(isinstance(axis, str) for axis in axes)
    if not named or not axes or len(set(axes)) < len(axes):
        raise InvalidArgumentError(f"{argument}={axis_name!r} must be the name of a mesh axis, or a tuple of names")
    for axis in axes:
        if bound_axis_size(axis) is None:
            raise MeshError(f"{argument}={axis!r} is not bound here; call this inside jax.shard_map over that axis")
    return tuple(axes)


def late(turn: jax.Array, tree: Any) -> Any:
    """``tree`` as depending on the turn of a loop: XLA must do nothing with it ahead of a loop that seldom turns."""
    return lax.optimization_barrier((turn, tree))[1]


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """``lax.erf``. JAX 0.12 refuses its own derivative inside ``shard_map``: the coefficients do not vary as x does."""
    return lax.erf(x)


erf.defjvps(lambda dx, _, x: 2.0 / math.sqrt(math.pi) * jnp.exp(-x * x) * dx)  # d erf = 2 / sqrt(pi) exp(-x^2) dx
