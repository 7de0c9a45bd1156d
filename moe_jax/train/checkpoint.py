"""Checkpoints: one file with the whole training state, written atomically and verified on reading.

Layout: magic (8 bytes), header length (8 bytes, little endian), header (JSON), the leaves' bytes in header order, and
the SHA-256 of everything before it (32 bytes). Leaves are stored as they are, bfloat16 included; nothing is pickled.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.errors import CheckpointError
from moe_jax.train.atomic import atomic_write

MAGIC = b"MOEJAX01"
_LENGTH = struct.Struct("<Q")
# What may change between a checkpoint and the run that resumes it: none of it alters the function that is trained.
_FREE_MOE = ("transport", "backend")
_FREE_TRAIN = ("eval_batches", "log_every", "save_every", "sample_bytes")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint belongs to: a configuration (the mesh apart) and the content of a corpus."""

    config: str
    data: str


def identify(config: Config, data_digest: str) -> RunIdentity:
    """The identity of a run. The mesh is no part of it: the same parameters may continue on another mesh."""
    values = asdict(config)
    del values["mesh"]
    for section, names in (("moe", _FREE_MOE), ("train", _FREE_TRAIN)):
        for name in names:
            del values[section][name]
    text = json.dumps(values, sort_keys=True)
    return RunIdentity(config=hashlib.sha256(text.encode()).hexdigest(), data=data_digest)


def save(path: Path, state: Any, *, step: int, identity: RunIdentity) -> None:
    """Writes `state`, any pytree of arrays, after `step` finished steps; the file at `path` is replaced as a whole.

    Raises:
      CheckpointError: the file cannot be written; an older one at `path` is then untouched.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(state)}
    entries = [{"name": name, "dtype": leaf.dtype.name, "shape": leaf.shape} for name, leaf in leaves.items()]
    header = json.dumps({"step": step, "identity": asdict(identity), "leaves": entries}).encode()
    digest = hashlib.sha256()
    try:
        with atomic_write(path) as file:
            for part in (MAGIC, _LENGTH.pack(len(header)), header, *(leaf.tobytes() for leaf in leaves.values())):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); make room or change --out") from None


def restore(path: Path, like: Any, *, identity: RunIdentity) -> tuple[Any, int]:
    """Reads (state, step). `like` gives the structure, shapes, dtypes and shardings that the state must have.

    Raises:
      CheckpointError: the file is missing, damaged, or belongs to another configuration or other data.
    """
    header, body = _read(path)
    _check_identity(path, header["identity"], identity)
    expected = [(name, leaf.dtype.name, tuple(leaf.shape)) for name, leaf in _named_leaves(like)]
    stored = [(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in header["leaves"]]
    if stored != expected:
        raise CheckpointError(f"{path}: holds other parameters than this model has; start afresh without --resume")
    arrays, offset = [], 0
    for (_, dtype, shape), leaf in zip(expected, jax.tree.leaves(like), strict=True):
        array = np.frombuffer(body, dtype, int(np.prod(shape)), offset).reshape(shape)
        offset += array.nbytes
        # An owned, writable copy: on the CPU a device array may otherwise share the bytes of the file, and be donated.
        arrays.append(jax.device_put(array.copy(), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(like), arrays), header["step"]


def read_step(path: Path) -> int:
    """How many finished steps the checkpoint at `path` holds."""
    return _read(path)[0]["step"]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, leaves' bytes) of a file whose checksum holds."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint here; start without --resume") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path}: is not a moe_jax checkpoint; start without --resume, or change --out")
    payload, digest = content[:-32], content[-32:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: is damaged or cut short (its checksum does not match); start without --resume")
    start = len(MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(payload[len(MAGIC) : start])
    return json.loads(payload[start : start + length]), payload[start + length :]


def _check_identity(path: Path, stored: dict[str, str], expected: RunIdentity) -> None:
    if stored["config"] != expected.config:
        raise CheckpointError(
            f"{path}: belongs to another configuration (model, moe, router or train differ); "
            "use the configuration it was made with, or start afresh without --resume"
        )
    if stored["data"] != expected.data:
        raise CheckpointError(f"{path}: was trained on other data; pass the same --data, or start without --resume")
