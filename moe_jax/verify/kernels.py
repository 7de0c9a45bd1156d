"""The laws of what runs on one device: grouped products, and the recipes of the quantised wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import reference
from moe_jax.kernels import gated_matmul, grouped_matmuls, resolve_backend
from moe_jax.kernels.table import FUSED, registrations
from moe_jax.quant.schemes import named_recipe
from moe_jax.verify.cases import deviation
from moe_jax.verify.products import compare, operands


def grouped_matmul_deviations(
    backend: str, dtype: str = "float32", extents: tuple[int, int, int] = (20, 8, 6)
) -> list[float]:
    """The deviations of a product in 4 groups of rows, and of both gradients, from the exact result rounded once.

    Args:
      backend: its name in the table, or "auto".
      dtype: the dtype of rows and matrices, to which the exact result is rounded.
      extents: (M, H, N) for M rows of H columns, and N columns of the result. Sums of H or M products of small integers
        must be exact in fp32, which they are if H and M are below a million.

    Returns:
      The largest deviation for each way in which M rows fall into groups: some empty, all empty, one with everything,
      single rows. Rows past the groups are NaN.
    """
    found = []
    for seed, group_sizes in enumerate(_ways_of_grouping(extents[0])):
        case = operands(seed, group_sizes, jnp.dtype(dtype), extents=extents)
        found.append(float(np.max(list(compare(backend, case).values()))))
    return found


def _worst(pairs) -> float:
    """The largest deviation of pairs of (what came, what should come); NaN if there is one."""
    return float(np.max([deviation(got, np.asarray(want, got.dtype)) for got, want in pairs]))


def fused_deviations(
    backend: str,
    dtype: str = "float32",
    extents: tuple[int, int, int] = (20, 8, 6),
    *,
    words: tuple[str, ...] = FUSED,
) -> list[float] | None:
    """The deviations of products whose rows lie in slots, and of those that compute the activation as well.

    Rows are read from slots and written to slots. Slots of no row are NaN, and rows in no group have any number as
    their slot. The activation is the product of both projections, so that numbers stay whole; they are so small that
    sums fit in 16 bits.

    Args:
      backend: its name in the table; not "auto".
      dtype, extents: as for ``grouped_matmul_deviations``.
      words: the names of the kernels to check.

    Returns:
      A deviation for each way in which rows fall into groups; None if the back end brings no such kernels.
    """
    has = {word for word in words if resolve_backend("grouped_matmul", backend).has(word)}
    if not has:
        return None
    chosen = registrations(backend)  # a name may be registered again, and these are what is compiled
    rows = extents[0]
    rng, found = np.random.default_rng(2), []
    for group_sizes in _ways_of_grouping(rows):
        total, sizes = sum(group_sizes), np.array(group_sizes, np.int32)
        num_slots = rows + 3
        row_slot = rng.permutation(num_slots)[:rows].astype(np.int32)
        here = row_slot[:total].copy()
        row_slot[total:] = rng.choice([-1, 0, num_slots, 2**30], rows - total)
        case = _Case(rng, total, extents, sizes, dtype)

        def in_slots(of_rows, here=here, num_slots=num_slots):
            slots = np.full((num_slots, of_rows.shape[1]), np.nan, np.float32)
            slots[here] = of_rows[: len(here)]
            return slots

        pairs = []
        if {"slot_matmul", "slot_outer"} <= has:
            expected = case.product()
            # 1. Rows come from slots; their cotangents go there.
            got = _run_slots(chosen, None, *case.arrays(in_slots(case.lhs), case.rhs[0], case.ct), sizes, row_slot)
            pairs += zip((got[0][:total], got[1][here], *got[2:]), expected, strict=True)
            # 2. Results go to slots; their cotangents come from there.
            given = case.arrays(case.lhs, case.rhs[0], in_slots(case.ct))
            got = _run_slots(chosen, num_slots, *given, sizes, row_slot)
            pairs += zip((got[0][here], got[1][:total], *got[2:]), expected, strict=True)
        if "gated_matmul" in has:
            # 3. The activation, of rows in order with the products kept, and of rows in slots.
            for keep, of_lhs, places, slots in (
                (True, case.lhs, slice(total), None),
                (False, in_slots(case.lhs), here, row_slot),
            ):
                given = case.arrays(of_lhs, *case.rhs, *case.bias, case.ct)
                made, (d_lhs, *others) = _run_gated(chosen, keep, *given, sizes, slots)
                got = (*(out[:total] for out in made), d_lhs[places], *others)
                pairs += zip(got, case.gated(keep), strict=True)
        found.append(_worst(pairs))
    return found


def _ways_of_grouping(rows: int) -> tuple[list[int], ...]:
    return [rows // 4, 0, rows // 2 - 1, rows // 10], [0, 0, 0, 0], [0, rows, 0, 0], [1, 1, 1, rows - 3]


class _Case:
    """Small whole numbers, and the right results. Rows past the groups are NaN in ``lhs`` and ``ct``."""

    def __init__(self, rng, total: int, extents: tuple[int, int, int], sizes: np.ndarray, dtype: str):
        rows, hidden, columns = extents
        # Most numbers are zero, so that a sum of products has a handful of terms.
        density = min(1.0, (8 / max(hidden, columns)) ** 0.5)

        def whole(*shape):
            return (rng.integers(-1, 2, shape) * (rng.random(shape) < density)).astype(np.float32)

        self.total, self.sizes, self.dtype = total, sizes, dtype
        self.lhs, self.ct = whole(rows, hidden), whole(rows, columns)
        self.lhs[total:] = self.ct[total:] = np.nan
        self.rhs = tuple(whole(len(sizes), hidden, columns) for _ in range(2))
        self.bias = tuple(whole(len(sizes), columns) for _ in range(2))

    def arrays(self, *given):
        return tuple(jnp.asarray(a, self.dtype) for a in given)

    def product(self):
        """The product with the first matrices, and both gradients."""
        d_lhs, d_rhs = reference.grouped_matmul_vjp(self.ct, self.lhs, self.rhs[0], self.sizes)
        return reference.grouped_matmul(self.lhs, self.rhs[0], self.sizes)[: self.total], d_lhs[: self.total], d_rhs

    def gated(self, keep: bool):
        """Both products with their biases (only if ``keep``), then the product of both, and all gradients.

        ``ct`` is the cotangent of each of the results.
        """
        groups = np.repeat(np.arange(len(self.sizes)), self.sizes)
        a, b = (
            reference.grouped_matmul(self.lhs, rhs, self.sizes)[: self.total] + bias[groups]
            for rhs, bias in zip(self.rhs, self.bias, strict=True)
        )
        cts = (self.ct[: self.total] * (other + keep) for other in (b, a))
        d_lhs, d_rhs, d_bias = 0.0, [], []
        for ct, rhs in zip(cts, self.rhs, strict=True):
            of_lhs, of_rhs = reference.grouped_matmul_vjp(ct, self.lhs[: self.total], rhs, self.sizes)
            of_bias = np.zeros(self.bias[0].shape)
            np.add.at(of_bias, groups, ct)
            d_lhs, d_rhs, d_bias = d_lhs + of_lhs, [*d_rhs, of_rhs], [*d_bias, of_bias]
        return (*((a, b) if keep else ()), a * b, d_lhs, *d_rhs, *d_bias)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_slots(backend, into, lhs, rhs, ct, sizes, row_slot):
    def product(lhs, rhs):
        return grouped_matmuls(backend, into, lhs, (rhs,), (None,), sizes, row_slot)[0]

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(ct)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_gated(backend, keep, lhs, gate, up, gate_bias, up_bias, ct, sizes, row_slot):
    def gated(lhs, gate, up, gate_bias, up_bias):
        biases = (gate_bias, up_bias)
        return gated_matmul(backend, jnp.multiply, keep, lhs, (gate, up), biases, sizes, row_slot)

    operands = (lhs, gate, up, gate_bias, up_bias)
    made, pull = jax.vjp(gated, *operands)
    cts = (ct,) * len(made)
    return (made if keep else gated(*operands)), pull(cts)  # without a derivative, another kernel runs


def recipe_deviations(name: str) -> list[float]:
    """How many of a recipe's codes, scales and dequantised rows differ from the oracle in a bit, for every dtype."""
    rng, found = np.random.default_rng(5), []
    for dtype in ("float32", "bfloat16", "float16"):
        chosen = named_recipe(name, dtype)
        rows = rng.normal(size=(6, 72)) * 2.0 ** rng.integers(-12, 8, (6, 1))
        rows[3] = 0
        x = np.asarray(jnp.asarray(rows, dtype))
        smooth = np.asarray(rng.uniform(0.5, 2, 72), np.float32) if chosen.takes_smooth else None
        got = jax.jit(functools.partial(_there_and_back, chosen))(x, smooth)
        values, scale = reference.quant.quantize(name, x, smooth=smooth)
        want = (values, scale, reference.quant.dequantize(name, values, scale))
        pairs = zip((np.asarray(a) for a in got), want, strict=True)
        found.append(float(sum(a.tobytes() != np.asarray(b).tobytes() for a, b in pairs)))
    return found


def _there_and_back(recipe, x, smooth):
    q = recipe.quantize(x, smooth=smooth)
    return q.values, q.scale, recipe.dequantize(recipe.unpack(recipe.pack(q), x.shape[1]))
