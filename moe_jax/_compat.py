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
from jax._src import distributed, xla_bridge  # JAX has no public way to ask what is asked here
from jax.core import ShapedArray
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

    ``to_json`` and ``from_json`` turn what is static in an instance (its auxiliary data) into plain values of JSON and
    back; without them an instance has nothing static. Where a class is defined a second time, as when a cell of a
    notebook is run again, the second one works as the first did, but cannot be exported: JAX keeps the first class that
    it was given under a name.
    """
    package = cls.__module__.partition(".")[0]
    name = f"{package}.{cls.__name__}"
    if hasattr(cls, "_fields"):
        return jax.export.register_namedtuple_serialization(cls, serialized_name=name)
    to_json, from_json = to_json or list, from_json or tuple
    try:
        return jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=name,
            serialize_auxdata=lambda aux: json.dumps(to_json(aux)).encode(),
            deserialize_auxdata=lambda text: from_json(json.loads(text, object_hook=_with_tuples)),
        )
    except ValueError:
        if package == "moe_jax":
            raise
        return cls


def exportable_static(cls: Class) -> Class:
    """A frozen dataclass of plain values as a static pytree, without leaves, that ``jax.export`` can write and read."""
    cls = jax.tree_util.register_static(cls)
    return exportable(cls, to_json=fields_of, from_json=lambda fields: cls(**fields))


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, for ``exportable``."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and static values have no lists."""
    return {name: _tuple_of(entry) for name, entry in table.items()}


def _tuple_of(entry: Any) -> Any:
    return tuple(map(_tuple_of, entry)) if isinstance(entry, list) else entry


def backends_are_initialized() -> bool:
    """True once a device query has fixed the number of CPU devices."""
    return xla_bridge.backends_are_initialized()


def process_place() -> tuple[int, int]:
    """The number of this process, and how many there are. JAX's own functions would start the devices to find out."""
    state = distributed.global_state
    return state.process_id or 0, state.num_processes or 1


def config_value(name: str) -> Any:
    """The value of a setting of JAX: an attribute that ``jax.config`` gets at run time, unknown to type checkers."""
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
    """``x`` as ``shard_map`` wants it for ``spec``: laid out by ``spec`` along the Explicit axes of ``mesh``.

    Along Explicit axes JAX moves no data by itself, so it has to be told. Along Auto axes it does, and refuses to be
    told.
    """
    explicit = explicit_axes(mesh)
    return jax.sharding.reshard(x, NamedSharding(mesh, only_axes(spec, explicit))) if explicit else x


def unsplit(x: Any, mesh: Any) -> Any:
    """``x`` replicated along Explicit axes of ``mesh``, so that JAX slices and reshapes it and asks for no layout."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())) if explicit_axes(mesh) else x


def name_unit_axes_as(y: jax.Array, x: jax.Array, mesh: Any) -> jax.Array:
    """``y`` with the layout of ``x`` in its type, if the two layouts differ only in axes of size 1 that they name.

    ``mesh`` has Explicit axes.
    """
    split = {axis for axis, size in mesh.shape.items() if size > 1}
    layouts = [only_axes(jax.typeof(array).sharding.spec, split) for array in (y, x)]
    if layouts[0] != layouts[1]:
        return y
    return jax.sharding.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec))


def explicit_axes(mesh: Any) -> set[str]:
    """The Explicit axes of a mesh: layouts along them are part of the types of arrays."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}


def manual_axes() -> tuple[str, ...]:
    """The mesh axes over which a ``shard_map`` around this call is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual)


def only_axes(spec: PartitionSpec, kept: Any) -> PartitionSpec:
    """``spec`` without the axes that are not among ``kept``."""
    entries = (() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec)
    return PartitionSpec(*(tuple(name for name in entry if name in kept) or None for entry in entries))


def mesh_of_exported(exported: Any) -> AbstractMesh | None:
    """The mesh over which the arguments of an exported program are laid out; None if none is spread over a mesh."""
    for sharding in exported._in_named_shardings:  # the public in_shardings_hlo has lost the names
        if sharding is not None and sharding.mesh.size > 1:
            mesh = sharding.mesh
            return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=mesh.axis_types)
    return None


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which ``x`` is typed as varying; empty outside ``shard_map``."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def as_varying(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over ``axes`` too. The transpose of this step is the psum that sums over replicas.

    Along an axis of size 1 there is only one replica, so there is no collective either way.
    """

    def widen(leaf):
        missing = [axis for axis in axes if axis not in varying_axes(leaf)]
        units = frozenset(axis for axis in missing if lax.axis_size(axis) == 1)
        if units:
            leaf = _retype_unit_axes_p.bind(leaf, axes=units, varying=True)
        large = tuple(axis for axis in missing if axis not in units)
        return lax.pcast(leaf, large, to="varying") if large else leaf

    return jax.tree.map(widen, tree)


def as_varying_alike(tree: Any, axes: Any) -> Any:
    """Types every leaf as varying over ``axes`` and over all axes over which any other leaf varies.

    The operands of a function with a gradient rule of its own need this, since all cotangents that the rule makes vary
    over the same axes.
    """
    return as_varying(tree, sorted({*axes, *union_of_varying_axes(tree)}))


def vary_as_operands(*but: str) -> Callable[[Callable], Callable]:
    """A decorator for functions that communicate: a result varies over an axis of size 1 only if an operand does.

    Between its collectives such a function types everything as varying over all axes of the plan. Its results get the
    types of its operands again. So the specs of a ``shard_map`` may name an axis along which nothing can differ, or
    leave it out; and a result can be the carry of a loop or a cotangent, whose types must be those of the operands.
    Over axes of more than one device results vary as they must.

    Args:
      but: names of arguments that do not count. (Results of ``combine`` vary as tokens do, wherever its rows are.)
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args, **options):
            result = function(*args, **options)  # comes first, since it tells what is wrong with its arguments
            given = signature.bind(*args, **options).arguments
            leaves = jax.tree.leaves([value for name, value in given.items() if name not in but])
            arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
            return drop_unit_axes(result, union_of_varying_axes(arrays))

        return run

    return decorate


def drop_unit_axes(tree: Any, kept: Any = ()) -> Any:
    """Types no leaf as varying over a mesh axis of size 1, unless that axis is among ``kept``.

    Nothing can differ along such an axis, so this is the identity. Unlike a collective over one device it leaves no
    trace in the compiled program.
    """

    def narrow(leaf):
        axes = frozenset(axis for axis in varying_axes(leaf) if axis not in kept and lax.axis_size(axis) == 1)
        return _retype_unit_axes_p.bind(leaf, axes=axes, varying=False) if axes else leaf

    return jax.tree.map(narrow, tree)


# JAX itself makes a varying value invariant only by a collective, and the transpose of the way back is a collective
# too. For axes of size 1 this primitive goes both ways without a collective.
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


def empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """``lax.empty``. Under ``vmap`` JAX's own gives each member a buffer, also where one would serve all members."""
    return _empty_p.bind(shape=shape, dtype=jnp.dtype(dtype))


_empty_p = Primitive("moe_empty")
_empty_p.def_impl(lax.empty)
_empty_p.def_abstract_eval(lambda *, shape, dtype: ShapedArray(shape, dtype))
mlir.register_lowering(_empty_p, mlir.lower_fun(lax.empty, multiple_results=False))


def on_one_device(aval: Any) -> Any:
    """The type that an array of this type has in a function of one device: it varies over no mesh axis."""
    mesh = aval.sharding.mesh if aval.sharding.mesh.empty else jax.sharding.get_abstract_mesh()
    return aval.update(manual_axis_type=ManualAxisType(), sharding=aval.sharding.update(mesh=mesh))


@contextlib.contextmanager
def lowering_for(platform: str | None) -> Iterator[None]:
    """A context for the lowering of a kernel that is the same for every GPU.

    A program may be lowered here for GPUs that are elsewhere. JAX 0.12 then has to be told the kind of those GPUs,
    although the kernel is the same for all kinds.
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
    """All mesh axes over which some leaf of ``tree`` varies, in a fixed order."""
    return tuple(sorted(frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))))


def bound_axis_size(axis: str) -> int | None:
    """The size of a mesh axis inside ``shard_map``; None where that axis is not bound."""
    try:
        return lax.axis_size(axis)
    except NameError:
        return None


def bound_axes(axis_name: Any, argument: str = "axis_name") -> tuple[str, ...]:
    """The mesh axes that an argument names, as a tuple; raises unless they are names of axes that are bound here."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    named = isinstance(axes, (tuple, list)) and all(isinstance(axis, str) for axis in axes)
    if not named or not axes or len(set(axes)) < len(axes):
        raise InvalidArgumentError(f"{argument}={axis_name!r} must be the name of a mesh axis, or a tuple of names")
    for axis in axes:
        if bound_axis_size(axis) is None:
            raise MeshError(f"{argument}={axis!r} is not bound here; call this inside jax.shard_map over that axis")
    return tuple(axes)


def late(turn: jax.Array, tree: Any) -> Any:
    """``tree``, made to depend on the turn of a loop, so that XLA computes nothing from it ahead of the loop.

    Loops over rounds that overflow seldom turn at all, and then such work would be wasted.
    """
    return lax.optimization_barrier((turn, tree))[1]


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """``lax.erf``. JAX 0.12 refuses its own derivative inside ``shard_map``: the coefficients do not vary as x does."""
    return lax.erf(x)


erf.defjvps(lambda dx, _, x: 2.0 / math.sqrt(math.pi) * jnp.exp(-x * x) * dx)  # d erf = 2 / sqrt(pi) exp(-x^2) dx
