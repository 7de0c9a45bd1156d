"""The tensors of MoE layers: read from safetensors files onto a mesh, each device its own part, and written back."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_jax.activations import activation_of
from moe_jax.errors import CheckpointError, InvalidArgumentError, UnsupportedError, check_count, check_type, raise_all
from moe_jax.host.atomic import atomic_path, remove_unfinished
from moe_jax.host.extras import require
from moe_jax.interop.hf.layouts import Layout, Stored, axes_of, tensors_of
from moe_jax.interop.hf.model import ModelLayer, load_config_json, read_config
from moe_jax.interop.hf.quantised import READ_AS, find_quantised
from moe_jax.layer.params import abstract_params
from moe_jax.parameters import BY_NAME
from moe_jax.plan import Plan

Array = jax.Array

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_QUANTISED = re.compile(r"(scale_inv|weight_scale|_scales?|_blocks|qweight|qzeros|weight_packed)$")
_QUANTISED_TYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U8", "I8", "U32", "I32")


class Tensors:
    """The tensors of a folder, by name. They are mapped into memory, so that only what is asked for is read.

    ``quantisation``: what config.json says of it. Tensors of a form that ``quantised`` knows are there as what they
    stand for, in ``files`` too.

    Raises:
      CheckpointError: there is no file; the index is damaged or names files that are not there; a file is cut off, or
        lacks tensors that the index says it has.
    """

    def __init__(self, folder: str | os.PathLike, quantisation: Mapping[str, Any]):
        self.folder = Path(folder)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # of files with floats of 8 bits
        if (self.folder / _INDEX).is_file():
            self.files = _weight_map(self.folder / _INDEX)
            missing = sorted({file for file in self.files.values() if not (self.folder / file).is_file()})
            if missing:
                raise CheckpointError(f"{self.folder / _INDEX}: names {', '.join(missing)}, not there; fetch them")
        elif (self.folder / _SINGLE).is_file():
            self.files = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        else:
            raise CheckpointError(f"{self.folder}: has neither {_SINGLE} nor {_INDEX}; give the folder of a model")

        found = find_quantised(self.files, quantisation)
        self._quantised = {name: tensor for name, (tensor, _) in found.items()}
        self._file_of = dict(self.files)
        replaced = {part for _, parts in found.values() for part in parts}
        stand_for = {name: self.files[parts[0]] for name, (_, parts) in found.items()}
        self.files = {name: file for name, file in self.files.items() if name not in replaced} | stand_for

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape of a tensor, and its dtype as safetensors names it."""
        found = self._quantised.get(name)
        return self.stored(name) if found is None else (found.shape(self), READ_AS)

    def fetch(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor."""
        found = self._quantised.get(name)
        return self.part(name, index) if found is None else found.read(self, index)

    def stored(self, name: str) -> tuple[tuple[int, ...], str]:
        """As ``describe``, of a tensor of a file."""
        tensor = self._tensor(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """As ``fetch``, of a tensor of a file; numbers of 8 bits as u8, since NumPy has none of its own for floats."""
        shape, dtype = self.stored(name)
        if not dtype.startswith("F8"):
            return np.asarray(self._tensor(name)[index])
        path = self.folder / self._file_of[name]
        if path not in self._headers:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + size, json.loads(file.read(size))
        start, header = self._headers[path]
        offset = start + header[name]["data_offsets"][0]
        return np.asarray(np.memmap(path, np.uint8, "r", offset, shape)[index])

    def _tensor(self, name: str) -> Any:
        where = self._file_of[name]
        file = self._file(where)
        if name not in file.keys():  # noqa: SIM118, which would read the tensor
            raise CheckpointError(
                f"{self.folder / where}: lacks {name!r}, which {_INDEX} says is there; fetch the file again"
            )
        return file.get_slice(name)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            library = require("safetensors", "moe_jax.interop.hf", "hf")
            try:
                opened = library.safe_open(self.folder / file, framework="numpy")
            except (library.SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.folder / file}: is damaged or cut off ({error}); fetch the file again"
                ) from None
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]


def _weight_map(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no index of tensors ({error!r}); fetch the file again") from None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path}: 'weight_map' must say the file of each tensor; fetch the file again")
    return files


def moe_layers(folder: str | os.PathLike, *, prefix: str | None = None) -> tuple[int, ...]:
    """The numbers of the layers that have experts, ascending, of a model in a folder.

    Layers behind the last one of the model do not count: they only predict further tokens.

    Args:
      folder: with config.json, and model.safetensors or model.safetensors.index.json and the files that it names.
      prefix: what stands before the number in the names of tensors, such as "model.layers"; None: what the model's
        family writes, or else the only one that is there.

    Raises:
      ConfigError, UnsupportedError: as ``read_config``.
      CheckpointError: a file is missing or damaged; there are several prefixes, or no layer has experts.
    """
    layer = read_config(folder)
    with Tensors(folder, layer.quantisation) as tensors:
        return tuple(sorted(_found(tensors, layer, prefix)[1]))


def read_params(
    folder: str | os.PathLike,
    layer: int,
    mesh: Mesh,
    plan: Plan,
    *,
    param_dtype: str | None = None,
    prefix: str | None = None,
) -> dict[str, Array]:
    """The parameters of one MoE layer, as ``moe_on_mesh`` wants them on the mesh.

    Every process reads the parts of its own devices alone: of experts, those that they hold, cut along F under tensor
    parallelism. At most one parameter of these is in host memory at a time.

    Args:
      folder: see ``moe_layers``.
      layer: its number, one of ``moe_layers``.
      mesh: the mesh that the plan was made from.
      plan: made with ``read_config(folder).plan``.
      param_dtype: "float32", "bfloat16" or "float16"; None: each as the file has it, and bf16 where that is
        quantised.
      prefix: see ``moe_layers``.

    Raises:
      ConfigError, UnsupportedError: as ``read_config``; UnsupportedError too where tensors are quantised in another way
        than "fp8" in blocks or "mxfp4", which are read as the bf16 that they stand for.
      CheckpointError: a file is missing or damaged; or lists every tensor of the block that is missing, has another
        shape, or has no place in the layer.
      InvalidArgumentError: the plan is not of this model.
      MeshError: the mesh is not the plan's.
    """
    check_count("layer", layer, low=0)
    what = read_config(folder, layer)
    check_type("plan", plan, Plan, "build one with make_plan(mesh, ..., **read_config(folder).plan)")
    _check_plan(plan, what)
    options = {name: value for name, value in what.options.items() if name != "weigh_inputs"}
    if param_dtype is not None:
        options["param_dtype"] = param_dtype
    shapes = abstract_params(mesh, plan, what.router, **options)
    with Tensors(folder, what.quantisation) as tensors:
        layout, base = _layout(tensors, what, layer, prefix)
        _check_tensors(tensors, what, layout, base)

        def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
            return tensors.fetch(_full(base, name), index)

        params = {}
        for name, of in shapes.items():
            cast = None if param_dtype is None else of.dtype
            part = _remembered(lambda index, name=name: layout[name].read(name, what.extents, index, fetch), cast)
            params[name] = jax.make_array_from_callback(of.shape, of.sharding, part)
        return params


def _remembered(read: Callable, dtype: Any) -> Callable:
    """``read``, which reads a part once, however many devices have it, and casts it to ``dtype``; None: no cast."""
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if (found := str(index)) not in parts:
            values = read(index)
            kept = np.float32 if values.dtype == np.float64 else values.dtype
            parts[found] = np.ascontiguousarray(values, kept if dtype is None else dtype)
        return parts[found]

    return part


def read_rest(folder: str | os.PathLike, layer: int, *, prefix: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a MoE block that belong to the model around our layer, by their names below the block.

    ``read_config(folder).outside`` says what the model does with them. Most models have none.

    Raises:
      ConfigError, UnsupportedError, CheckpointError: as ``read_params``.
    """
    what = read_config(folder, layer)
    with Tensors(folder, what.quantisation) as tensors:
        layout, base = _layout(tensors, what, layer, prefix)
        _check_tensors(tensors, what, layout, base)
        everything = slice(None)
        return {
            name: tensors.fetch(_full(base, name), (everything,) * len(axes.split())) for name, axes in what.family.rest
        }


def write_params(
    folder: str | os.PathLike,
    params: Mapping[int, Mapping[str, Any]],
    config: str | os.PathLike | Mapping[str, Any],
    *,
    rest: Mapping[int, Mapping[str, Any]] | None = None,
    prefix: str | None = None,
) -> None:
    """Writes MoE layers under the names, and in the layouts, of Hugging Face: the inverse of ``read_params``.

    There is one file for each layer, its index, and config.json. A file appears whole or not at all, the index last.
    Arrays that are spread over processes are gathered one layer at a time. All processes call this, and the first one
    writes.

    Args:
      folder: it is made if it is not there. Files in it that have the same names are replaced.
      params: by the number of each layer, its parameters as ``read_params`` returns them.
      config: a folder with config.json, its path or what it holds.
      rest: what ``read_rest`` returns, by layer, where the model has such tensors.
      prefix: see ``moe_layers``; None: that of the model's family.

    Raises:
      ConfigError, UnsupportedError: as ``read_config``.
      InvalidArgumentError: lists the parameters that are missing, surplus or misshapen.
    """
    check_type("params", params, Mapping, "pass a dict of parameters by the number of the layer")
    raise_all([] if params else ["is empty; pass a dict of parameters by the number of the layer"], "params")
    known = load_config_json(config)
    whats = {layer: read_config(known, layer) for layer in sorted(params)}
    for layer, what in whats.items():
        _check_written(params[layer], (rest or {}).get(layer, {}), what, layer)
    writes = jax.process_index() == 0
    target, files = Path(folder), {}
    names = [f"model-{number:05d}-of-{len(whats):05d}.safetensors" for number in range(1, len(whats) + 1)]
    if writes:
        target.mkdir(parents=True, exist_ok=True)
        remove_unfinished(*(target / name for name in (*names, "config.json", _INDEX)))
    for file, (layer, what) in zip(names, whats.items(), strict=True):
        whole = {name: _whole(array) for name, array in params[layer].items()}
        if not writes:
            continue
        family = what.family
        block = ".".join(part for part in (prefix or family.layers, str(layer), family.blocks[0]) if part) + "."
        named = itertools.chain(
            tensors_of(_first_layout(what), whole),
            ((name, np.asarray(array)) for name, array in (rest or {}).get(layer, {}).items()),
        )
        tensors = {_full(block, name): array for name, array in named}
        _write_tensors(target / file, tensors)
        files |= {name: (file, array.nbytes) for name, array in tensors.items()}
    if writes:
        size = sum(nbytes for _, nbytes in files.values())
        index = {"metadata": {"total_size": size}, "weight_map": {name: file for name, (file, _) in files.items()}}
        _write_text(target / "config.json", json.dumps(_unquantised(known), indent=2))
        _write_text(target / _INDEX, json.dumps(index, indent=2))


def _unquantised(config: Any) -> Any:
    """What config.json says of a model whose tensors are those that quantised ones stood for."""
    if not isinstance(config, Mapping):
        return config
    return {name: _unquantised(value) for name, value in config.items() if name != "quantization_config"}


def _whole(array: Any) -> np.ndarray:
    """An array with all of its values on this host."""
    if isinstance(array, Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    library = require("safetensors.numpy", "moe_jax.interop.hf", "hf")
    with atomic_path(path) as unfinished:
        # This is the only format that transformers reads.
        library.save_file(tensors, unfinished, metadata={"format": "pt"})


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as unfinished:
        unfinished.write_text(text + "\n")


# Names.


def _full(block: str, name: str) -> str:
    """The whole name of a tensor: ``name`` is below the block, or, behind "../", below the layer."""
    if not name.startswith("../"):
        return block + name
    return re.sub(r"(\d+\.)[^.\d]+\.$", r"\1", block) + name.removeprefix("../")


def _found(tensors: Tensors, what: ModelLayer, prefix: str | None) -> tuple[str, dict[int, str]]:
    """The prefix of the model's layers, and the block of every layer that has a router: 3: "model.layers.3.mlp."."""
    family = what.family
    blocks = [f"{block}." if block else "" for block in family.blocks]
    router = "|".join(re.escape(name) for name in family.router)
    pattern = re.compile(
        rf"(?P<prefix>.*?)\.?(?P<layer>\d+)\.(?P<block>{'|'.join(map(re.escape, blocks))})(?:{router})"
    )
    # 1. Whatever has the name of a router, by prefix and layer.
    found: dict[str, dict[int, str]] = {}
    for name in tensors.files:
        if match := pattern.fullmatch(name):
            layer = int(match["layer"])
            if what.num_layers is None or layer < what.num_layers:
                start = f"{match['prefix']}." if match["prefix"] else ""
                found.setdefault(match["prefix"], {})[layer] = f"{start}{layer}.{match['block']}"
    # 2. The prefix that was asked for, or else that of the family, or else the only one.
    if prefix is None and len(found) > 1 and family.layers in found:
        prefix = family.layers
    if prefix is None and len(found) == 1:
        (prefix,) = found
    if prefix in found:
        return prefix, found[prefix]
    listed = ", ".join(map(repr, sorted(found))) or "none"
    example = f"{family.layers}.0.{blocks[0]}{family.router[0]}"
    asked = "" if prefix is None else f" under prefix={prefix!r}"
    remedy = "pass one of them as prefix=" if found else "read another folder, or another config.json"
    raise CheckpointError(
        f"{tensors.folder}: a {what.model_type!r} has routers named like {example!r}, and the files have "
        f"{'no single one' if found and not asked else 'none'}{asked}; prefixes with routers: {listed}; {remedy}"
    )


def _layout(tensors: Tensors, what: ModelLayer, layer: int, prefix: str | None) -> tuple[Layout, str]:
    """Where each parameter of a layer is stored, and the block that the names are below."""
    prefix, blocks = _found(tensors, what, prefix)
    if layer not in blocks:
        listed = ", ".join(map(str, sorted(blocks)))
        raise CheckpointError(f"{tensors.folder}: layer {layer} has no experts; those that have: {listed}")
    block = blocks[layer]
    for name, lacks in what.family.refuse:
        if _full(block, name) in tensors.files:
            raise UnsupportedError(f"layer {layer} of a {what.model_type!r} needs {lacks}")

    def fit(layout: Layout) -> tuple[int, int]:
        """How many of the tensors are there in the right shape, and how many are there."""
        firsts = {_full(block, each.names({"E": 1})[0]): each.shape(what.extents) for each in layout.values()}
        there = [name for name in firsts if name in tensors.files]
        return sum(tensors.describe(name)[0] == firsts[name] for name in there), len(there)

    groups = [max(spellings, key=fit) for spellings in _groups(what)]  # the first of equally good ones
    return {name: stored for group in groups for name, stored in group.items()}, block


def _first_layout(what: ModelLayer) -> Layout:
    """Where each parameter of a layer is written."""
    return {name: stored for spellings in _groups(what) for name, stored in spellings[0].items()}


def _groups(what: ModelLayer) -> list[list[Layout]]:
    """The spellings of every group of parameters that the layer has."""
    family = what.family
    singles = {
        "router": (family.router, "I H"),
        "router_bias": (family.router_bias, "I"),
        "selection_bias": (family.selection_bias, family.bias_axes),
        "expert_scale": (family.expert_scale, "I"),
        "shared_router": (family.shared_router, "1 H"),
    }
    has_shared = "num_shared_experts" in what.plan
    groups = [
        [{parameter: Stored(name, axes)} for name in names]
        for parameter, (names, axes) in singles.items()
        if names and (has_shared or parameter != "shared_router")
    ]
    groups.append(list(family.experts))
    if has_shared:
        groups.append(list(family.shared))
    return [[_needed(layout, what) for layout in spellings] for spellings in groups]


def _needed(layout: Layout, what: ModelLayer) -> Layout:
    """``layout`` without gates where the activation needs none."""
    gated = activation_of(what.options["activation"]).gated
    return {name: stored for name, stored in layout.items() if gated or BY_NAME[name].role not in ("w_gate", "b_gate")}


# Checks.


def _check_plan(plan: Plan, what: ModelLayer) -> None:
    found = []
    for name in ("hidden", "num_experts", "top_k", "num_copy_experts", "num_zero_experts", "num_const_experts"):
        expected, given = what.plan.get(name, 0), getattr(plan, name)
        if given != expected:
            found.append(f"{name}={given}, and the model has {expected}")
    if bool(plan.num_shared_experts) != ("num_shared_experts" in what.plan):
        found.append(
            f"num_shared_experts={plan.num_shared_experts}: the model has {what.plan.get('num_shared_experts', 0)}"
        )
    raise_all(found, "plan")


def _check_tensors(tensors: Tensors, what: ModelLayer, layout: Layout, block: str) -> None:
    """Raises one error that lists every tensor of the block that is missing, misshapen or surplus."""
    # 1. The tensors that the block must have, and others that stand beside them.
    expected = {
        _full(block, name): stored.shape(what.extents)
        for stored in layout.values()
        for name in stored.names(what.extents)
    }
    expected |= {_full(block, name): Stored(name, axes).shape(what.extents) for name, axes in what.family.rest}
    roots = {_root(block, stored.name) for stored in layout.values()} | {
        _root(block, name) for name, _ in what.family.rest
    }
    ignored = re.compile(what.family.ignored or r"(?!)")
    surplus = sorted(
        name
        for name in tensors.files
        if name.startswith(tuple(roots)) and name not in expected and not ignored.fullmatch(name.removeprefix(block))
    )
    # 2. Codes of a quantised copy would explain all that follows, so they are named alone.
    present = [name for name in expected if name in tensors.files]
    quantised = [name for name in surplus if _QUANTISED.search(name)]
    quantised += [name for name in present if tensors.describe(name)[1] in _QUANTISED_TYPES]
    if quantised:
        method = what.quantisation.get("quant_method")
        by = "in a way that config.json does not name" if method is None else f"by {method!r}"
        raise UnsupportedError(
            f"{tensors.folder}: {quantised[0]!r} and {len(quantised) - 1} more are quantised {by}; 'fp8' in blocks "
            "(weight_block_size) and 'mxfp4' are read here: of others read a copy in bf16"
        )
    # 3. All that is missing, misshapen or surplus.
    problems = [f"{name!r} is missing; its shape is {shape}" for name, shape in expected.items() if name not in present]
    shapes = {name: tensors.describe(name)[0] for name in present}
    problems += [
        f"{name!r} has shape {shape}; config.json says {expected[name]}"
        for name, shape in shapes.items()
        if shape != expected[name]
    ]
    problems += [f"{name!r} is surplus: the layer of a {what.model_type!r} has no place for it" for name in surplus]
    raise_all(problems, f"{tensors.folder}", CheckpointError)


def _root(block: str, name: str) -> str:
    """The beginning of the names of what stands beside a tensor in its block."""
    if block[-2:-1].isdigit() or name.startswith("../"):  # the tensor is one of the layer itself
        return _full(block, name).split("{")[0].rsplit(".", 1)[0] + "."
    return block


def _check_written(params: Mapping[str, Any], rest: Mapping[str, Any], what: ModelLayer, layer: int) -> None:
    layout, sizes = _first_layout(what), what.extents | {"1": 1}
    expected = {name: tuple(sizes[axis] for axis in axes_of(name)) for name in layout}
    given = dict(params) | {f"rest: {name}": array for name, array in rest.items()}
    expected |= {f"rest: {name}": Stored(name, axes).shape(what.extents) for name, axes in what.family.rest}
    found = [f"{name!r} is missing; its shape is {shape}" for name, shape in expected.items() if name not in given]
    found += [f"{name!r} has no place in a {what.model_type!r}" for name in given if name not in expected]
    for name, shape in expected.items():
        if name in given and tuple(np.shape(given[name])) != shape:
            found.append(f"{name!r} has shape {tuple(np.shape(given[name]))}; expected {shape}")
    raise_all(found, f"params of layer {layer}", InvalidArgumentError)
