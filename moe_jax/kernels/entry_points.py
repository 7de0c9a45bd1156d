"""Back ends that installed packages offer by entry points. None is loaded before somebody names it.

A package says in its pyproject.toml, for a ``moe_jax.Backend`` that is called BACKEND in its module::

    [project.entry-points."moe_jax.backends"]
    mine = "my_package.kernels:BACKEND"
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "moe_jax.backends"


def offered() -> "dict[str, EntryPoint]":
    """The back ends that installed packages offer, by name."""
    from importlib.metadata import entry_points  # slow to import, and few programs name what the table lacks

    return {point.name: point for point in entry_points(group=GROUP)}


def describe_offer(point: "EntryPoint") -> str:
    """The entry point and the package that it belongs to, in words."""
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"the entry point {point.name} = {point.value}{package} (group {GROUP})"
