"""The back-end table: the one place where an implementation is chosen, and the only mutable state of the package.

A name means the back end that was registered under it last. A plan does not keep names: it keeps registrations ("cpu#1"
is the first back end that was registered as "cpu"), none of which is ever changed or removed. So a plan means the same
program whatever is registered after it was made.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax

from moe_jax.errors import (
    InvalidArgumentError,
    UnsupportedError,
    check_choice,
    check_flag,
    check_type,
    choice_violations,
    suggest,
)
from moe_jax.kernels.entry_points import describe_offer, offered

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

KERNELS = ("grouped_matmul", "grouped_outer")
FUSED = ("slot_matmul", "slot_outer", "gated_matmul")  # what a back end may bring beside them
TRANSPORTS = ("padded", "ragged")
PLATFORMS = ("cpu", "gpu", "tpu")
OPTIONAL_LAWS = ("weights_of_others", "vmap")  # laws of ``moe_jax.testing`` that a back end may say it breaks
AND = "+"  # joins the names of back ends that share the work

_TABLE: dict[str, "Backend"] = {}  # by name: the latest back end of each name, in the order of registration
_REGISTERED: dict[str, "Backend"] = {}  # by registration: every back end that was ever registered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """Implementations for one kind of hardware.

    A kernel that a back end leaves out is refused when that back end is named, and served by another under "auto".
    A transport that it leaves out is served by the portable collectives of ``moe_jax.collectives``. The last three
    kernels below save passes over the rows. They are taken only from the back end that serves "grouped_matmul". Where
    that leaves them out, rows are copied into their order and back, and the activation is an operation of its own.

    Args:
      name: how users and plans call it; not "auto", and without a "+".
      platforms: the platforms for which "auto" may choose it, out of "cpu", "gpu", "tpu".
      device_kinds: patterns such as ``"*H100*"``, in any case, of the device kinds that JAX reports ("NVIDIA H100 80GB
        HBM3", "TPU v5 lite"), for which "auto" may choose it; () for every device of its platforms. A back end with
        patterns is chosen by plans alone, since only they know the devices.
      kernels: by name:
        "grouped_matmul": (lhs [M, H], rhs [G, H, N] or [G, N, H], group_sizes [G], *, transpose_rhs) -> [M, N] in
        lhs.dtype, accumulated in fp32; rows past sum(group_sizes) may be NaN and must not influence other rows;
        "grouped_outer": (lhs [M, H], rhs [M, N], group_sizes [G], *, dtype) -> [G, H, N], the sum over each group's
        rows of lhs_row^T rhs_row; an empty group gives zeros; rows past the sum may be NaN;
        "slot_matmul": as "grouped_matmul", with row_slot [M] i32, into and add_to as further keywords. If into is None,
        row m of lhs [A, H] is lhs[row_slot[m]]. Else row m of the result belongs to its slot row_slot[m], and the
        result and add_to are [into, N]. No slot has two rows; row_slot may hold anything past the sum, slots without a
        row may hold NaN, and slots of the result without a row may hold anything;
        "slot_outer": as "grouped_outer", with the keywords row_slot [M] i32 and slotted, "lhs" or "rhs", the operand
        whose rows lie in slots;
        "gated_matmul": (lhs, gate [G, H, N], up [G, H, N], group_sizes, *, gating, keep, gate_bias, up_bias, row_slot)
        -> a tuple (gating(a, b),), or (a, b, gating(a, b)) if keep, of the two products a and b [M, N], each with its
        bias [G, N] if that is not None, and rounded once. gating: a function of two arrays, entry by entry; row_slot:
        None, or as for "slot_matmul" with into=None.
      accumulates: whether "grouped_matmul" also takes the keyword add_to, [M, N] in lhs.dtype, which it adds to the
        product in fp32 before it rounds once. Other back ends are served by an addition of the rounded product.
      fuses: whether to use the last three kernels for experts of given extents: (num_rows, num_groups, hidden, ffn,
        itemsize) -> bool; None: always.
      about: a few words on the kernels, for ``Plan.describe()``.
      requires: a package that the kernels import, as pip calls it. Without it the back end is refused.
      unpromised: the laws of ``moe_jax.testing`` that its kernels do not keep, out of "weights_of_others" (NaN in the
        matrix of one group may reach rows of other groups) and "vmap".
      transports: by name:
        "padded": (rows [W, C, H], axis_name) -> [W, C, H], row block j to rank j;
        "ragged": the calling convention of jax.lax.ragged_all_to_all.

    Raises:
      InvalidArgumentError: a kernel, transport or platform is unknown, a kernel cannot be called, or the name is
        "auto", is not a text, or has a "+".
    """

    name: str
    platforms: tuple[str, ...] = ()
    device_kinds: tuple[str, ...] = ()
    kernels: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    accumulates: bool = False
    fuses: Callable[[int, int, int, int, int], bool] | None = None
    about: str = ""
    requires: str = ""
    unpromised: tuple[str, ...] = ()
    transports: Mapping[str, Callable] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name in ("", "auto") or AND in self.name:
            raise InvalidArgumentError(f"name={self.name!r} cannot name a back end; choose another word")
        _check_words(f"platforms of back end {self.name!r}", self.platforms, PLATFORMS, tuple | list)
        kinds = self.device_kinds
        if not isinstance(kinds, tuple | list) or not all(isinstance(kind, str) and kind for kind in kinds):
            raise InvalidArgumentError(
                f"device_kinds of back end {self.name!r}: {kinds!r} is not a tuple of patterns such as '*H100*'"
            )
        for what in ("about", "requires"):
            if not isinstance(getattr(self, what), str):
                raise InvalidArgumentError(f"{what} of back end {self.name!r}: {getattr(self, what)!r} is not a string")
        check_flag("accumulates", self.accumulates)
        _check_words(f"unpromised of back end {self.name!r}", self.unpromised, OPTIONAL_LAWS, tuple | list)
        if self.fuses is not None and not callable(self.fuses):
            raise InvalidArgumentError(f"fuses of back end {self.name!r}: {self.fuses!r}; pass a function, or None")
        kernels = KERNELS + FUSED
        for field, given, known in (("kernels", self.kernels, kernels), ("transports", self.transports, TRANSPORTS)):
            what = f"{field} of back end {self.name!r}"
            _check_words(what, given, known, Mapping)
            for word, function in given.items():
                if not callable(function):
                    raise InvalidArgumentError(f"{what}: {word!r} is {function!r}; pass a function")
        object.__setattr__(self, "platforms", tuple(self.platforms))
        object.__setattr__(self, "device_kinds", tuple(self.device_kinds))
        object.__setattr__(self, "unpromised", tuple(self.unpromised))
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))
        object.__setattr__(self, "transports", MappingProxyType(dict(self.transports)))

    def __reduce__(self):
        """Pickles the arguments that it was built from, since its read-only mappings cannot be pickled."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"kernels": dict(self.kernels), "transports": dict(self.transports)}
        return functools.partial(Backend, **values), ()

    def serves(self, platform: str, device_kind: str | None = None) -> bool:
        """Whether "auto" may choose it for devices of that platform and kind; a kind of None is not known."""
        if platform not in self.platforms:
            return False
        kind = (device_kind or "").lower()
        return not self.device_kinds or any(fnmatchcase(kind, pattern.lower()) for pattern in self.device_kinds)

    def has(self, word: str) -> bool:
        """Whether it brings that kernel or transport."""
        return word in self.kernels or word in self.transports


def _check_words(what: str, given, known: tuple[str, ...], kind) -> None:
    """Raises unless ``given`` is a ``kind`` and holds only ``known`` words."""
    if not isinstance(given, kind):
        form = "a dict from words to functions" if kind is Mapping else "a tuple of words"
        raise InvalidArgumentError(f"{what}: {given!r} is not {form}; known: {', '.join(known)}")
    for word in given:
        if word not in known:
            raise InvalidArgumentError(f"{what}: {word!r}; {suggest(word, known)}")


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Adds ``backend`` to the table. Among back ends that serve a platform, "auto" takes the one registered last.

    Plans that were made before keep the back ends that they were made with.

    Raises:
      InvalidArgumentError: not a Backend, or the name is taken and ``replace`` is false.
    """
    check_type("backend", backend, Backend, "build one with moe_jax.Backend(...)")
    check_flag("replace", replace)
    if backend.name in _TABLE and not replace:
        raise InvalidArgumentError(f"name={backend.name!r} is registered already; pass replace=True to take its place")
    _TABLE.pop(backend.name, None)
    _TABLE[backend.name] = backend
    if not any(known is backend for known in _REGISTERED.values()):
        number = 1 + sum(known.name == backend.name for known in _REGISTERED.values())
        _REGISTERED[f"{backend.name}#{number}"] = backend


def backend_names() -> list[str]:
    """Names of all registered back ends, in order of registration."""
    return list(_TABLE)


def registrations(name: str) -> tuple[str, ...]:
    """The registrations that ``name`` stands for now: one for each back end, of which "+" joins several."""
    by_identity = {id(backend): registration for registration, backend in _REGISTERED.items()}
    return tuple(by_identity[id(_TABLE[part])] for part in name.split(AND))


def backend_violations(name: Any) -> list[str]:
    """What is wrong with ``name``, which must be "auto", a known back end, or several of them joined by "+".

    Back ends are known if they are registered, or if an installed package offers them; those are loaded and registered
    here.
    """
    parts = name.split(AND) if isinstance(name, str) else [name]
    known = ["auto"] if len(parts) == 1 else []
    return [text for part in parts for text in _name_violations(part, known)]


def _name_violations(name, known: list[str]) -> list[str]:
    if isinstance(name, str) and (name in known or name in _TABLE):
        return []
    offers = offered()
    if isinstance(name, str) and name in offers:
        return _load(name, offers[name])
    return choice_violations("backend", name, [*known, *_TABLE, *(offer for offer in offers if offer not in _TABLE)])


def _load(name: str, point: "EntryPoint") -> list[str]:
    """Registers the back end that a package offers; returns why, where that fails."""
    about = f"backend={name!r} is {describe_offer(point)}"
    try:
        backend = point.load()
    except Exception as error:  # noqa: BLE001 - whatever somebody's module raises while it is imported
        return [f"{about}, which cannot be loaded: {type(error).__name__}: {error}; mend or uninstall that package"]
    if name in _TABLE:  # the module has already registered it
        return []
    if not isinstance(backend, Backend) or backend.name != name:
        is_one = isinstance(backend, Backend)
        found = f"the back end {backend.name!r}" if is_one else f"an object of type {type(backend).__name__}"
        return [f"{about}, which leads to {found}; it must lead to a moe_jax.Backend with name={name!r}"]
    register_backend(backend)
    return []


def check_backend(name: Any) -> None:
    """Raises InvalidArgumentError with the first of ``backend_violations``."""
    for text in backend_violations(name):
        raise InvalidArgumentError(text)


def resolve_backend(
    kernel: str, name: str = "auto", *, platform: str | None = None, device_kind: str | None = None
) -> Backend:
    """The back end that serves ``kernel``.

    Args:
      kernel: "grouped_matmul", "grouped_outer", or a transport, "padded" or "ragged".
      name: a registered back end; several, joined by "+": the first that has the kernel; or "auto": the last registered
        one that lists the platform, and the device kind if it lists kinds, and has the kernel, or else "xla".
      platform: "cpu", "gpu" or "tpu"; None asks JAX for its default.
      device_kind: what JAX calls the devices, as in "NVIDIA H100 80GB HBM3"; None: not known, so that back ends for
        certain kinds are not taken.

    Raises:
      InvalidArgumentError: an unknown kernel, back end or platform.
      UnsupportedError: the named back end does not have that kernel, or needs a package that is not installed. (An
        explicit choice is never replaced.)

    >>> import moe_jax as moe
    >>> moe.resolve_backend("grouped_matmul", platform="tpu").name
    'tpu'
    """
    check_choice("kernel", kernel, KERNELS + TRANSPORTS)
    check_backend(name)
    if name != "auto":
        return _first_with(kernel, name)
    platform = jax.default_backend() if platform is None else platform
    check_choice("platform", platform, PLATFORMS)
    for backend in reversed(_TABLE.values()):
        if backend.has(kernel) and backend.serves(platform, device_kind):
            return backend
    return _TABLE["xla"]


def _first_with(kernel: str, chosen: str | tuple[str, ...]) -> Backend:
    """The first of the ``chosen`` back ends that has ``kernel``. ``chosen``: a name but "auto", or registrations."""
    backends = backends_of(chosen)
    for backend in backends:
        if backend.requires and find_spec(backend.requires) is None:
            package = backend.requires
            raise UnsupportedError(
                f"backend={backend.name!r} needs {package}, which is not installed; run: pip install {package}"
            )
        if backend.has(kernel):
            return backend
    name = AND.join(backend.name for backend in backends)
    raise UnsupportedError(f"backend={name!r} has no {kernel!r}; choose 'auto' or another back end")


def backends_of(chosen: str | tuple[str, ...]) -> list[Backend]:
    if isinstance(chosen, str):
        return [_TABLE[part] for part in chosen.split(AND)]
    for registration in chosen:
        if registration not in _REGISTERED:
            raise InvalidArgumentError(
                f"the plan uses the back end {registration!r}, which is not registered in this process; register it "
                "here as where the plan was made, or make the plan here"
            )
    return [_REGISTERED[registration] for registration in chosen]


def resolve_all(platform: str, device_kind: str | None) -> str:
    """The name that a plan has in place of "auto": a back end that serves everything, or several, joined by "+".

    The one that was registered last comes first, so that the result leads to the same back end as "auto" for each
    kernel.
    """
    words = (*KERNELS, *TRANSPORTS)
    chosen = {word: resolve_backend(word, platform=platform, device_kind=device_kind).name for word in words}
    used = {name for word, name in chosen.items() if word in KERNELS or name != "xla"}
    return AND.join(name for name in reversed(_TABLE) if name in used)


def fused_kernels(
    backend: str | tuple[str, ...], num_rows: int, num_groups: int, hidden: int, ffn: int, itemsize: int
) -> tuple[str, ...]:
    """Which kernels of ``FUSED`` are to be used for experts of these extents.

    ``backend``: the registrations of a plan, or a name that is not "auto".
    """
    chosen = _first_with("grouped_matmul", backend)
    if chosen.fuses is not None and not chosen.fuses(num_rows, num_groups, hidden, ffn, itemsize):
        return ()
    return tuple(word for word in FUSED if word in chosen.kernels)


def describe_backend(name: str) -> str:
    """Which back end serves which product, in words. ``name`` is not "auto"."""
    rows, weights = resolve_backend("grouped_matmul", name), resolve_backend("grouped_outer", name)
    served = [(rows, "products of rows"), (weights, "gradients of weights")]
    if rows is weights:
        served = [(rows, "products of rows and gradients of weights")]
    text = "; ".join(f"{words} by {b.name}" + (f" ({b.about})" if b.about else "") for b, words in served)
    if all(word in rows.kernels for word in FUSED):
        text += "; rows are multiplied in their slots, and activated, without further passes over them"
        text += ", where that is taken to be faster" if rows.fuses else ""
    return text


def find_transport(transport: str, backend: str | tuple[str, ...]) -> Callable | None:
    """The exchange that ``backend`` brings for ``transport``; None where the portable collectives serve.

    ``backend``: the registrations of a plan, ``plan.kernels``; or a name, "auto" included, as it is understood now.
    """
    if backend == "auto":
        return resolve_backend(transport).transports.get(transport)
    found = (chosen.transports.get(transport) for chosen in backends_of(backend))
    return next(filter(None, found), None)


def call_kernel(
    kernel: str,
    backend: str | tuple[str, ...],
    *operands: jax.Array,
    add_to: jax.Array | None = None,
    **static: Any,
) -> Any:
    """Runs ``kernel`` on a back end.

    Args:
      kernel: its name.
      backend: the registrations of a plan, ``plan.kernels``; or a name, which means what it means now. "auto" is
        decided by the platform that the program is lowered for.
      operands, static: the arguments of that kernel, as ``Backend`` has them. Kernels of ``FUSED`` take more keywords,
        and are called only where ``fused_kernels`` names them.
      add_to: for "grouped_matmul" and "slot_matmul" alone, see ``Backend``.

    Returns:
      What the kernel returns: an array, or a tuple of arrays for "gated_matmul".
    """
    if backend == "auto":
        # Every branch is traced, and only the one of the platform is lowered.
        cpu, gpu, tpu = (_branch(kernel, resolve_backend(kernel, platform=p).name, static) for p in PLATFORMS)
        other = _branch(kernel, "xla", static)
        return jax.lax.platform_dependent(add_to, *operands, cpu=cpu, cuda=gpu, rocm=gpu, tpu=tpu, default=other)
    chosen = _first_with(kernel, backend)
    function = functools.partial(chosen.kernels[kernel], *operands, **static)
    if add_to is None:
        return function()
    return function(add_to=add_to) if chosen.accumulates or kernel in FUSED else function() + add_to


def _branch(kernel: str, name: str, static: dict[str, Any]) -> Callable[..., jax.Array]:
    """What "auto" does where the back end ``name`` serves, as a function of arrays alone."""
    return lambda add_to, *operands: call_kernel(kernel, name, *operands, add_to=add_to, **static)
