"""What the fused pair asks of its arguments, and its quantised siblings share.

A rows on the experts' side, BSK on the tokens' side, e local experts, R ranks, H1 to N1 the experts' product, H2 to N2
the product beside it. Count lists have index peer * e + local expert; one flat list, or a table [R, R * e] with a row
for each rank. Sections are those of the reference sheet.
"""

import numpy as np

from moe_jax.aclnn.limits import (
    BAD_PARAMETER,
    DTYPE,
    NULL,
    NULL_POINTER,
    Call,
    Operator,
    Rule,
    group_size_rule,
    make_error,
)
from moe_jax.errors import DtypeError, InvalidArgumentError, MissingArgumentError, ShapeError

_LISTS = ("send_counts", "recv_counts")
_COMPUTE_FIRST = ("grouped_mat_mul_allto_allv", "quant_grouped_mat_mul_allto_allv")


def counts(call: Call, name: str) -> np.ndarray:
    """A count list as [1 or R, R * e] i64: a row for each rank that is known."""
    return np.atleast_2d(np.asarray(call[name], np.int64))


def token_rows(call: Call) -> int:
    """BSK, the most of any rank that is known."""
    name = "recv_counts" if call.operator in _COMPUTE_FIRST else "send_counts"
    return int(counts(call, name).sum(axis=1).max())


def expert_rows(call: Call) -> int:
    """A, the most of any rank that is known."""
    name = "send_counts" if call.operator in _COMPUTE_FIRST else "recv_counts"
    return int(counts(call, name).sum(axis=1).max())


def columns(call: Call, name: str, flag: str) -> int:
    """N1 or N2: the columns of a weight, whichever way it stands."""
    return call.shape(name)[-2 if call[flag] else -1]


# Null pointers and dtypes.


def _mm_pair(call):
    names = [name for name in ("mm_x", "mm_weight", "mm_x_scale", "mm_weight_scale") if name in call.arrays]
    given = [name for name in names if call.given(name)]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise MissingArgumentError(f"{missing} is None, but {given[0]} was given; pass {', '.join(names)} or none")


def _count_tensors(call):
    for name in ("send_counts_tensor", "recv_counts_tensor"):
        if call.given(name):
            raise make_error(
                InvalidArgumentError,
                f"{name} was given; it must be None, the counts are the lists send_counts and recv_counts",
                NULL_POINTER,
            )


def _counts_given(call):
    for name in _LISTS:
        empty = isinstance(call[name], (list, tuple)) and not call[name]
        if call[name] is None or empty or getattr(call[name], "size", 1) == 0:
            raise make_error(
                InvalidArgumentError, f"{name}={call[name]!r} must hold a count per (peer, local expert)", BAD_PARAMETER
            )


def _same_dtype(call):
    dtype = call.dtype("gmm_x")
    for name in ("gmm_weight", "mm_x", "mm_weight"):
        if call.given(name) and call.dtype(name) != dtype:
            raise DtypeError(f"{name} has dtype {call.dtype(name)}; it must be {dtype}, as gmm_x; cast it first")


# Everything else.


def _counts_length(call):
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


def _counts_sign(call):
    for name in _LISTS:
        low = counts(call, name).min()
        if low < 0:
            raise InvalidArgumentError(f"{name} holds {low}; counts are at least 0")


def _counts_sum(call):
    """A flat list describes every row of gmm_x; in a table the fullest rank's does."""
    total, rows = int(counts(call, "send_counts").sum(axis=1).max()), call.shape("gmm_x")[0]
    if total != rows:
        raise ShapeError(
            f"send_counts add up to {total}, but gmm_x has {rows} rows (shape {call.shape('gmm_x')}); they must agree"
        )


def _tables_agree(call):
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


def _transpose_without_mm(call):
    if call["trans_mm_weight"] and not call.given("mm_weight"):
        raise InvalidArgumentError("trans_mm_weight=True must be False without mm_x and mm_weight")


def _weight_shape(x, flag, experts):
    def shapes(call):
        width = call.shape(x)[1]
        return ((*experts, None, width) if call[flag] else (*experts, width, None),)

    return shapes


def _rows_per_token(call):
    if not call.given("mm_x"):
        return None
    tokens = call.shape("mm_x")[0]
    return f"mm_x with shape {call.shape('mm_x')}", token_rows(call) // tokens if tokens else 0


def _row_remainder(call):
    if not call.given("mm_x") or not call.shape("mm_x")[0]:
        return None
    return f"mm_x with shape {call.shape('mm_x')}", token_rows(call) % call.shape("mm_x")[0]


def _bytes_per_peer(pick):
    """The smallest or the largest block of rows, of both lists, that this rank exchanges with one other."""

    def quantity(call):
        shape = (-1, call["ep_world_size"], call.shape("gmm_weight")[0])
        name = pick(_LISTS, key=lambda name: pick(counts(call, name).reshape(shape).sum(axis=2).ravel()))
        rows = int(pick(counts(call, name).reshape(shape).sum(axis=2).ravel()))
        return f"{name}, {rows} rows of H1={call.shape('gmm_x')[1]}", rows * call.shape("gmm_x")[1] * 2

    return quantity


def _of_mm(name, flag):
    """N2 or H2, where there is a product beside the exchange."""

    def quantity(call):
        if not call.given(name):
            return None
        size = columns(call, name, flag) if flag else call.shape(name)[1]
        return f"{name} with shape {call.shape(name)}", size

    return quantity


def _shown(call, name):
    return f"{name} with shape {call.shape(name)}"


def _experts(call):
    return call.shape("gmm_weight")[0]


_QUANTITIES = {
    "local_experts": lambda call: (_shown(call, "gmm_weight"), _experts(call)),
    "experts_by_ranks": lambda call: (_shown(call, "gmm_weight"), _experts(call) * call["ep_world_size"]),
    "rows": lambda call: ("the counts", token_rows(call)),
    "h1": lambda call: (_shown(call, "gmm_x"), call.shape("gmm_x")[1]),
    "n1": lambda call: (_shown(call, "gmm_weight"), columns(call, "gmm_weight", "trans_gmm_weight")),
    "h2": _of_mm("mm_x", None),
    "n2": _of_mm("mm_weight", "trans_mm_weight"),
    "rows_per_token": _rows_per_token,
    "row_remainder": _row_remainder,
    "least_bytes_per_peer": _bytes_per_peer(min),
    "most_bytes_per_peer": _bytes_per_peer(max),
}
ARRAYS = ("gmm_x", "gmm_weight", "send_counts_tensor", "recv_counts_tensor", "mm_x", "mm_weight")
_PLAIN = (Rule("same_dtype", "14.4", _same_dtype, DTYPE),)


def fused_operator(own_dtypes, after, arrays, needs, flags) -> Operator:
    """One of the four: ``own_dtypes`` are its rules on dtypes, ``after`` those that follow the relations all share."""
    return Operator(
        arrays=arrays,
        needs=needs,
        group="group",
        flags=flags,
        free=(*_LISTS, "y_dtype"),
        shapes={
            "gmm_x": lambda call: ((None, None),),
            "gmm_weight": _weight_shape("gmm_x", "trans_gmm_weight", (None,)),
            "mm_x": lambda call: ((None, None),),
            "mm_weight": _weight_shape("mm_x", "trans_mm_weight", ()),
        },
        quantities=_QUANTITIES,
        rules=(
            Rule("mm_pair", "14.4", _mm_pair, NULL),
            group_size_rule("group", "ep_world_size", "14.1"),
            Rule("count_tensors", "14.1", _count_tensors, NULL),
            *own_dtypes,
            Rule("counts_given", "14.4", _counts_given, DTYPE),
            Rule("transpose_without_mm", "14.4", _transpose_without_mm),
            Rule("counts_length", "14.4", _counts_length),
            Rule("counts_sign", "14.4", _counts_sign),
            Rule("counts_sum", "14.4", _counts_sum),
            Rule("tables_agree", "14.1", _tables_agree),
            *after,
        ),
    )


NEEDS = ("gmm_x", "gmm_weight", "group", "ep_world_size")
FLAGS = ("trans_gmm_weight", "trans_mm_weight")

GROUPED_MATMUL_ALL_TO_ALLV = fused_operator(_PLAIN, (), ARRAYS, NEEDS, FLAGS)
ALL_TO_ALLV_GROUPED_MATMUL = fused_operator(_PLAIN, (), ARRAYS, NEEDS, (*FLAGS, "permute_out_flag"))
