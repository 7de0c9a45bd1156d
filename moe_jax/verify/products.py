"""Grouped products beside the exact result: the data, one program with both gradients, and how far it is off.

Data are whole numbers whose sums fp32 holds exactly. So the oracle's float64 result, rounded once to the dtype of the
operands, is the only right answer, and every comparison is for equality.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import reference
from moe_jax.kernels import backend_names, grouped_matmul
from moe_jax.kernels.table import registrations
from moe_jax.verify.cases import deviation

EXTENTS = (37, 6, 5)  # M rows, H, N: no multiple of any tile
GROUPINGS = {  # rows of each of five groups
    "full": [10, 7, 8, 5, 7],
    "empty_first": [0, 0, 12, 5, 20],
    "empty_middle": [16, 0, 0, 16, 5],
    "empty_last": [17, 15, 5, 0, 0],
    "all_empty": [0, 0, 0, 0, 0],
    "one_giant": [0, 0, 37, 0, 0],
    "giant_last": [0, 0, 0, 0, 37],
    "ones": [1, 1, 1, 1, 1],
    "slack": [3, 16, 1, 0, 4],
    "slack_after_empty": [0, 0, 0, 33, 0],
}
PARTS = ("product", "d_lhs", "d_rhs")

Operands = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def operands(
    seed: int,
    group_sizes: Sequence[int],
    dtype: Any,
    transpose_rhs: bool = False,
    extents: tuple[int, int, int] = EXTENTS,
    *,
    numbers: tuple[int, int] = (-4, 4),
    poison: float = np.nan,
) -> Operands:
    """(lhs, rhs, group_sizes, ct) of whole numbers. Rows past the groups hold ``poison`` in ``lhs`` and ``ct``."""
    rows, hidden, columns = extents
    rng = np.random.default_rng(seed)
    low, high = numbers
    lhs, ct = (rng.integers(low, high + 1, (rows, width)).astype(dtype) for width in (hidden, columns))
    total = sum(group_sizes)
    lhs[total:] = ct[total:] = poison
    rhs = rng.integers(low, high + 1, (len(group_sizes), hidden, columns)).astype(dtype)
    return lhs, rhs.swapaxes(1, 2) if transpose_rhs else rhs, np.array(group_sizes, np.int32), ct


def program(backend: str, transpose_rhs: bool = False) -> Any:
    """``product_and_gradients``, compiled for the back end that the name ``backend`` means now."""
    return _program(backend, transpose_rhs, _meaning(backend))


@functools.lru_cache(maxsize=64)
def _program(backend, transpose_rhs, meaning):
    del meaning  # part of the key of the cache: a name may be registered again
    return jax.jit(product_and_gradients(backend, transpose_rhs))


def _meaning(backend: str) -> tuple[str, ...]:
    """What the name means now; "auto" depends on the whole table."""
    names = backend_names() if backend == "auto" else [backend]
    return tuple(registration for name in names for registration in registrations(name))


def product_and_gradients(backend: str, transpose_rhs: bool = False) -> Callable:
    """(lhs, rhs, group_sizes, ct) -> (product, d_lhs, d_rhs)."""

    def run(lhs, rhs, group_sizes, ct):
        def product(lhs, rhs):
            return grouped_matmul(lhs, rhs, group_sizes, backend=backend, transpose_rhs=transpose_rhs)

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(ct)

    return run


def exact(case: Operands, transpose_rhs: bool = False) -> tuple[np.ndarray, ...]:
    """(product, d_lhs, d_rhs) in float64."""
    lhs, rhs, group_sizes, ct = case
    product = reference.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    return product, *reference.grouped_matmul_vjp(ct, lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)


def differences(results: Sequence[Any], expected: Sequence[np.ndarray], case: Operands) -> dict[str, float]:
    """How far each of (product, d_lhs, d_rhs) is from the exact result rounded to the dtype of the operands.

    Rows past the groups may be anything in the product and in ``d_lhs``.
    """
    total, dtype = int(case[2].sum()), case[0].dtype
    stops = (total, total, None)
    return {
        part: deviation(np.asarray(got)[:stop], want[:stop].astype(dtype))
        for part, got, want, stop in zip(PARTS, results, expected, stops, strict=True)
    }


def compare(backend: str, case: Operands, transpose_rhs: bool = False) -> dict[str, float]:
    """``differences`` of what a back end makes of ``case``."""
    return differences(program(backend, transpose_rhs)(*case), exact(case, transpose_rhs), case)
