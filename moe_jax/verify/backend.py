"""The laws that every back end must keep, each under its name. ``moe_jax.testing``, ``verify`` and authors run them.

A law is a function of a back end's name and a dtype. It returns how far each of its cases is off, which must be zero,
or None where it does not apply. Products are taken at the highest precision, since fp32 operands must keep theirs.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe_jax import _compat, reference
from moe_jax.errors import MoEError, check_choice
from moe_jax.kernels import FLOAT_DTYPES, Backend, check_backend, grouped_matmul, grouped_outer
from moe_jax.kernels.table import KERNELS, backends_of, resolve_all
from moe_jax.mesh import make_mesh
from moe_jax.verify.cases import deviation
from moe_jax.verify.exchange import Exchange
from moe_jax.verify.kernels import fused_deviations
from moe_jax.verify.products import (
    EXTENTS,
    GROUPINGS,
    PARTS,
    Operands,
    compare,
    differences,
    exact,
    operands,
    product_and_gradients,
    program,
)

Findings = dict[str, float]
LOWERED_AS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # the platforms of ``Backend`` as JAX names them


class BackendContractError(MoEError, AssertionError):
    """A back end breaks a law; the text lists the cases in which it does.

    Attributes:
      num_cases: how many cases were looked at.
      worst: the largest deviation; infinite where a kernel raises.
    """

    num_cases: int = 1
    worst: float = float("inf")


def values(backend: str, dtype: str) -> Findings:
    """The product equals the exact result, rounded once."""
    return _products(backend, dtype, ("full",), PARTS[:1])


def gradients(backend: str, dtype: str) -> Findings:
    """The gradients of rows and of matrices equal the exact ones, rounded once."""
    return _products(backend, dtype, ("full",), PARTS[1:])


def every_mode(backend: str, dtype: str) -> Findings:
    """Forward mode, and both modes of the gradient, equal the formulas. Tangents are NaN past the groups, too."""
    case = operands(0, GROUPINGS["slack"], jnp.dtype(dtype))
    tangents = operands(1, GROUPINGS["slack"], jnp.dtype(dtype))
    got = jax.jit(functools.partial(_modes, backend))(*case, *tangents[:2])
    (lhs, rhs, sizes, ct), (u_lhs, u_rhs, *_) = case, tangents

    def vjp(ct, lhs, rhs):
        return reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)

    # The product is linear in each operand, so every derivative is a product of operands and tangents.
    product, total = reference.grouped_matmul, int(sizes.sum())
    along = product(lhs, u_rhs, sizes) + product(u_lhs, rhs, sizes)
    ct_along_lhs, ct_along_rhs = vjp(ct, lhs, u_rhs)[0], vjp(ct, u_lhs, rhs)[1]
    want = {
        "forward mode of the product": along,
        "forward mode of d_lhs": ct_along_lhs,
        "forward mode of d_rhs": ct_along_rhs,
        "reverse mode of both gradients, in lhs": ct_along_lhs,
        "reverse mode of both gradients, in rhs": ct_along_rhs,
        "reverse mode of both gradients, in ct": along,
    }
    stops = {name: None if name.endswith("rhs") else total for name in want}
    return {
        name: deviation(np.asarray(came)[: stops[name]], want[name][: stops[name]].astype(dtype))
        for name, came in zip(want, got, strict=True)
    }


def _modes(backend, lhs, rhs, sizes, ct, u_lhs, u_rhs):
    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, backend=backend)

    def pull(lhs, rhs, ct):
        return jax.vjp(product, lhs, rhs)[1](ct)

    _, along = jax.jvp(product, (lhs, rhs), (u_lhs, u_rhs))
    _, of_pull = jax.jvp(lambda lhs, rhs: pull(lhs, rhs, ct), (lhs, rhs), (u_lhs, u_rhs))
    return along, *of_pull, *jax.vjp(pull, lhs, rhs, ct)[1]((u_lhs, u_rhs))


def empty_groups(backend: str, dtype: str) -> Findings:
    """Groups without rows, be they first, last or all, take nothing from others, and their gradient is zero."""
    return _products(backend, dtype, ("empty_first", "empty_middle", "empty_last", "all_empty"))


def one_group_has_all(backend: str, dtype: str) -> Findings:
    """No group is too large, with all rows in one, and none too small, with one row in each."""
    return _products(backend, dtype, ("one_giant", "giant_last", "ones"))


def rows_past_the_groups(backend: str, dtype: str) -> Findings:
    """Rows past ``sum(group_sizes)`` influence nothing, be they NaN or infinite."""
    found: Findings = {}
    for poison in (np.nan, np.inf, -np.inf):
        of_poison = _products(backend, dtype, ("slack", "slack_after_empty", "all_empty"), poison=poison)
        found |= {f"{case}, {poison} past them": worst for case, worst in of_poison.items()}
    return found


def weights_of_others(backend: str, dtype: str) -> Findings:
    """The matrix of one group influences no row of another group, be it NaN or infinite."""
    found: Findings = {}
    for group in range(5):
        sizes = GROUPINGS["empty_middle"]
        lhs, rhs, group_sizes, ct = case = operands(group, sizes, jnp.dtype(dtype))
        expected, start = exact(case), sum(sizes[:group])
        for poison in (np.nan, np.inf):
            bad = rhs.copy()
            bad[group] = poison
            product, d_lhs, d_rhs = (np.array(a) for a in program(backend)(lhs, bad, group_sizes, ct))
            # The rows of this group itself are spoilt, so they are not compared.
            for got, want in zip((product, d_lhs), expected[:2], strict=True):
                got[start : start + sizes[group]] = want[start : start + sizes[group]].astype(dtype)
            worst = differences((product, d_lhs, d_rhs), expected, case)
            found |= {f"{part}, matrix {group} of {group_sizes} is {poison}": off for part, off in worst.items()}
    return found


def dtypes_of_results(backend: str, dtype: str) -> Findings:
    """Results have the dtype of the operands, and those of ``grouped_outer`` the dtype that was asked for."""
    lhs, rhs, sizes, ct = case = operands(0, GROUPINGS["full"], jnp.dtype(dtype), numbers=(0, 15))

    def off(array, wanted):
        return 0.0 if array.dtype == wanted else np.inf

    product = jax.eval_shape(functools.partial(grouped_matmul, backend=backend), lhs, rhs, sizes)
    if product.dtype != lhs.dtype:  # then it has no gradient either
        return {f"the product has dtype {product.dtype}": np.inf}
    found = {f"dtype of {part}": off(a, lhs.dtype) for part, a in zip(PARTS, program(backend)(*case), strict=True)}
    outer = jax.jit(functools.partial(grouped_outer, backend=backend, dtype="float32"))(lhs, ct, sizes)
    found["dtype of grouped_outer in float32"] = off(outer, jnp.float32)
    return found | {"grouped_outer in float32": deviation(outer, exact(case)[2])}


def sums_in_fp32(backend: str, dtype: str) -> Findings:
    """Sums are accumulated in fp32: long ones, which 16 bits do not hold. fp32 operands have 12 bits, and keep them."""
    lhs, rhs, sizes, ct = operands(0, [60, 7], jnp.dtype(dtype), extents=(67, 67, 5), numbers=(0, 15))
    if dtype == "float32":
        rng = np.random.default_rng(1)
        lhs = rng.integers(2048, 4096, lhs.shape).astype(np.float32)
    return _named((lhs, rhs, sizes, ct), compare(backend, (lhs, rhs, sizes, ct)))


def odd_extents(backend: str, dtype: str) -> Findings:
    """Extents need not be multiples of any tile."""
    found: Findings = {}
    for extents, sizes in (((1, 6, 5), [0, 1]), ((133, 19, 35), [70, 0, 48, 15])):
        case = operands(0, sizes, jnp.dtype(dtype), extents=extents)
        found |= _named(case, compare(backend, case))
    return found


def extents_of_zero(backend: str, dtype: str) -> Findings:
    """There may be no rows, nothing to sum, or no columns."""
    found: Findings = {}
    for extents in ((0, 6, 5), (37, 0, 5), (37, 6, 0)):
        case = operands(0, [0, 0] if not extents[0] else [30, 7], jnp.dtype(dtype), extents=extents)
        found |= _named(case, compare(backend, case))
    return found


def many_rows(backend: str, dtype: str) -> Findings:
    """Rows are counted in 32 bits."""
    case = operands(0, [16000, 500, 16500], jnp.dtype(dtype), extents=(33000, 1, 1), numbers=(-1, 1))
    return _named(case, compare(backend, case))


def transposed(backend: str, dtype: str) -> Findings:
    """Matrices may be given transposed, also square ones."""
    found = _products(backend, dtype, ("full", "empty_middle", "slack"), transpose_rhs=True)
    case = operands(0, [4, 3], jnp.dtype(dtype), True, (7, 3, 3))
    return found | _named(case, compare(backend, case, True))


def traced_group_sizes(backend: str, dtype: str) -> Findings:
    """Group sizes are data: one program serves all of them, whatever sizes came first, be they known or traced."""
    traced = 0
    run = product_and_gradients(backend)

    def counted(*case):
        nonlocal traced
        traced += 1
        return run(*case)

    compiled, found = jax.jit(counted), {}
    for seed, (name, call) in enumerate((("full", run), ("ones", compiled), ("slack", compiled))):
        case = operands(seed, GROUPINGS[name], jnp.dtype(dtype))
        how = "compiled" if call is compiled else "not compiled"
        worst = _named(case, differences(call(*map(jnp.asarray, case)), exact(case), case))
        found |= {f"{case}, {how}": off for case, off in worst.items()}
    return found | {"programs beyond one": float(traced - 1)}


def vmap(backend: str, dtype: str) -> Findings:
    """A batch is the same as its members by themselves, each with group sizes of its own."""
    cases = [operands(seed, GROUPINGS[name], jnp.dtype(dtype)) for seed, name in enumerate(("slack", "empty_first"))]
    run, rhs = product_and_gradients(backend), cases[0][1]
    batch = [np.stack(arrays) for arrays in zip(*cases, strict=True)]

    @jax.jit
    def both(lhs, rhs, sizes, ct):
        return jax.vmap(run)(lhs, rhs, sizes, ct), jax.vmap(run, (0, None, 0, 0))(lhs, rhs[0], sizes, ct)

    found: Findings = {}
    for results, shared in zip(both(*batch), (False, True), strict=True):
        for member, (lhs, own, sizes, ct) in enumerate(cases):
            case = (lhs, rhs if shared else own, sizes, ct)
            worst = differences([a[member] for a in results], exact(case), case)
            how = "with shared matrices" if shared else "with its own matrices"
            found |= {f"{part} of member {member} {how}": off for part, off in worst.items()}
    return found


def shard_map(backend: str, dtype: str) -> Findings:
    """Inside ``shard_map`` with ``check_vma``: types fit, and replicated matrices get the gradients of all ranks."""
    devices = jax.devices()[:4]
    mesh = _compat.auto_mesh(np.array(devices), ("x",))
    names = ("full", "slack", "empty_first", "one_giant")
    cases = [operands(seed, GROUPINGS[name], jnp.dtype(dtype), numbers=(-2, 2)) for seed, name in enumerate(names)]
    cases = [(lhs, cases[0][1], sizes, ct) for lhs, _, sizes, ct in cases[: len(devices)]]
    split, whole = PartitionSpec("x"), PartitionSpec()
    run = _compat.shard_map(
        product_and_gradients(backend),
        mesh=mesh,
        in_specs=(split, whole, split, split),
        out_specs=(split, split, whole),
    )
    lhs, sizes, ct = (np.concatenate([case[i] for case in cases]) for i in (0, 2, 3))
    product, d_lhs, d_rhs = jax.jit(run)(lhs, cases[0][1], sizes, ct)
    expected = [exact(case) for case in cases]
    # All ranks have the same matrices, so the gradient of these is the sum over the ranks.
    summed = sum(want[2] for want in expected)
    found = {"d_rhs, summed over ranks": deviation(d_rhs, np.asarray(summed).astype(dtype))}
    of_ranks = zip(*(np.split(np.asarray(a), len(cases)) for a in (product, d_lhs)), strict=True)
    for rank, (got, want, case) in enumerate(zip(of_ranks, expected, cases, strict=True)):
        worst = differences((*got, want[2].astype(dtype)), want, case)
        found |= {f"{part} of rank {rank}": off for part, off in worst.items()}
    return found


def lowering(backend: str, dtype: str, platforms: Iterable[str] | None = None) -> Findings | None:
    """The product and its gradients can be lowered for every platform that the back end lists.

    ``platforms``: instead of these, as JAX names them when it lowers: "cpu", "cuda", "rocm", "tpu".
    """
    if platforms is None:
        listed = {platform for member in _members(backend) for platform in member.platforms}
        platforms = [LOWERED_AS[platform] for platform in sorted(listed)]
    case, found = operands(0, GROUPINGS["full"], jnp.dtype(dtype)), {}
    for platform in platforms:
        for transpose in (False, True):
            given = (case[0], case[1].swapaxes(1, 2) if transpose else case[1], *case[2:])
            program(backend, transpose).trace(*given).lower(lowering_platforms=(platform,))
            found[f"for {platform}, {transpose=}"] = 0.0
    return found or None


def added_to(backend: str, dtype: str) -> Findings | None:
    """A kernel that ``accumulates`` adds in fp32 before it rounds once, and not what NaN past the groups holds."""
    if not _served(backend, "grouped_matmul").accumulates:
        return None
    lhs, rhs, sizes, ct = case = operands(0, GROUPINGS["slack"], jnp.dtype(dtype), numbers=(0, 15))
    start = np.random.default_rng(1).integers(300, 600, ct.shape).astype(ct.dtype)
    total = int(sizes.sum())
    start[total:] = np.nan
    got = jax.jit(functools.partial(_sum, backend))(lhs, rhs, sizes, start)
    want = exact(case)[0][:total] + start[:total].astype(np.float64)
    return {"the sum": deviation(np.asarray(got)[:total], want.astype(dtype))}


def _sum(backend, lhs, rhs, sizes, start):
    return grouped_matmul(lhs, rhs, sizes, backend=backend, add_to=start)


def rows_in_slots(backend: str, dtype: str) -> Findings | None:
    """Rows are read from their slots and written there ("slot_matmul", "slot_outer"), whatever other slots hold."""
    return _fused(backend, dtype, ("slot_matmul", "slot_outer"))


def activation(backend: str, dtype: str) -> Findings | None:
    """Both products with their biases, the activation of them ("gated_matmul"), and every gradient."""
    return _fused(backend, dtype, ("gated_matmul",))


def transports(backend: str, dtype: str) -> Findings | None:
    """Exchanges that the back end brings: dispatch, combine and their gradients equal the oracle."""
    brought = [word for member in _members(backend) for word in member.transports]
    if not brought:
        return None
    del dtype  # rows are fp32
    mesh, found = _mesh(), {}
    for transport in brought:
        exchange = Exchange(mesh, transport, _completed(backend))
        for law in ("dispatch = oracle", "combine = oracle", "gradients of both = oracle"):
            found[f"{transport}: {law}"] = float(np.max(exchange.of(law)))
        found[f"{transport}: <dispatch x, y> = <x, combine y>"] = float(np.max(exchange.adjoint()))
    return found


_OF_EVERY_DTYPE: tuple[Callable[[str, str], Findings | None], ...] = (
    values,
    gradients,
    empty_groups,
    one_group_has_all,
    rows_past_the_groups,
    weights_of_others,
    dtypes_of_results,
    sums_in_fp32,
    odd_extents,
    transposed,
    lowering,
    added_to,
    rows_in_slots,
    activation,
)
# Their kernels are those of the laws above, so that one dtype is enough.
_OF_ONE_DTYPE = (every_mode, extents_of_zero, many_rows, traced_group_sizes, vmap, shard_map, transports)
LAWS = {law.__name__: law for law in (*_OF_EVERY_DTYPE, *_OF_ONE_DTYPE)}


def dtypes_of(law: str, dtypes: Sequence[str] = FLOAT_DTYPES) -> tuple[str, ...]:
    """Those of ``dtypes`` that a law is to be held with: all, or the first."""
    return tuple(dtypes) if LAWS[law] in _OF_EVERY_DTYPE else tuple(dtypes[:1])


def findings(
    law: str, backend: str, dtype: str = "float32", *, platforms: Iterable[str] | None = None
) -> Findings | None:
    """How far each case of a law is off; None where the law does not apply to the back end.

    Args:
      law: one of ``LAWS``.
      backend: a name in the table, or one that an installed package offers; several, joined by "+"; or "auto".
      dtype: of the operands.
      platforms: for "lowering": those to lower for, as JAX names them; None: those of the back end.

    Raises:
      InvalidArgumentError, UnsupportedError: the back end is unknown, or a package that it needs is not installed.
      Exception: whatever the kernels raise.
    """
    check_choice("law", law, LAWS)
    check_backend(backend)
    members = _members(backend)
    if any(law in member.unpromised for member in members):
        return None
    if law != "transports":
        if not any(member.has(word) for member in members for word in KERNELS):
            return None
        backend = _completed(backend)
    with jax.default_matmul_precision("highest"):
        return lowering(backend, dtype, platforms) if law == "lowering" else LAWS[law](backend, dtype)


def hold(law: str, backend: str, dtype: str = "float32", *, platforms: Iterable[str] | None = None) -> int | None:
    """Raises BackendContractError unless the back end keeps the law. Arguments as for ``findings``.

    Returns:
      The number of cases; None where the law does not apply.
    """
    check_choice("law", law, LAWS)
    what = f"back end {backend!r} breaks the law {law!r} with {dtype}: {(LAWS[law].__doc__ or '').splitlines()[0]}"
    try:
        found = findings(law, backend, dtype, platforms=platforms)
    except MoEError:
        raise
    except Exception as error:
        raise BackendContractError(f"{what}\n- it raises {type(error).__name__}: {error}") from error
    if found is None:
        return None
    broken = [f"- {case}: off by {worst}" for case, worst in found.items() if worst or np.isnan(worst)]
    if broken:
        complaint = BackendContractError("\n".join([what, *broken]))
        complaint.num_cases, complaint.worst = len(found), float(np.max(list(found.values())))
        raise complaint
    return len(found)


def backend_contract(
    backend: str, *, laws: Sequence[str] | None = None, dtypes: Sequence[str] = FLOAT_DTYPES
) -> dict[str, int]:
    """Holds a back end to every law that applies to it.

    Args:
      backend: as for ``findings``.
      laws: some of ``LAWS``; None: all of them.
      dtypes: of the operands; laws that look at one dtype take the first.

    Returns:
      The number of cases of each law.

    Raises:
      BackendContractError: a law is broken; the text lists all of them with their cases.
      InvalidArgumentError, UnsupportedError: as for ``findings``, and a law is unknown.

    >>> from moe_jax.verify import backend_contract
    >>> backend_contract("xla", laws=("empty_groups",), dtypes=("float32",))
    {'empty_groups': 12}
    """
    cases: dict[str, int] = {}
    broken = []
    for law in LAWS if laws is None else laws:
        check_choice("laws", law, LAWS)
        for dtype in dtypes_of(law, dtypes):
            try:
                held = hold(law, backend, dtype)
            except BackendContractError as error:
                broken.append(str(error))
            else:
                cases[law] = cases.get(law, 0) + (held or 0)
    if broken:
        raise BackendContractError("\n\n".join(broken))
    return {law: count for law, count in cases.items() if count}


def _products(
    backend: str,
    dtype: str,
    names: Iterable[str],
    parts: Sequence[str] = PARTS,
    *,
    transpose_rhs: bool = False,
    poison: float = np.nan,
) -> Findings:
    """Products in the groups of these names, and their gradients, beside the exact ones."""
    found: Findings = {}
    for seed, name in enumerate(names):
        case = operands(seed, GROUPINGS[name], jnp.dtype(dtype), transpose_rhs, poison=poison)
        worst = compare(backend, case, transpose_rhs)
        found |= _named(case, {part: worst[part] for part in parts})
    return found


def _named(case: Operands, worst: dict[str, float]) -> Findings:
    """``worst`` of each part, under the words for the case and the part."""
    lhs, _, sizes, ct = case
    extents = (*lhs.shape, ct.shape[1])
    about = "" if extents == EXTENTS else f" of {extents[0]} rows, {extents[1]} x {extents[2]}"
    return {f"{part}{about}, group_sizes={sizes.tolist()}": off for part, off in worst.items()}


def _fused(backend: str, dtype: str, words: tuple[str, ...]) -> Findings | None:
    has = _served(backend, "grouped_matmul").kernels
    if backend == "auto" or not set(words) <= set(has):
        return None
    worst = fused_deviations(backend, dtype, EXTENTS, words=words) or ()
    return {f"grouping {number} of {EXTENTS[0]} rows": off for number, off in enumerate(worst)}


def _members(backend: str) -> list[Backend]:
    """The back ends that a name stands for; for "auto", those that serve the platform that JAX runs on."""
    return backends_of(resolve_all(jax.default_backend(), None) if backend == "auto" else backend)


def _served(backend: str, kernel: str) -> Backend:
    return next(member for member in _members(backend) if member.has(kernel))


def _completed(backend: str) -> str:
    """The name with "xla" behind it, which serves the kernels that the back end leaves out."""
    whole = backend == "auto" or all(any(member.has(word) for member in _members(backend)) for word in KERNELS)
    return backend if whole else f"{backend}+xla"


def _mesh() -> Mesh:
    """A mesh of two tensor-parallel ranks, and of as many expert-parallel ones as there are devices for, up to four."""
    return make_mesh(ep=max(1, min(4, len(jax.devices()) // 2)), tp=min(2, len(jax.devices())))
