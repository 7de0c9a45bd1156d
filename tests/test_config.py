"""Configuration files: what they mean, and one clear error for everything that can be wrong in them."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.config import (
    BalanceConfig,
    Config,
    MeshConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    load_config,
    override,
    parse_mesh,
)
from moe_jax.errors import ConfigError, InvalidArgumentError

CONFIGS = Path(__file__).parent.parent / "configs"
MOE = "[moe]\nnum_experts = 8\ntop_k = 2\nffn = 16\n"
MODEL = "[model]\nlayers = 1\nhidden = 8\nheads = 2\nseq_len = 8\n"
TRAIN = "[train]\nsteps = 40\nbatch_size = 8\n"


def load_text(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return load_config(path)


def test_values_and_defaults(tmp_path):
    config = load_text(tmp_path, MOE + MODEL + TRAIN + "learning_rate = 1\n[mesh]\nep = 4\ntp = 2\n")
    assert config.mesh == MeshConfig(ep=4, tp=2, nodes=1, dp=1)
    assert config.moe == MoEConfig(num_experts=8, top_k=2, ffn=16)
    assert config.router == RouterConfig()
    assert config.train == TrainConfig(steps=40, batch_size=8, learning_rate=1.0)
    assert config.balance is None and config.num_slots == 8 and config.parameters["num_logical_experts"] is None
    assert type(config.train.learning_rate) is float
    assert hash(config) == hash(load_text(tmp_path, (tmp_path / "some.toml").read_text()))


def test_replicas_are_slots_beside_experts(tmp_path):
    config = load_text(tmp_path, MOE + "[mesh]\nep = 4\n[balance]\nnum_redundant = 4\nmax_moved = 3\n")
    assert config.balance == BalanceConfig(num_redundant=4, max_moved=3, every=50, decay=0.9, threshold=0.05)
    assert config.num_slots == 12 and config.parameters["num_logical_experts"] == 8


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_shipped_configs_load(name):
    config = load_config(CONFIGS / f"{name}.toml")
    assert (config.train is not None) == (name == "tiny")


def test_deepseek_preset():
    config = load_config(CONFIGS / "deepseek_v3.toml")
    assert (config.moe.num_experts, config.moe.top_k, config.moe.ffn, config.model.hidden) == (256, 8, 2048, 7168)
    assert config.router == RouterConfig(score="sigmoid", selection_bias=True, num_groups=8, top_groups=4, scale=2.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MOE + "[mash]\nep = 4", ["unknown section 'mash'", "did you mean 'mesh'?"]),
        (MOE + "topk = 2", ["[moe]", "unknown key 'topk'", "did you mean 'top_k'?"]),
        ("[mesh]\nep = 4", ["section 'moe' is missing"]),
        ("[moe]\nnum_experts = 8\nffn = 4", ["[moe]", "key 'top_k' is missing"]),
        (MOE.replace("8", '"8"'), ["num_experts='8' is a str", "expected int"]),
        (MOE + "balance_loss = true", ["balance_loss=True is a bool", "expected float"]),
        (MOE.replace("8", "8.0"), ["num_experts=8.0 is a float"]),
        (MOE + "capacity_factor = -1", ["capacity_factor=-1.0 must be finite and above zero"]),
        (MOE + "z_loss = nan", ["z_loss=nan must be finite"]),
        (MOE + "sequence_balance_loss = -1", ["sequence_balance_loss=-1.0 must be finite and not below zero"]),
        (MOE + "activation = 'swigul'", ["activation='swigul' is unknown", "did you mean 'swiglu'?"]),
        (MOE + "num_shared_experts = 1\nshared_activation = 'swigul'", ["shared_activation='swigul' is unknown"]),
        (
            MOE + "shared_ffn = 4\ngated_shared = true",
            ["shared_ffn, gated_shared of a layer with num_shared_experts=0"],
        ),
        (MOE + "num_shared_experts = 1\nshared_ffn = -1", ["shared_ffn=-1 must be finite and above zero"]),
        (MOE + "transport = 'paded'", ["did you mean 'padded'?"]),
        (MOE + "overflow = 'spill'", ["overflow='spill' is unknown", "known: drop, dropless"]),
        (MOE.replace("top_k = 2", "top_k = 9"), ["top_k=9 exceeds num_experts=8"]),
        (
            MOE.replace("top_k = 2", "top_k = 11") + "num_zero_experts = 1\nnum_copy_experts = 1",
            ["top_k=11 exceeds num_experts=8 and 2 without weights; lower top_k"],
        ),
        (MOE + "num_copy_experts = -1", ["num_copy_experts=-1 must be finite and not below zero"]),
        (
            MOE + "num_copy_experts = 1\n[router]\nnum_groups = 2",
            ["router.num_groups=2 does not divide moe.num_experts=8 and 1 without weights, 9 in all"],
        ),
        ("moe = 3", ["'moe' is a single value", "[moe]"]),
        (MOE + "[router]\nscore = 'softmx'", ["did you mean 'softmax'?"]),
        (MOE + "[router]\nnum_groups = 2\ntop_groups = 3", ["top_groups=3 exceeds num_groups=2"]),
        (MOE + "[router]\nscale = inf", ["scale=inf must be finite"]),
        (MOE + "[router]\nnum_groups = 3", ["router.num_groups=3 does not divide moe.num_experts=8"]),
        (MOE + "[router]\nnum_groups = 8\ntop_groups = 1", ["moe.top_k=2 exceeds 1", "router.top_groups=1"]),
        (MOE + "[mesh]\nep = 0", ["ep=0 must be finite and above zero"]),
        (MOE + "[mesh]\nep = 4\nnodes = 3", ["ep=4 must be a multiple of nodes=3"]),
        (MOE + "[balance]\nnum_redundent = 4", ["[balance]", "did you mean 'num_redundant'?"]),
        (MOE + "[balance]\nevery = 0", ["every=0 must be finite and above zero"]),
        (MOE + "[balance]\nmax_moved = 0", ["max_moved=0 must be finite and above zero"]),
        (MOE + "[balance]\nnum_redundant = -1", ["num_redundant=-1 must be finite and not below zero"]),
        (MOE + "[balance]\ndecay = 1", ["decay=1.0 must be at least 0 and below 1"]),
        (MOE + "[balance]\nthreshold = -0.1", ["threshold=-0.1 must be at least 0 and below 1"]),
        (MOE + "[balance]\nmode = 'tokens'", ["mode='tokens' is unknown", "did you mean 'token'?"]),
        (
            MOE + "[balance]\nnum_redundant = 2\n[mesh]\nep = 4",
            ["num_experts=8", "num_redundant=2 are 10 slots, not a multiple of mesh.ep=4", "add 2 to num_redundant"],
        ),
        (MOE + TRAIN, ["[train] needs a [model] section"]),
        (MOE + MODEL + TRAIN + "[mesh]\nep = 3", ["train.batch_size=8 must be a multiple of the 3 devices"]),
        (MOE + MODEL.replace("heads = 2", "heads = 8") + TRAIN, ["model.hidden=8 must be a multiple of"]),
        (MOE + MODEL + "vocab = 300\n" + TRAIN, ["model.vocab=300 must be 256"]),
        (MOE + MODEL + TRAIN + "dtype = 'float16'", ["dtype='float16' is unknown", "bfloat16"]),
        (MOE + MODEL + TRAIN + "warmup_steps = 40", ["warmup_steps=40 must be below steps=40"]),
        (MOE + MODEL + TRAIN + "seed = -1", ["seed=-1 must be at least 0"]),
        (MOE + MODEL + TRAIN + "grad_clip = 0", ["grad_clip=0.0 must be above zero"]),
        (
            MOE + MODEL + TRAIN + "save_seconds = 0",
            ["save_seconds=0.0 must be above zero; use inf to save nothing by time"],
        ),
        (MOE + MODEL + TRAIN + "final_rate = -0.5", ["final_rate=-0.5 must be finite and not below zero"]),
        ("[moe", ["is not valid TOML"]),
    ],
)
def test_bad_files(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    for word in ["some.toml", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "binary.toml")


def test_all_violations_are_listed():
    with pytest.raises(InvalidArgumentError) as caught:
        RouterConfig(score="cosine", scale=-1.0, num_groups=0)
    assert all(word in str(caught.value) for word in ("3 problems", "score=", "scale=", "num_groups="))


def test_router_is_static():
    assert RouterConfig(scale=2) == RouterConfig(scale=2.0)
    assert len({RouterConfig(), RouterConfig(), RouterConfig(scale=2.0)}) == 2
    with pytest.raises(TypeError):
        RouterConfig("softmax")


@pytest.mark.parametrize(
    ("asked", "bias", "resolved"), [("auto", True, "top2"), ("auto", False, "max"), ("max", True, "max")]
)
def test_group_score(asked, bias, resolved):
    assert RouterConfig(group_score=asked, selection_bias=bias).resolved_group_score == resolved


def test_emulating_fewer_devices_keeps_the_larger_number():
    """In a process of its own: the number is fixed by the first device query."""
    program = "import jax, moe_jax as m; m.emulate_devices(3); m.emulate_devices(2); print(len(jax.devices()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_parse_mesh():
    assert parse_mesh("ep=4,tp=2") == MeshConfig(ep=4, tp=2)
    assert parse_mesh(" dp = 2 , ep=8,nodes=2").num_devices == 16


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("epp=4", "did you mean 'ep'?"),
        ("node=2", "did you mean 'nodes'?"),
        ("", "names the axis ''"),
        ("ep", "gives ep the extent ''"),
        ("ep=x", "gives ep the extent 'x'"),
        ("ep=0", "gives ep the extent '0'"),
        ("ep=2.0", "gives ep the extent '2.0'"),
        ("ep=2,ep=4", "'ep' twice"),
        ("ep=4,nodes=3", "ep=4 must be a multiple of nodes=3"),
    ],
)
def test_bad_mesh(text, word):
    with pytest.raises(ConfigError) as caught:
        parse_mesh(text)
    assert word in str(caught.value)


def test_override_checks_again():
    config = load_config(CONFIGS / "tiny.toml")
    assert override(config, train={"seed": 7}).train.seed == 7
    with pytest.raises(InvalidArgumentError, match="seed=-1"):
        override(config, train={"seed": -1})
