"""Which axes of a mesh a plan uses, and for what."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from moe_jax.mesh import mesh_violations

Names = str | tuple[str, ...]

AUTO = "auto"


class Axes(NamedTuple):
    """The roles of the axes of a mesh. Axes that have none are left alone: nothing is exchanged or summed along them.

    Attributes:
      ep: experts are spread over them, outermost first.
      tp: experts are split along them, outermost first.
      tokens: tokens are spread over them, outermost first. All axes of ``ep`` and ``tp`` are among them.
      params: expert weights are split along them too, and gathered for use. They are among ``tokens``.
    """

    ep: tuple[str, ...]
    tp: tuple[str, ...]
    tokens: tuple[str, ...]
    params: tuple[str, ...]

    @property
    def dp(self) -> tuple[str, ...]:
        """The axes that replicate the whole group of ranks, each copy with tokens of its own."""
        return tuple(name for name in self.tokens if name not in (*self.ep, *self.tp))


_NONE = Axes((), (), (), ())


def resolve_axes(
    mesh: Mesh | AbstractMesh, ep_axis: Names, tp_axis: Names | None, token_axes: Names, param_axes: Names
) -> tuple[Axes, list[str]]:
    """The roles that the arguments of ``make_plan`` give to the axes of a mesh, and every rule that they break.

    Where a rule is broken, no axis has a role.
    """
    if violations := mesh_violations(mesh):
        return _NONE, violations
    axes, violations = _roles(dict(mesh.shape), ep_axis, tp_axis, token_axes, param_axes)
    return (_NONE if violations else axes), violations


def _roles(
    sizes: Mapping[str, int], ep_axis: Names, tp_axis: Names | None, token_axes: Names, param_axes: Names
) -> tuple[Axes, list[str]]:
    given = {"ep_axis": ep_axis, "tp_axis": tp_axis, "token_axes": token_axes, "param_axes": param_axes}
    violations = [text for name, axes in given.items() for text in _name_violations(name, axes, sizes)]
    if violations:
        return _NONE, violations
    # 1. Experts.
    ep = tuple(name for name in ("node", "ep") if name in sizes) if ep_axis == AUTO else as_names(ep_axis)
    if ep_axis == AUTO and "ep" not in sizes:
        violations.append(
            f"mesh has axes {tuple(sizes)} and lacks 'ep', over which experts are spread; name another one with "
            "ep_axis=..., or build the mesh with moe_jax.make_mesh(ep=..., tp=...)"
        )
    tp = (("tp",) if "tp" in sizes and "tp" not in ep else ()) if tp_axis == AUTO else as_names(tp_axis)
    violations += [f"axis {name!r} is in ep_axis and in tp_axis; an axis has one role" for name in ep if name in tp]
    # 2. Tokens.
    if token_axes != AUTO:
        tokens = as_names(token_axes)
        missing = [name for name in (*ep, *tp) if name not in tokens]
        if missing:
            violations.append(
                f"token_axes={token_axes!r} lacks {missing[0]!r}: every rank of the exchange holds tokens of its own; "
                "name all axes of ep_axis and tp_axis among token_axes"
            )
    elif ep_axis == AUTO and tp_axis == AUTO:
        tokens = (*(name for name in sizes if name not in (*ep, *tp)), *ep, *tp)
    else:
        tokens = (*ep, *tp)
    # 3. Weights of experts.
    params = as_names(param_axes)
    for name in params:
        if name not in tokens or name in (*ep, *tp):
            violations.append(
                f"param_axes={param_axes!r}: axis {name!r} must be one of token_axes that is neither in ep_axis nor in "
                "tp_axis; the weights of experts are split along data axes"
            )
    return Axes(ep, tp, tokens, params), violations


def extent(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """How many devices lie along ``axes``."""
    return math.prod(int(sizes[name]) for name in axes)


def as_names(axes: Names | None) -> tuple[str, ...]:
    """An argument that is one name, several names, or None, as a tuple of names."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _name_violations(argument: str, axes: Names | None, sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with the names that one argument gives."""
    if axes == AUTO and argument != "param_axes":
        return []
    if axes is None and argument == "tp_axis":
        return []
    rule = f"{argument}={axes!r} must be the name of a mesh axis, or a tuple of such names"
    if not isinstance(axes, str) and not (isinstance(axes, (tuple, list)) and all(isinstance(a, str) for a in axes)):
        return [rule]
    names = as_names(axes)
    if argument == "ep_axis" and not names:
        return [f"{rule}; an axis of size 1 will do where the experts are not spread"]
    if len(set(names)) < len(names):
        return [f"{argument}={axes!r} names an axis twice"]
    return [
        f"{argument}={axes!r}: the mesh has no axis {name!r}, only {tuple(sizes)}"
        for name in names
        if name not in sizes
    ]
