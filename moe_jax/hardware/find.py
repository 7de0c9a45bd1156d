"""Which machine is meant: by its name, by a file that describes it, or by devices that are here."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError, InvalidArgumentError, check_choice, raise_all, read_toml, suggest
from moe_jax.hardware.machine import MAY_BE_NONE, PARTS, Machine, value_violations
from moe_jax.hardware.machines import MACHINES

_FIELDS = [field.name for field in dataclasses.fields(Machine)]
# The figures that have a source of their own: fields of a machine, and fields of its parts in the form
# "inside.latency".
_FIGURES = [name for name in _FIELDS if name not in ("name", "platform", "kinds", "sources", *PARTS)]
_FIGURES += [f"{name}.{field.name}" for name, part in PARTS.items() for field in dataclasses.fields(part)]
# For each platform, the machine that stands for devices whose kind no machine names.
_OF_PLATFORM = {"cpu": "cpu", "gpu": "h100", "tpu": "v5p", "npu": "a2"}


def find_machine(name_or_path: str | os.PathLike[str]) -> Machine:
    """The machine of a name in ``MACHINES``, or the one that a TOML file describes.

    A file has a table ``[machine]`` with the fields of ``Machine``; ``inside``, ``between`` and ``torus`` are tables
    of their own. ``base = "h100"`` takes every figure that is not given from that machine, and the text "none" says
    that there is no such figure. Without ``name`` the machine is called as the file is. ``[machine.sources]`` says by
    field, such as ``between.latency``, where a figure is from; other figures are from the file itself.

    Raises:
      InvalidArgumentError: it is neither a known name nor the path of a TOML file.
      ConfigError: the file cannot be read, or its fields break rules; the text names all of these.

    >>> from moe_jax.hardware import find_machine
    >>> find_machine("h100").devices_per_node
    8
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InvalidArgumentError(f"hardware={name_or_path!r} is neither a name nor a path; {suggest('', MACHINES)}")
    if name_or_path in MACHINES:
        return MACHINES[str(name_or_path)]
    path = Path(name_or_path)
    if path.suffix == ".toml" or isinstance(name_or_path, os.PathLike):
        return _read(path)
    raise InvalidArgumentError(
        f"hardware={name_or_path!r} is no known machine; {suggest(name_or_path, MACHINES)}; "
        "or the path of a .toml file that describes one"
    )


def machine_of(platform: str, device_kind: str) -> Machine:
    """The machine whose devices JAX gives this platform and kind; without one the platform's h100, v5p, a2 or cpu.

    Raises:
      InvalidArgumentError: no machine of this platform is known.

    >>> from moe_jax.hardware import machine_of
    >>> machine_of("tpu", "TPU v5 lite").name, machine_of("gpu", "NVIDIA GeForce RTX 4090").name
    ('v5e', 'h100')
    """
    check_choice("platform", platform, _OF_PLATFORM)
    found = machine_of_kind(device_kind)
    return found if found and found.platform == platform else MACHINES[_OF_PLATFORM[platform]]


def machine_of_kind(device_kind: str) -> Machine | None:
    """The machine that names this kind of device; the longest name that fits counts."""
    fitting = [
        (kind, machine) for machine in MACHINES.values() for kind in machine.kinds if device_kind.startswith(kind)
    ]
    return max(fitting, key=lambda entry: len(entry[0]), default=(None, None))[1]


def _read(path: Path) -> Machine:
    """The machine that a TOML file describes."""
    content = read_toml(path)
    table = content.get("machine")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: section 'machine' is missing; put the figures under [machine]")
    figures = dict(table)
    base, said = figures.pop("base", None), _flat(figures.pop("sources", {}))
    figures.setdefault("name", path.stem)
    basis = MACHINES.get(base) if isinstance(base, str) else None
    # 1. Whatever is wrong in the file is said at once.
    violations = [f"unknown section {name!r}; {suggest(name, ['machine'])}" for name in content if name != "machine"]
    if base is not None and basis is None:
        violations.append(f"base={base!r} is no known machine; {suggest(base, MACHINES)}")
    violations += _source_violations(said)
    machine, found = _build(Machine, figures, basis, has_base=base is not None)
    raise_all(violations + found, str(path), ConfigError)
    assert machine is not None  # nothing is wrong
    # 2. A figure that the file gives has the source that the file names for it, or else the file itself. Any other
    #    figure has the source that the base names.
    given = set(figures)
    given |= {f"{name}.{part}" for name in PARTS if isinstance(figures.get(name), dict) for part in figures[name]}
    own = [(name, str(said.get(name, path))) for name in _FIGURES if name in given]
    kept = [(name, basis.source_of(name)) for name in _FIGURES if name not in given] if basis else []
    return dataclasses.replace(machine, sources=tuple(own + [entry for entry in kept if entry[1]]))


def _build(cls: type, table: dict[str, Any], base: Any, *, has_base: bool, prefix: str = "") -> tuple[Any, list[str]]:
    """A Machine, Link or Torus: figures of the table, or else of ``base``. Or None, and what is wrong."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "sources"}
    values: dict[str, Any] = {}
    found = []
    for name, value in table.items():
        if name not in fields:
            known = [*fields, "base", "sources"] if cls is Machine else fields
            found.append(f"unknown key {prefix + name!r}; {suggest(name, known)}")
        elif name in PARTS and isinstance(value, dict):
            part = getattr(base, name, None)
            values[name], wrong = _build(PARTS[name], value, part, has_base=part is not None, prefix=f"{name}.")
            found += wrong
        else:
            given = None if value == "none" and name in MAY_BE_NONE else tuple(value) if type(value) is list else value
            remedy = f"; write a table [machine.{name}]" if name in PARTS and given is not None else ""
            wrong = value_violations(name, given)
            found += [f"{prefix}{text}{remedy}" for text in wrong]
            values[name] = given
    if not has_base:
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        found += [f"key {prefix + name!r} is missing; add it" for name in required if name not in table]
    if found or (has_base and base is None):
        return None, found
    try:
        return (dataclasses.replace(base, **values) if has_base else cls(**values)), []
    except InvalidArgumentError as error:  # figures that do not fit each other
        return None, [str(error)]


def _flat(said: Any) -> Any:
    """Sources by figure. A file may name a figure of a part "between.latency", or have a table for the part."""
    if not isinstance(said, dict):
        return said
    flat = {name: text for name, text in said.items() if not (name in PARTS and isinstance(text, dict))}
    parts = [(part, texts) for part, texts in said.items() if part not in flat]
    return flat | {f"{part}.{name}": text for part, texts in parts for name, text in texts.items()}


def _source_violations(said: Any) -> list[str]:
    if not isinstance(said, dict):
        return [f"sources={said!r} must be a table [machine.sources] of texts by field"]
    unknown = [f"unknown key {'sources.' + name!r}; {suggest(name, _FIGURES)}" for name in said if name not in _FIGURES]
    return unknown + [f"sources.{name}={text!r} must be a text" for name, text in said.items() if type(text) is not str]
