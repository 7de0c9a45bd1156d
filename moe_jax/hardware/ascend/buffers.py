"""Sizes that follow from a call's numbers: rows that a rank may receive, and what HCCL_BUFFSIZE must hold.

Source: sections 2.3 and 8 of the CANN sheet. Every formula here is the document's where it has one.
"""

import dataclasses

MB = 1024 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of one exchange call, with the names that CANN gives them.

    Attributes:
      tokens: B, of this rank.
      hidden: H.
      top_k: K.
      ep_world_size: W.
      moe_expert_num: E.
      shared_expert_num: Ns.
      shared_expert_rank_num: S.
      tp_world_size: T.
      global_bs: the attribute of CANN; 0 stands for W times `tokens`.
    """

    tokens: int
    hidden: int
    top_k: int
    ep_world_size: int
    moe_expert_num: int
    shared_expert_num: int = 0
    shared_expert_rank_num: int = 0
    tp_world_size: int = 0
    global_bs: int = 0

    @property
    def local_experts(self) -> int:
        """L of a rank with routed experts: E / (W - S)."""
        return self.moe_expert_num // (self.ep_world_size - self.shared_expert_rank_num)

    @property
    def max_tokens(self) -> int:
        """Bmax, the most tokens of any rank."""
        return self.global_bs // self.ep_world_size if self.global_bs else self.tokens

    @property
    def capacity(self) -> int:
        """A, the rows that every rank can receive, whatever its role: Bmax * W * min(L, K).

        A rank with a shared expert receives no more: Bmax * ceil(W / P) rows, with P ranks per shared expert.
        """
        return self.max_tokens * self.ep_world_size * min(self.local_experts, self.top_k)


def align(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple of ``multiple``."""
    return -(-value // multiple) * multiple


def align_480_512(value: int) -> int:
    """Bytes of 512-byte blocks of which 480 carry payload."""
    return -(-value // 480) * 512


def megabytes(num_bytes: int) -> int:
    """The least HCCL_BUFFSIZE, in MB, that holds ``num_bytes``."""
    return -(-num_bytes // MB)


def fullmesh_v1(sizes: Sizes) -> int:
    """What A3 needs with commAlg "" and "fullmesh_v1". With TP there are two domains with a buffer each."""
    return max(_windows(sizes, align(_slot(sizes, 64), 512)), _tp_domain(sizes))


def fullmesh_v2(sizes: Sizes) -> int:
    """What A3 needs with commAlg "fullmesh_v2", whose status flags are inside the blocks."""
    return _windows(sizes, align_480_512(_slot(sizes, 64)))


def hierarchy_a3(sizes: Sizes) -> int:
    """What A3 needs with commAlg "hierarchy"."""
    row = 2 * sizes.hidden + 3 * align(sizes.top_k, 8) * 4 + 64
    return sizes.moe_expert_num * sizes.max_tokens * row + 404 * MB


def fullmesh_a2(sizes: Sizes) -> int:
    """What A2 needs with commAlg "" and "fullmesh"."""
    rows = sizes.tokens * sizes.ep_world_size * min(sizes.local_experts, sizes.top_k)
    return 2 * (rows * sizes.hidden * 2 + 2 * MB)


def hierarchy_a2(sizes: Sizes) -> int:
    """What A2 needs with commAlg "hierarchy"."""
    row = 2 * sizes.hidden + 4 * align(sizes.top_k, 8) * 4
    return sizes.moe_expert_num * sizes.tokens * row + 104 * MB


def fullmesh_a5(sizes: Sizes) -> int:
    """What A5 needs: as much as A3, and a status area."""
    return _windows(sizes, align(_slot(sizes, 64), 512)) + sizes.ep_world_size * 1024


def add_rms_norm(sizes: Sizes) -> int:
    """What A3 needs for combine with RMSNorm: MB * (BUFF - 2) / 2 >= B * 2 * (H + 128) * (W * L + K + 1)."""
    rows = sizes.ep_world_size * sizes.local_experts + sizes.top_k + 1
    return 2 * (sizes.tokens * 2 * (sizes.hidden + 128) * rows) + 2 * MB


def _slot(sizes, status):
    """Bytes of one row in its slot, before the slot's own alignment."""
    return align(2 * sizes.hidden, 32) + status


def _windows(sizes, slot):
    """Two halves, each with the rows of dispatch and those that combine returns."""
    arriving = sizes.local_experts * sizes.max_tokens * sizes.ep_world_size * slot
    returning = (sizes.top_k + sizes.shared_expert_num) * sizes.max_tokens * align(2 * sizes.hidden, 512)
    return 2 * (arriving + returning)


def _tp_domain(sizes):
    """The buffer of the tensor-parallel domain; 0 without one."""
    if sizes.tp_world_size != 2:
        return 0
    return 2 * sizes.capacity * (align(_slot(sizes, 44), 512) + align(2 * sizes.hidden, 512))
