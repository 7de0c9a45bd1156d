"""What tests of single back ends share with the conformance kit: its data, its program, and one check; workloads.

The laws themselves stand in ``moe_jax.verify.backend``, on what ``moe_jax.verify.products`` has.
"""

import jax.numpy as jnp

from moe_jax.verify.products import EXTENTS, GROUPINGS, differences, exact, operands, program

__all__ = ["GROUPINGS", "WORKLOADS", "G", "H", "M", "N", "check", "lowered_text", "operands", "program"]

M, H, N = EXTENTS
G = len(GROUPINGS["full"])


def check(backend, lhs, rhs, group_sizes, ct, transpose_rhs):
    case = (lhs, rhs, group_sizes, ct)
    results = program(backend, transpose_rhs)(*case)
    assert [(a.shape, a.dtype) for a in results] == [(a.shape, lhs.dtype) for a in (ct, lhs, rhs)]
    found = differences(results, exact(case, transpose_rhs), case)
    assert set(found.values()) == {0.0}, f"{group_sizes.tolist()}: {found}"


def lowered_text(backend, platform, dtype=jnp.float32):
    case = operands(0, GROUPINGS["full"], dtype)
    return program(backend).trace(*case).lower(lowering_platforms=(platform,)).as_text()


# (rows M, hidden H, ffn F, groups G) on one device
WORKLOADS = {
    "A": (4096, 1024, 1024, 4),
    "B": (16384, 2048, 768, 16),
    "C": (8192, 7168, 2048, 8),
    "64 experts": (16384, 2048, 768, 64),
}
