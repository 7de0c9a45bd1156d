"""The numbers of a call, and its workspace: the bytes per rank of the rows that it sends and receives.

What counts is the buffers of the exchange, and what lies between the exchange and the products: rows with their scales,
the three integers that name each row's source, and the counts of both sides. The caller's arrays are not counted. The
letters are those of ``rules_exchange`` and ``rules_grouped``.
"""

import math

import jax.numpy as jnp
import numpy as np

from moe_jax.aclnn.rules import Call, dtype_name
from moe_jax.hardware.ascend import Sizes

_INT = 4
_SOURCE = 3 * _INT  # rank, token and choice of a row
_COMPUTE_FIRST = ("grouped_mat_mul_allto_allv", "quant_grouped_mat_mul_allto_allv")


def tokens(call: Call) -> int:
    """B."""
    return call.shape("expert_ids")[0]


def hidden(call: Call) -> int:
    """H. Packed e2m1 numbers have two columns per byte."""
    name = "x" if "x" in call.arrays else "expand_x"
    return call.shape(name)[1] * (2 if call.dtype(name) == "uint8" else 1)


def sizes(call: Call) -> Sizes:
    """The numbers of an exchange whose relations have been checked."""
    return Sizes(
        tokens=tokens(call),
        hidden=hidden(call),
        top_k=call.shape("expert_ids")[1],
        ep_world_size=call["ep_world_size"],
        moe_expert_num=call["moe_expert_num"],
        shared_expert_num=call["shared_expert_num"],
        shared_expert_rank_num=call["shared_expert_rank_num"],
        tp_world_size=call["tp_world_size"],
        global_bs=call["global_bs"],
    )


def counts(call: Call, name: str) -> np.ndarray:
    """A count list of a fused operator as [1 or R, R * e] i64: a row for each rank that is known."""
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
    """N1 or N2: the columns of a weight, transposed or not."""
    return call.shape(name)[-2 if call[flag] else -1]


def _size(width: int, dtype: str) -> int:
    """Bytes of ``width`` values; e2m1 values share a byte in pairs."""
    return width // 2 if dtype == "float4_e2m1fn" else width * jnp.dtype(dtype).itemsize


def _exponents(width: int) -> int:
    """Bytes of the exponents of blocks of 32, of which there is an even number."""
    return 2 * -(-width // 64)


def dispatch_row(call: Call) -> int:
    """The bytes of one row on the wire of dispatch: its values, its scales, its source and its weight."""
    mode, width = call["quant_mode"], hidden(call)
    y_dtype = dtype_name("y_dtype", call["y_dtype"]) or "int8"  # the default of every mode has one byte per value
    if mode == 0:
        values = _size(call.shape("x")[1], call.dtype("x"))
        scales = _size(call.shape("scales")[1], call.dtype("scales")) if call.given("scales") else 0
    else:
        values = width // 2 if y_dtype == "uint8" else _size(width, y_dtype)
        scales = {1: 0, 2: 4, 3: 4 * -(-width // 128)}.get(mode, _exponents(width))
    return values + scales + _SOURCE + (4 if call.given("expert_scales") else 0)


def combine_row(call: Call) -> int:
    """The bytes of one row on the wire of combine: its values, and its scales where it is quantised."""
    mode, width, dtype = call["comm_quant_mode"], hidden(call), call.dtype("expand_x")
    if mode == 0:
        return _size(width, dtype)
    return width + (_size(-(-width // 8), dtype) if mode == 2 else _exponents(width))


def _pairs(call: Call) -> int:
    """How many pairs of this rank's tokens may travel."""
    n = sizes(call)
    return n.tokens * (n.top_k + (n.shared_expert_num if n.shared_expert_rank_num else 0))


def dispatch(call: Call) -> int:
    """Dispatch: the rows sent, those that both tp ranks receive, and the counts of both sides and of experts (i64)."""
    n = sizes(call)
    copies = max(n.tp_world_size, 1)
    rows = _pairs(call) + n.capacity * copies
    counts = n.ep_world_size * n.local_experts
    return rows * dispatch_row(call) + (counts + counts * copies) * _INT + n.local_experts * 8


def combine(call: Call) -> int:
    """Combine: the rows sent back and received, the source of each row that is sent, and the counts."""
    rows = call.shape("expand_x")[0]
    counts = math.prod(call.shape("ep_send_counts"))
    return (rows + _pairs(call)) * combine_row(call) + rows * _SOURCE + counts * _INT


def add_rms_norm(call: Call) -> int:
    """Combine with add and RMSNorm: what combine takes, and the fp32 sums before they are rounded."""
    return combine(call) + call.shape("expert_ids")[0] * hidden(call) * 4


def update_expert(call: Call) -> int:
    """Update expert: the ids, and with pruning the mask and the sum of weights of each token."""
    tokens, top_k = call.shape("expert_ids")
    pruning = tokens * (top_k + 4) if call.given("pruning_threshold") else 0
    return tokens * top_k * jnp.dtype(call.dtype("expert_ids")).itemsize + pruning


def barrier(call: Call) -> int:
    """A barrier: a flag to each rank, and one from each."""
    return 2 * call["world_size"] * _INT


def buffer_reset(call: Call) -> int:
    """A buffer reset: the cleared window, and the flags of a barrier where the ranks wait for each other."""
    window = _size(math.prod(call.shape("window")), call.dtype("window"))
    return window + (2 * call["ep_world_size"] * _INT if call["need_sync"] else 0)


def _count_lists(call: Call) -> int:
    return 2 * call["ep_world_size"] * call.shape("gmm_weight")[0] * _INT


def compute_then_send(call: Call) -> int:
    """A product before its exchange: its rows by expert, the same rows by destination, and the rows received."""
    dtype = dtype_name("y_dtype", call.attributes.get("y_dtype")) or call.dtype("gmm_x")
    row = _size(columns(call, "gmm_weight", "trans_gmm_weight"), dtype)
    return (2 * expert_rows(call) + token_rows(call)) * row + _count_lists(call)


def send_then_compute(call: Call) -> int:
    """A product after its exchange: the rows sent, the rows received, and these by expert, with scales if any."""
    width = call.shape("gmm_x")[1]
    row = _size(width, call.dtype("gmm_x")) + (_exponents(width) if call.attributes.get("gmm_x_quant_mode") == 6 else 0)
    return (token_rows(call) + 2 * expert_rows(call)) * row + _count_lists(call)
