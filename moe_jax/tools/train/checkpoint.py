"""Checkpoints: one file with the whole training state, written atomically and verified on reading.

Layout: magic (8 bytes), header length (8 bytes, little endian), header (JSON), the leaves' bytes in header order, and
the SHA-256 of everything before it (32 bytes). Leaves are stored as they are, bfloat16 included; nothing is pickled.
"""

import hashlib
import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.errors import CheckpointError, raise_all
from moe_jax.tools.train.atomic import atomic_write

MAGIC = b"MOEJAX02"
_LENGTH = struct.Struct("<Q")
# These entries of the configuration may change between a checkpoint and the run that resumes it, because none of them
# alters the function that is trained.
_FREE_MOE = ("transport", "backend")
_FREE_TRAIN = ("eval_batches", "log_every", "save_seconds", "save_every", "sample_bytes")

# What a checkpoint belongs to: each "section.key" of the configuration with its value, and "data" with a description of
# the bytes that the run trains on.
Identity = dict[str, Any]


def identify(config: Config, data: str) -> Identity:
    """The identity of a run. The mesh is no part of the identity: a run may be resumed on another mesh."""
    values = asdict(config)
    del values["mesh"]
    for section, names in (("moe", _FREE_MOE), ("train", _FREE_TRAIN)):
        for name in names:
            del values[section][name]
    flat = {f"{section}.{name}": value for section, entries in values.items() for name, value in entries.items()}
    return {**flat, "data": data}


def save(path: Path, state: Any, *, step: int, identity: Identity) -> None:
    """Writes `state`, any pytree of arrays, after `step` finished steps; the file at `path` is replaced as a whole.

    Raises:
      CheckpointError: the file cannot be written. An older checkpoint at `path` is then untouched.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(state)}
    entries = [{"name": name, "dtype": leaf.dtype.name, "shape": leaf.shape} for name, leaf in leaves.items()]
    header = json.dumps({"step": step, "identity": identity, "leaves": entries}).encode()
    digest = hashlib.sha256()
    try:
        with atomic_write(path) as file:
            for part in (MAGIC, _LENGTH.pack(len(header)), header, *(leaf.tobytes() for leaf in leaves.values())):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        kept = "; the one that was saved before is still there" if path.exists() else ""
        raise CheckpointError(
            f"{path}: cannot be written after step {step} ({error.strerror}){kept}; "
            "make room for two checkpoints, or change --out"
        ) from None


def restore(path: Path, like: Any, *, identity: Identity) -> tuple[Any, int]:
    """Reads (state, step). `like` gives the structure, shapes, dtypes and shardings that the state must have.

    Raises:
      CheckpointError: the file is missing, damaged, or belongs to another configuration or other data.
    """
    header, body = _read(path)
    _check_identity(path, header["identity"], identity)
    expected = [(name, leaf.dtype.name, tuple(leaf.shape)) for name, leaf in _named_leaves(like)]
    stored = [(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in header["leaves"]]
    if stored != expected:
        raise CheckpointError(f"{path}: holds other parameters than this model has; change --out to start afresh")
    arrays, offset = [], 0
    for (_, dtype, shape), leaf in zip(expected, jax.tree.leaves(like), strict=True):
        array = np.frombuffer(body, dtype, int(np.prod(shape)), offset).reshape(shape)
        offset += array.nbytes
        # JAX gets a writable copy of its own. On the CPU a device array may otherwise share the bytes that were read,
        # and the training step, which takes its state as a donation, would write into them.
        arrays.append(jax.device_put(array.copy(), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(like), arrays), header["step"]


def read_step(path: Path) -> int:
    """How many finished steps the checkpoint at `path` holds."""
    return _read(path)[0]["step"]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Checks the checksum of the file at `path` and returns its header and the bytes of all leaves."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint here; start without --resume") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path}: is not a checkpoint of this version of moe_jax; change --out")
    payload, digest = content[:-32], content[-32:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: is damaged or cut short (its checksum does not match); change --out")
    start = len(MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(payload[len(MAGIC) : start])
    return json.loads(payload[start : start + length]), payload[start + length :]


def _check_identity(path: Path, stored: Identity, expected: Identity) -> None:
    """Raises one error that names every key that differs, with both values."""
    names = [*expected, *(name for name in stored if name not in expected)]
    differences = [
        f"{name} was {_show(stored, name)} and is {_show(expected, name)} now"
        for name in names
        if _show(stored, name) != _show(expected, name)
    ]
    remedy = "belongs to another run; give back the old values, or change --out to start afresh"
    raise_all(differences, f"{path}: {remedy}", CheckpointError)


def _show(identity: Identity, name: str) -> str:
    """The value of a key as TOML writes it, or "nothing" if this identity lacks the key or its value is None."""
    value = identity.get(name)
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
