"""Generated cases for the operators of the CANN facade and their oracle: static configurations, and data for each.

Shapes depend on the configuration alone, so that a program compiled once serves many draws of data. Arrays over all
ranks start with [W], or with [W, 2] for two tp ranks, as in ``oracle``.
"""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
QUANT = [
    (1, "int8"), (2, "int8"), (2, "float8_e4m3fn"), (2, "float8_e5m2"), (3, "float8_e4m3fn"), (3, "float8_e5m2"),
    (4, "float8_e4m3fn"), (4, "float8_e5m2"), (4, "float4_e2m1fn"), (5, "float8_e4m3fn"), (5, "float8_e5m2"),
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One legal static configuration."""

    world: int  # W
    tp: int = 0  # tp_world_size
    tokens: int = 4  # B
    top_k: int = 2
    hidden: int = 8
    local_experts: int = 1  # L
    num_shared: int = 1  # Ns
    shared_ranks: int = 0  # S
    num_zero: int = 0
    num_copy: int = 0
    num_const: int = 0
    dtype: str = "bfloat16"
    quant_mode: int = 0
    y_dtype: str | None = None
    smooth: str | None = None  # scales: None, "experts" [E or Ns + E, H], and for mode 1 "one" [1] or "row" [H]
    comm_quant_mode: int = 0
    mask: str | None = None  # None, "tokens" [B] or "pairs" [B, K]
    elastic: bool = False
    global_bs: int = 0
    token_nums_type: int = 1
    expand_scales: bool = False  # dispatch gets expert_scales
    shared_x: str | None = None  # None, "2d" [B, H] or "3d" [B1, B2, H]
    alpha_ndim: int = 1
    norm: bool = False  # combine ends in the residual and RMSNorm
    nodes: int = 1

    @property
    def experts(self) -> int:
        """E."""
        return self.local_experts * (self.world - self.shared_ranks)

    @property
    def num_special(self) -> int:
        """The ids from E on."""
        return self.num_zero + self.num_copy + self.num_const

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of an array over all ranks."""
        return (self.world, 2) if self.tp == 2 else (self.world,)

    @property
    def capacity(self) -> int:
        """A: a rank that holds min(L, K) experts may get so many pairs of every token."""
        most = self.global_bs // self.world or self.tokens
        return most * self.world * min(self.local_experts, self.top_k)

    @property
    def common(self) -> dict:
        """The numbers that dispatch and combine both take."""
        return {
            "moe_expert_num": self.experts,
            "shared_expert_num": self.num_shared,
            "shared_expert_rank_num": self.shared_ranks,
            "tp_world_size": self.tp,
            "zero_expert_num": self.num_zero,
            "copy_expert_num": self.num_copy,
            "const_expert_num": self.num_const,
        }

    @property
    def dispatch(self) -> dict:
        """All keyword numbers of dispatch."""
        return self.common | {
            "quant_mode": self.quant_mode,
            "y_dtype": self.y_dtype,
            "global_bs": self.global_bs,
            "expert_token_nums_type": self.token_nums_type,
        }

    @property
    def combine(self) -> dict:
        """All keyword numbers of combine."""
        return self.common | {"comm_quant_mode": self.comm_quant_mode, "nodes": self.nodes}


def static_configs(rng: np.random.Generator, count: int) -> Iterator[Config]:
    """``count`` configurations; each feature appears about as often as the others allow."""
    for _ in range(count):
        yield _config(rng)


def data(rng: np.random.Generator, config: Config) -> dict[str, np.ndarray | None]:
    """One draw: the array arguments of both operators by name, None where the configuration has none.

    ``expand_x`` [.., A * P, H] stands for the outputs of the experts. Ids are distinct within a row. A third of the
    draws have whole numbers and weights that are multiples of 1/4: their sums are exact in any order.
    """
    kind = str(rng.choice(["whole", "normal", "mixed"]))
    elastic, num_experts = _elastic(rng, config) if config.elastic else (None, config.experts)
    tokens = (*config.lead, config.tokens)
    ids = expert_ids(rng, (*config.lead, config.tokens, config.top_k), num_experts, config.num_special)
    rows = (*config.lead, config.capacity * max(config.tp, 1))
    return {
        "x": numbers(rng, kind, (*tokens, config.hidden), config.dtype),
        "expert_ids": ids,
        "scales": _smoothing(rng, kind, config),
        "x_active_mask": _mask(rng, config),
        "expert_scales": _weights(rng, kind, ids.shape),
        "elastic_info": elastic,
        "expand_x": numbers(rng, kind, (*rows, config.hidden), config.dtype),
        "shared_expert_x": _shared_x(rng, kind, config),
        **_special(rng, kind, config),
        "residual_x": numbers(rng, kind, (*tokens, 1, config.hidden), config.dtype) if config.norm else None,
        "gamma": numbers(rng, kind, (*config.lead, config.hidden), config.dtype) if config.norm else None,
    }


def dispatch_arrays(config: Config, drawn: dict) -> dict:
    """The keyword arrays of dispatch, out of ``data``; x and expert_ids come first by position."""
    names = ["scales", "x_active_mask", "elastic_info"] + ["expert_scales"] * config.expand_scales
    return {name: drawn[name] for name in names}


def combine_arrays(drawn: dict) -> dict:
    """The keyword arrays of combine, out of ``data``."""
    names = ["x_active_mask", "shared_expert_x", "elastic_info", "ori_x"]
    return {name: drawn[name] for name in [*names, "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"]}


def numbers(rng: np.random.Generator, kind: str, shape: tuple, dtype: str) -> np.ndarray:
    """For "whole" integers of at most 4 in size; "normal"; for "mixed" magnitudes over octaves, and rows of zeros."""
    if kind == "whole":
        values = rng.integers(-4, 5, shape).astype(np.float32)
    else:
        values = rng.normal(size=shape)
    if kind == "mixed":
        octaves = 8 if dtype == "float16" else 20
        values = values * 2.0 ** rng.integers(-octaves, octaves // 2, (*shape[:-1], 1))
        values = values * 2.0 ** rng.integers(-4, 1, shape) * (rng.random((*shape[:-1], 1)) > 0.2)
    return values.astype(DTYPES[dtype])


def elastic_info(world: int, survivors: list[int], shared_ranks: int, num_experts: int) -> np.ndarray:
    """[4 + 2 * W] i32: the world in which logical rank i is the original rank ``survivors[i]``."""
    logical, physical = np.full(world, -1), np.full(world, -1)
    logical[survivors] = np.arange(len(survivors))
    physical[: len(survivors)] = survivors
    return np.array([1, len(survivors), shared_ranks, num_experts, *logical, *physical], np.int32)


def elastic_worlds(config) -> list[tuple[int, int, int]]:
    """The (W', S', E') to which a configuration may shrink."""
    worlds = []
    for size in range(1, config.world + 1):
        for shared in range(0, size, max(config.num_shared, 1)):
            experts = config.local_experts * (size - shared)
            keeps_shared = shared > 0 or config.shared_ranks == 0
            if keeps_shared and shared <= config.shared_ranks and experts <= config.experts:
                worlds += [(size, shared, experts)] * (experts + config.num_special >= config.top_k)
    return worlds


def _config(rng):
    tp = int(rng.choice([0, 1, 2], p=[0.6, 0.15, 0.25]))
    world = int(rng.choice([1, 2, 4, 4] if tp == 2 else [1, 2, 4, 4, 8, 8]))
    options = dict(zip(("num_shared", "shared_ranks"), shared_ranks(rng, world), strict=True))
    options["local_experts"] = 1 if tp == 2 else int(rng.integers(1, 4))
    if rng.random() < 0.4:
        options |= {name: int(rng.integers(0, 3)) for name in ("num_zero", "num_copy", "num_const")}
    options["alpha_ndim"] = int(rng.integers(1, 3))
    experts = options["local_experts"] * (world - options["shared_ranks"])
    specials = sum(options.get(name, 0) for name in ("num_zero", "num_copy", "num_const"))
    options["top_k"] = int(rng.integers(1, min(6, experts + specials) + 1))
    tokens = int(rng.integers(0, 7)) if rng.random() < 0.9 else 1
    if rng.random() < 0.3:
        options["global_bs"] = world * (tokens + int(rng.integers(0, 3)))
    options["mask"] = [None, "tokens", "pairs"][rng.integers(3)]
    options["elastic"] = bool(rng.random() < 0.3)
    options["token_nums_type"] = int(rng.integers(2))
    options["expand_scales"] = bool(rng.integers(2))
    if not options["shared_ranks"]:
        options["shared_x"] = [None, "2d", "3d"][rng.integers(3)]
    options |= _precision(rng, tp)
    config = Config(world=world, tp=tp, tokens=tokens, **options)
    return _over_nodes(rng, config) if rng.random() < 0.2 else config


def shared_ranks(rng: np.random.Generator, world: int) -> tuple[int, int]:
    """Ns and S: about half of the worlds have shared ranks."""
    legal = [(ns, s) for ns in range(1, 5) for s in range(ns, world, ns)]
    if not legal or rng.random() < 0.5:
        return int(rng.integers(2)), 0
    return legal[rng.integers(len(legal))]


def _precision(rng, tp):
    options = {"dtype": str(rng.choice(list(DTYPES))), "hidden": int(rng.choice([8, 16, 40, 136]))}
    if rng.random() < 0.5:
        options["quant_mode"], options["y_dtype"] = QUANT[rng.integers(len(QUANT))]
        if options["quant_mode"] == 1:
            options["smooth"] = str(rng.choice(["one", "row", "experts"]))
        elif options["quant_mode"] in (2, 3) and rng.random() < 0.6:
            options["smooth"] = "experts"
    if tp < 2 and rng.random() < 0.4:
        options["comm_quant_mode"] = int(rng.choice([2, 3, 4]))
    elif rng.random() < 0.3:
        options |= {"norm": True, "dtype": "bfloat16"}
    return options


def _over_nodes(rng, config):
    """The configuration with sums by node, whose weights are those that travelled."""
    if config.world < 2:
        return config
    nodes = int(rng.choice([n for n in (2, 4) if config.world % n == 0]))
    return dataclasses.replace(config, nodes=nodes, expand_scales=True)


def _elastic(rng, config):
    """A random shrunken world, or a table that is switched off; and the number of experts that are left."""
    worlds = elastic_worlds(config)
    if rng.random() < 0.2:
        noise = rng.integers(-1, config.world, 3 + 2 * config.world)
        return np.array([0, *noise], np.int32), config.experts
    size, shared, experts = worlds[rng.integers(len(worlds))]
    survivors = rng.permutation(config.world)[:size]
    if rng.random() < 0.5:
        survivors = np.sort(survivors)
    return elastic_info(config.world, survivors.tolist(), shared, experts), experts


def expert_ids(rng: np.random.Generator, shape: tuple, num_experts: int, num_special: int) -> np.ndarray:
    """[.., B, K] i32, distinct within a row; balanced, random, skewed, on few experts, or mostly special."""
    total, top_k = num_experts + num_special, shape[-1]
    pattern = str(rng.choice(["balanced", "random", "skewed", "few", "special"]))
    rows = int(np.prod(shape[:-1]))
    if pattern == "balanced":
        ids = (np.arange(rows)[:, None] * top_k + np.arange(top_k)) % total
        return ids.reshape(shape).astype(np.int32)
    favour = np.zeros(total)
    if pattern == "skewed":
        favour = -1.5 * np.log1p(rng.permutation(total))
    elif pattern == "few":
        favour[rng.permutation(total)[top_k:]] = -1e3
    elif pattern == "special":
        favour[:num_experts] = -2.0
    keys = favour + rng.gumbel(size=(rows, total))  # the largest: a draw without replacement, weighted by exp(favour)
    return np.argsort(-keys, axis=1)[:, :top_k].reshape(shape).astype(np.int32)


def _mask(rng, config):
    """All true, all false, or random by rank. A mask by tokens counts by its trues alone: some are no prefix."""
    if config.mask is None:
        return None
    shape = (*config.lead, config.tokens) + ((config.top_k,) if config.mask == "pairs" else ())
    share = rng.choice([0.0, 0.3, 0.7, 1.0], (*config.lead, *[1] * (len(shape) - len(config.lead))))
    if rng.random() < 0.3:
        share = np.full_like(share, rng.choice([0.0, 1.0]))
    mask = rng.random(shape) < share
    return -np.sort(-mask.astype(np.int8), axis=-1) > 0 if config.mask == "tokens" and rng.random() < 0.7 else mask


def _weights(rng, kind, shape):
    if kind == "whole":
        return (rng.integers(-4, 9, shape) / 4).astype(np.float32)
    return rng.uniform(0.0, 1.0, shape).astype(np.float32)


def _smoothing(rng, kind, config):
    if config.smooth is None:
        return None
    experts = config.experts + (config.num_shared if config.shared_ranks else 0)
    shape = {"one": (1,), "row": (config.hidden,), "experts": (experts, config.hidden)}[config.smooth]
    shape = (*config.lead, *shape)
    factors = (rng.integers(1, 5, shape) if kind == "whole" else rng.uniform(0.5, 20, shape)).astype(np.float32)
    if config.nodes > 1:  # the expert's rank applies them there, so they are the same on all ranks
        factors[:] = factors[(0,) * len(config.lead)]
    return factors


def _shared_x(rng, kind, config):
    if config.shared_x is None:
        return None
    split = {"2d": (config.tokens,), "3d": (2, config.tokens // 2) if config.tokens % 2 == 0 else (1, config.tokens)}
    return numbers(rng, kind, (*config.lead, *split[config.shared_x], config.hidden), config.dtype)


def _special(rng, kind, config):
    """ori_x and the arrays of const experts; every other draw has zero alphas, whose gate is exactly 1/2."""
    arrays = dict.fromkeys(["ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"])
    if config.num_copy or config.num_const:
        arrays["ori_x"] = numbers(rng, kind, (*config.lead, config.tokens, config.hidden), config.dtype)
    if config.num_const:
        shape = (*config.lead, config.num_const, config.hidden)
        arrays["const_expert_v"] = numbers(rng, kind, shape, config.dtype)
        factor = (1.0 if kind == "whole" and config.alpha_ndim == 1 else 0.25) * rng.integers(2)
        for name in ("const_expert_alpha_1", "const_expert_alpha_2"):
            drawn = numbers(rng, "whole", shape[:-1] if config.alpha_ndim == 1 else shape, config.dtype)
            arrays[name] = (drawn.astype(np.float32) * factor).astype(drawn.dtype)
    return arrays
