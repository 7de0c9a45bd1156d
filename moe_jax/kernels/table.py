"""The back-end table: the one place where an implementation is chosen, and the only mutable state of the package."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from moe_jax.errors import (
    InvalidArgumentError,
    UnsupportedError,
    check_choice,
    check_count,
    check_flag,
    check_type,
    suggest,
)

KERNELS = ("grouped_matmul", "grouped_outer")
TRANSPORTS = ("padded", "ragged")
PLATFORMS = ("cpu", "gpu", "tpu")

_TABLE: dict[str, "Backend"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """Implementations for one kind of hardware.

    A kernel that a back end leaves out is refused when that back end is named, and served by another under "auto".
    A transport that it leaves out is served by the portable collectives of ``moe_jax.comm``.

    Args:
      name: how users and plans call it; not "auto".
      platforms: the platforms for which "auto" may choose it, out of "cpu", "gpu", "tpu".
      kernels: by name:
        "grouped_matmul": (lhs [M, H], rhs [G, H, N] or [G, N, H], group_sizes [G], *, transpose_rhs) -> [M, N] in
        lhs.dtype, accumulated in fp32; rows past sum(group_sizes) may be NaN and must not influence other rows;
        "grouped_outer": (lhs [M, H], rhs [M, N], group_sizes [G], *, dtype) -> [G, H, N], the sum over each group's
        rows of lhs_row^T rhs_row; an empty group gives zeros; rows past the sum may be NaN.
      transports: by name:
        "padded": (rows [W, C, H], axis_name) -> [W, C, H], row block j to rank j;
        "ragged": the calling convention of jax.lax.ragged_all_to_all.
      piecewise_ranks: up to how many ranks the operand of an all-to-all is better made in a piece for each rank, since
        the compiler would cut it and copy them; 0: at once always. The program grows with the pieces.

    Raises:
      InvalidArgumentError: an unknown kernel, transport or platform, something that cannot be called, or a name
        that is "auto" or no word.
    """

    name: str
    platforms: tuple[str, ...] = ()
    kernels: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    transports: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    piecewise_ranks: int = 0

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name in ("", "auto"):
            raise InvalidArgumentError(f"name={self.name!r} cannot name a back end; choose another word")
        _check_words(f"platforms of back end {self.name!r}", self.platforms, PLATFORMS, tuple | list)
        for what, given, known in (("kernels", self.kernels, KERNELS), ("transports", self.transports, TRANSPORTS)):
            what = f"{what} of back end {self.name!r}"
            _check_words(what, given, known, Mapping)
            for word, function in given.items():
                if not callable(function):
                    raise InvalidArgumentError(f"{what}: {word!r} is {function!r}; pass a function")
        check_count("piecewise_ranks", self.piecewise_ranks, low=0)
        object.__setattr__(self, "platforms", tuple(self.platforms))
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))
        object.__setattr__(self, "transports", MappingProxyType(dict(self.transports)))


    def __reduce__(self):
        """Pickles as what it was built from: a mapping that cannot change does not pickle by itself."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"kernels": dict(self.kernels), "transports": dict(self.transports)}
        return functools.partial(Backend, **values), ()


def _check_words(what: str, given, known: tuple[str, ...], kind) -> None:
    """Raises unless ``given`` is a ``kind`` and holds only ``known`` words."""
    if not isinstance(given, kind):
        form = "a dict from words to functions" if kind is Mapping else "a tuple of words"
        raise InvalidArgumentError(f"{what}: {given!r} is not {form}; known: {', '.join(known)}")
    for word in given:
        if word not in known:
            raise InvalidArgumentError(f"{what}: {word!r}; {suggest(word, known)}")


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Adds ``backend`` to the table. Among those that serve a platform, "auto" takes the one registered last.

    Raises:
      InvalidArgumentError: not a Backend, or the name is taken and ``replace`` is false.
    """
    check_type("backend", backend, Backend, "build one with moe_jax.Backend(...)")
    check_flag("replace", replace)
    if backend.name in _TABLE and not replace:
        raise InvalidArgumentError(f"name={backend.name!r} is registered already; pass replace=True to take its place")
    _TABLE.pop(backend.name, None)
    _TABLE[backend.name] = backend


def backend_names() -> list[str]:
    """Names of all registered back ends, in order of registration."""
    return list(_TABLE)


def resolve_backend(kernel: str, name: str = "auto", *, platform: str | None = None) -> Backend:
    """The back end that serves ``kernel``.

    Args:
      kernel: "grouped_matmul", "grouped_outer", or a transport, "padded" or "ragged".
      name: a registered back end, or "auto": the last registered one that lists the platform and has the kernel, or
        else "xla".
      platform: "cpu", "gpu" or "tpu"; None asks JAX for its default.

    Raises:
      InvalidArgumentError: an unknown kernel, back end or platform.
      UnsupportedError: the named back end does not have that kernel. (An explicit choice is never replaced.)
    """
    check_choice("kernel", kernel, KERNELS + TRANSPORTS)
    check_choice("backend", name, ["auto", *_TABLE])
    if name != "auto":
        if kernel not in {**_TABLE[name].kernels, **_TABLE[name].transports}:
            raise UnsupportedError(f"backend={name!r} has no {kernel!r}; choose 'auto' or another back end")
        return _TABLE[name]
    platform = jax.default_backend() if platform is None else platform
    check_choice("platform", platform, PLATFORMS)
    for backend in reversed(_TABLE.values()):
        if platform in backend.platforms and kernel in {**backend.kernels, **backend.transports}:
            return backend
    return _TABLE["xla"]


def resolve_all(platform: str) -> str:
    """The back end of a plan under "auto": the one that serves everything, or "auto" where several share the work."""
    chosen = {resolve_backend(kernel, platform=platform).name for kernel in KERNELS}
    brought = {resolve_backend(transport, platform=platform).name for transport in TRANSPORTS} - {"xla"}
    return chosen.pop() if len(chosen | brought) == 1 else "auto"


def find_transport(transport: str, backend: str) -> Callable | None:
    """What back end ``backend`` brings along for ``transport``; None where the portable collectives serve."""
    found = resolve_backend(transport) if backend == "auto" else _TABLE[backend]
    return found.transports.get(transport)


def call_kernel(kernel: str, backend: str, *operands: jax.Array, **static):
    """Runs ``kernel`` on the named back end; "auto" is decided by the platform that the program is lowered for."""
    if backend != "auto":
        return resolve_backend(kernel, backend).kernels[kernel](*operands, **static)
    cpu, gpu, tpu = (
        functools.partial(resolve_backend(kernel, "auto", platform=p).kernels[kernel], **static) for p in PLATFORMS
    )
    other = functools.partial(_TABLE["xla"].kernels[kernel], **static)
    return jax.lax.platform_dependent(*operands, cpu=cpu, cuda=gpu, rocm=gpu, tpu=tpu, default=other)
