"""The waits of a measurement, and the file that keeps them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from moe_jax.elastic.wait_matrix import check_waits
from moe_jax.errors import DataError, MoEError
from moe_jax.host.atomic import atomic_write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits:
    """What was measured.

    Attributes:
      ready, travel: [S, R, R], as ``moe_jax.find_stragglers`` takes them.
      where: on what, in words.
    """

    ready: np.ndarray
    travel: np.ndarray
    where: str


def write_waits(waits: Waits, path: Path) -> None:
    """Writes a JSON object; raises DataError if the file cannot be written."""
    record = {"where": waits.where, "ready": waits.ready.tolist(), "travel": waits.travel.tolist()}
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another file as --out") from None


def read_waits(path: Path) -> Waits:
    """Reads what ``write_waits`` wrote, or somebody else in the same form, without "where".

    Raises:
      DataError: the file cannot be read, or holds something else.
    """
    remedy = "pass what --out wrote, or a JSON object with ready and travel, lists [steps, ranks, ranks]"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ready, travel = check_waits("ready", record["ready"]), check_waits("travel", record["travel"])
        return Waits(ready=ready, travel=travel, where=str(record.get("where", path)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (MoEError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: holds no waits ({reason}); {remedy}") from None
