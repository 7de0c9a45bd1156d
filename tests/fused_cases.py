"""What the tests of the fused operators share: count tables, rows and codes of every format, programs over ranks."""

import jax.numpy as jnp
import numpy as np

ROWS, CAPACITY = 16, 40  # rows of the input and of the result, per rank
OUT, IN = "grouped_matmul_all_to_allv", "all_to_allv_grouped_matmul"
OPS = [OUT, IN]


def table(pattern, num_ranks, num_local, rng, rows=ROWS, capacity=CAPACITY):
    """[R, R, e] rows from each rank to each, of which no rank sends more than it has or receives more than fit."""
    shape = (num_ranks, num_ranks, num_local)
    sizes = np.zeros(shape, np.int64)
    if pattern == "even":
        sizes[:] = rows // (num_ranks * num_local)
    elif pattern == "uneven":
        sizes[:] = rng.integers(0, 6, shape)
    elif pattern == "sparse":
        sizes[:] = rng.integers(1, 9, shape) * (rng.random(shape) < 0.3)
    elif pattern == "giant":
        sizes[0, -1, -1] = rows
    elif pattern == "to_one":
        sizes[:, 0] = rng.integers(0, 5, (num_ranks, num_local))
    elif pattern == "flood":  # all that everybody has, to one expert
        sizes[:, -1, -1] = rows
    elif pattern == "from_one":
        sizes[0] = rng.integers(0, 5, shape[1:])
    return cut_to_fit(sizes, rows, capacity)


def cut_to_fit(sizes, rows, capacity):
    sent, came = np.zeros(len(sizes), int), np.zeros(len(sizes), int)
    for a, b, e in np.ndindex(sizes.shape):
        sizes[a, b, e] = min(sizes[a, b, e], rows - sent[a], capacity - came[b])
        sent[a] += sizes[a, b, e]
        came[b] += sizes[a, b, e]
    return sizes


def lists(sizes):
    """The two count lists [R, R * e] of every rank."""
    send, recv = sizes, sizes.transpose(1, 0, 2)
    return tuple(np.ascontiguousarray(c).reshape(len(sizes), -1).astype(np.int32) for c in (send, recv))


def hashable(counts):
    return tuple(tuple(row) for row in counts.tolist())


def inner(value):
    """The jaxpr that a parameter of an equation holds, or None."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


E4M3, E5M2, E2M1, E8M0 = (getattr(jnp, n) for n in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu"))
INT8 = jnp.int8
PACKED = "two e2m1 per byte"


def codes(rng, kind, shape):
    """Finite numbers of a format, as NumPy arrays; ``shape`` counts numbers."""
    if kind is INT8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    if kind is PACKED:
        return rng.integers(0, 256, (*shape[:-1], shape[-1] // 2)).astype(np.uint8)
    if kind is E2M1:
        return rng.integers(-6, 7, shape).astype(np.float32).astype(E2M1)
    return (rng.standard_normal(shape) * 4).clip(-8, 8).astype(np.float32).astype(kind)


def scales(rng, microscaled, num_ranks, shape, contracted, dtype=np.uint8):
    """For numbers [num_ranks, *shape] that are contracted along axis ``contracted`` of ``shape``."""
    if not microscaled:
        return (2.0 ** rng.integers(-9, -5, (num_ranks, 1))).astype(np.float32)
    shape = list(shape)
    shape[contracted] = -(-shape[contracted] // 64)
    return rng.integers(125, 130, (num_ranks, *shape, 2)).astype(np.uint8).view(dtype)
