"""What the fused pair of an exchange and a grouped matmul asks of its arguments, and its quantised siblings.

Letters: A rows on the experts' side, BSK on the tokens' side, e local experts, R ranks; the experts' product is from H1
to N1, and the product beside it from H2 to N2. Count lists have index peer * e + local expert; one flat list, or a
table [R, R * e] with a row for each rank. A rule begins with its name and the section of the CANN sheet that it is
from. JAX has no hif8, so mode 1 of the quantised siblings, one scale per tensor, is for int8 and fp8 and no product.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.aclnn.rules import (
    BAD_PARAMETER,
    DTYPE,
    MISSING,
    NONZERO,
    NULL,
    NULL_POINTER,
    Call,
    Quantity,
    Rule,
    Rules,
    check_shape,
    extent,
    forbids,
    group_size,
    make_error,
    one_of_dtypes,
    refuses,
    same_dtype,
    shown,
)
from moe_jax.aclnn.workspace import columns, counts, token_rows
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, ShapeError
from moe_jax.hardware.ascend import E8M0, FP8

_LISTS = ("send_counts", "recv_counts")
_TRANSPOSED = {"gmm_weight": "trans_gmm_weight", "mm_weight": "trans_mm_weight"}


def _mm_pair(call: Call) -> None:
    names = [name for name in ("mm_x", "mm_weight", "mm_x_scale", "mm_weight_scale") if name in call.arrays]
    given = [name for name in names if call.given(name)]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise MissingArgumentError(f"{missing} is None, but {given[0]} was given; pass {', '.join(names)} or none")


def _counts_given(call: Call) -> None:
    for name in _LISTS:
        empty = isinstance(call[name], (list, tuple)) and not call[name]
        if call[name] is None or empty or getattr(call[name], "size", 1) == 0:
            raise make_error(
                InvalidArgumentError, f"{name}={call[name]!r} must hold a count per (peer, local expert)", BAD_PARAMETER
            )


def _counts_length(call: Call) -> None:
    world, experts = call["ep_world_size"], call.shape("gmm_weight")[0]
    for name in _LISTS:
        try:
            array = np.asarray(call[name])
        except ValueError:
            raise InvalidArgumentError(f"{name} holds lists of unequal length; all ranks have as many counts") from None
        except TypeError:
            raise InvalidArgumentError(f"{name} is a traced array; counts are host values, pass a list") from None
        if array.dtype.kind not in "iu":
            raise InvalidArgumentError(f"{name} holds {array.dtype}; counts are whole numbers")
        if array.shape not in ((world * experts,), (world, world * experts)):
            raise InvalidArgumentError(
                f"{name} has shape {array.shape}; it must have {world * experts} entries = ep_world_size={world} * "
                f"e={experts} experts of gmm_weight, or be a table of such lists, one per rank"
            )


def _counts_sign(call: Call) -> None:
    for name in _LISTS:
        low = counts(call, name).min()
        if low < 0:
            raise InvalidArgumentError(f"{name} holds {low}; counts are at least 0")


def _rows_sent(call: Call) -> int:
    return int(counts(call, "send_counts").sum(axis=1).max())


def _tables_agree(call: Call) -> None:
    send, recv = (np.asarray(call[name]) for name in _LISTS)
    if send.ndim != recv.ndim:
        raise InvalidArgumentError(
            f"send_counts has shape {send.shape} and recv_counts {recv.shape}; pass two lists or two tables"
        )
    if send.ndim == 1:
        return
    world = call["ep_world_size"]
    expected = send.reshape(world, world, -1).swapaxes(0, 1).reshape(recv.shape)
    if (expected != recv).any():
        rank, index = (int(i) for i in np.argwhere(expected != recv)[0])
        raise InvalidArgumentError(
            f"recv_counts[{rank}, {index}]={recv[rank, index]} must be {expected[rank, index]}, what that peer has in "
            "send_counts for this rank"
        )


def _of_tokens(split: Callable[[int, int], int]) -> Quantity:
    """How many of the BSK rows each of the BS tokens of the product beside the exchange has, where there is one."""

    def quantity(call: Call) -> tuple[str, int] | None:
        if not call.given("mm_x"):
            return None
        num_tokens = call.shape("mm_x")[0]
        return shown(call, "mm_x"), split(token_rows(call), num_tokens) if num_tokens else 0

    return quantity


def _bytes_per_peer(pick: Any) -> Quantity:
    """The bytes of the smallest or the largest block of rows in both lists that this rank exchanges with one other."""

    def quantity(call: Call) -> tuple[str, int]:
        shape = (-1, call["ep_world_size"], call.shape("gmm_weight")[0])
        rows, name = pick(
            ((pick(counts(call, name).reshape(shape).sum(axis=2).ravel().tolist()), name) for name in _LISTS),
            key=lambda found: found[0],
        )
        width = call.shape("gmm_x")[1]
        return f"{name}, {rows} rows of H1={width}", rows * width * 2

    return quantity


def _columns(name: str) -> Quantity:
    """The number of columns of a weight, where it is given."""
    return lambda call: (shown(call, name), columns(call, name, _TRANSPOSED[name])) if call.given(name) else None


_QUANTITIES = {
    "local_experts": ("L, experts per rank", extent("gmm_weight", 0)),
    "experts_by_ranks": (
        "experts per rank times ranks",
        lambda call: (shown(call, "gmm_weight"), call.shape("gmm_weight")[0] * call["ep_world_size"]),
    ),
    "rows": ("BSK, rows on the token side", lambda call: ("the counts", token_rows(call))),
    "h1": ("H1, the width of gmm_x", extent("gmm_x", 1)),
    "n1": ("N1, the columns of gmm_weight", _columns("gmm_weight")),
    "h2": ("H2, the width of mm_x", extent("mm_x", 1)),
    "n2": ("N2, the columns of mm_weight", _columns("mm_weight")),
    "rows_per_token": ("K = BSK // BS", _of_tokens(lambda rows, num_tokens: rows // num_tokens)),
    "row_remainder": ("BSK % BS", _of_tokens(lambda rows, num_tokens: rows % num_tokens)),
    "least_bytes_per_peer": ("the fewest bytes exchanged with one rank", _bytes_per_peer(min)),
    "most_bytes_per_peer": ("the most bytes exchanged with one rank", _bytes_per_peer(max)),
}


def _grouped(own_dtypes: tuple[Rule, ...], last: tuple[Rule, ...]) -> Rules:
    """The rules of one of the four operators: ``own_dtypes`` on dtypes, ``last`` after the relations that all share."""
    return Rules(
        group="group",
        not_needed=_LISTS,  # they must not be None, but the code for that is not the null pointer's here
        shapes={
            "gmm_x": "A H1",
            "gmm_weight": lambda call: "e N1 H1" if call["trans_gmm_weight"] else "e H1 N1",
            "mm_x": "BS H2",
            "mm_weight": lambda call: "N2 H2" if call["trans_mm_weight"] else "H2 N2",
        },
        quantities=_QUANTITIES,
        rules=(
            Rule("mm_pair", "14.4", _mm_pair, stage=NULL),
            group_size("14.1", "group", "ep_world_size"),
            *(
                forbids(
                    "count_tensors", "14.1", name, {},
                    f"{name} was given; it must be None, the counts are the lists send_counts and recv_counts",
                    stage=NULL, status=NULL_POINTER,
                )
                for name in ("send_counts_tensor", "recv_counts_tensor")
            ),
            *own_dtypes,
            Rule("counts_given", "14.4", _counts_given, stage=DTYPE),
            refuses(
                "transpose_without_mm", "14.4", {"trans_mm_weight": NONZERO, "mm_weight": MISSING},
                "trans_mm_weight=True must be False without mm_x and mm_weight",
            ),
            Rule("counts_length", "14.4", _counts_length),
            Rule("counts_sign", "14.4", _counts_sign),
            refuses(  # a flat list describes every row of gmm_x, and in a table the list of the fullest rank does
                "counts_sum", "14.4", lambda call: _rows_sent(call) != call.shape("gmm_x")[0],
                "send_counts add up to {total}, but gmm_x has {rows} rows (shape {gmm_x.shape}); they must agree",
                ShapeError, words={"total": _rows_sent, "rows": lambda call: call.shape("gmm_x")[0]},
            ),
            Rule("tables_agree", "14.1", _tables_agree),
            *last,
        ),
    )  # fmt: skip


GROUPED = _grouped((same_dtype("same_dtype", "14.4", ("gmm_weight", "mm_x", "mm_weight"), "gmm_x"),), ())


# The quantised siblings: they take numbers of one byte or less, with scales.

_SCALES = ("gmm_x_scale", "gmm_weight_scale", "mm_x_scale", "mm_weight_scale")


def _alike(call: Call) -> tuple[str, ...]:
    """Whether the dtypes go together: fp8 in any mix, or one dtype throughout."""
    dtype = call.dtype("gmm_x")
    return FP8 if dtype in FP8 else (dtype,)


def _quant_modes(call: Call) -> None:
    mode = call["gmm_x_quant_mode"]
    if call["gmm_weight_quant_mode"] != mode:
        raise InvalidArgumentError(
            f"gmm_weight_quant_mode={call['gmm_weight_quant_mode']} must be gmm_x_quant_mode={mode}; (1, 1) and (6, 6) "
            "are taken"
        )
    wanted = mode if call.given("mm_x") else 0
    for name in ("mm_x_quant_mode", "mm_weight_quant_mode"):
        if call[name] not in ((mode,) if wanted else (0, mode)):
            raise InvalidArgumentError(f"{name}={call[name]} must be {wanted}, as gmm_x_quant_mode={mode}")


def _scale_shapes(call: Call) -> None:
    """The shapes of scales: (1,) per tensor; for blocks of 32 two exponents per 64 columns of the summed dimension."""
    for x, weight in (("gmm_x", "gmm_weight"), ("mm_x", "mm_weight")):
        if not call.given(x):
            continue
        flag = _TRANSPOSED[weight]
        rows, width = call.shape(x)
        outer, pairs, size = call.shape(weight)[:-2], -(-width // 64), columns(call, weight, flag)
        legal = ((rows, pairs, 2), (*outer, size, pairs, 2) if call[flag] else (*outer, pairs, size, 2))
        if call["gmm_x_quant_mode"] == 1:
            legal = ((1,), (1,))
        for name, shape in zip((x, weight), legal, strict=True):
            check_shape(f"{name}_scale", call.shape(f"{name}_scale"), (shape,))


def _even_width(call: Call) -> None:
    for name in ("gmm_x", "mm_x"):
        if call.given(name) and call.dtype(name) == "float4_e2m1fn":
            width = call.shape(name)[1]
            if width % 2 or width == 2:
                raise ShapeError(
                    f"{name} has shape {call.shape(name)}: its width {width} must be even and not 2 for e2m1, two of "
                    "which share a byte"
                )


QUANTISED = _grouped(
    (
        one_of_dtypes(
            "quantised_dtypes", "14.6", ("gmm_weight", "mm_x", "mm_weight"), _alike,
            "beside gmm_x of {gmm_x.dtype} it must be {legal}",
        ),
        one_of_dtypes(
            "mode_dtypes", "14.6", ("gmm_x",),
            lambda call: ("int8", *FP8) if call["gmm_x_quant_mode"] == 1 else (*FP8, "float4_e2m1fn"),
            "with gmm_x_quant_mode={gmm_x_quant_mode} it must be {legal}", depends_on="gmm_x_quant_mode",
        ),
        one_of_dtypes(
            "scale_dtypes", "14.6", _SCALES,
            lambda call: ("float32",) if call["gmm_x_quant_mode"] == 1 else E8M0,
            "with gmm_x_quant_mode={gmm_x_quant_mode} it must be {legal}", depends_on="gmm_x_quant_mode",
        ),
        refuses(
            "per_tensor_data", "14.6", {"gmm_x_quant_mode": 1},
            "gmm_x has dtype {gmm_x.dtype}; with gmm_x_quant_mode=1 it must be hif8{on}, which JAX does not have; take "
            "gmm_x_quant_mode=6, or product=None",
            DtypeError, stage=DTYPE, products=("a5",),
        ),
    ),
    (
        Rule("quant_modes", "14.6", _quant_modes),
        Rule("even_width", "14.6", _even_width),
        Rule("scale_shapes", "14.6", _scale_shapes),
    ),
)  # fmt: skip
