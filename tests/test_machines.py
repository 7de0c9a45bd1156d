"""Machines as data: every figure has a source, and a file of one's own gets one clear error for all that is wrong."""

import dataclasses
import pickle

import pytest

from moe_jax.errors import ConfigError, InvalidArgumentError
from moe_jax.hardware import GPUS, MACHINES, Link, Machine, Torus, find_machine, machine_of

OWN = """
[machine]
platform = "gpu"
flops16 = 100e12
flops32 = 10e12
memory_bytes = 80_000_000_000
memory_bandwidth = 2e12
launch_seconds = 0
inside = {bytes_per_second = 1e11, latency = 0}
"""


def read(tmp_path, text: str) -> Machine:
    path = tmp_path / "ours.toml"
    path.write_text(text)
    return find_machine(str(path))


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_of_a_machine_has_a_source(name):
    machine = find_machine(name)
    assert machine.name == name and machine is MACHINES[name]
    figures = [f.name for f in dataclasses.fields(Machine) if f.name not in ("name", "platform", "kinds", "sources")]
    figures.remove("inside")
    figures += ["inside.bytes_per_second", "inside.latency"]
    if machine.between:
        figures.remove("between")
        figures += ["between.bytes_per_second", "between.latency"]
    if machine.torus is None:
        figures.remove("torus")
    if machine.flops8 is None and name != "cpu":
        figures.remove("flops8")
    assert [figure for figure in figures if not machine.source_of(figure)] == []
    known = {*figures, "torus", "between", "devices_per_node"}
    assert [word for words, _ in machine.sources for word in words.split(", ") if word not in known] == []
    assert hash(machine) == hash(pickle.loads(pickle.dumps(machine)))  # static: a plan holds it


def test_figures_make_sense():
    for machine in MACHINES.values():
        assert machine.flops32 <= machine.flops16 and (machine.flops8 or machine.flops16) >= machine.flops16
        assert machine.inside.bytes_per_second < machine.memory_bandwidth
        assert 2**31 < machine.memory_bytes < 2**38
        if machine.between:
            assert machine.between.bytes_per_second < machine.inside.bytes_per_second
    for name, gpu in GPUS.items():  # a figure stands once
        assert MACHINES[name].memory_bytes == gpu.device_memory_size
        assert MACHINES[name].memory_bandwidth == gpu.memory_bandwidth


def test_devices_that_are_here():
    kinds = {
        ("gpu", "NVIDIA H100 80GB HBM3"): "h100", ("gpu", "NVIDIA H100 PCIe"): "h100", ("gpu", "NVIDIA GB200"): "gb200",
        ("gpu", "AMD Instinct MI300X"): "mi300x", ("gpu", "NVIDIA A100-SXM4-40GB"): "a100", ("tpu", "TPU v5"): "v5p",
        ("tpu", "TPU v5 lite"): "v5e", ("tpu", "TPU v6 lite"): "v6e", ("tpu", "TPU7x"): "v7x", ("tpu", "TPU v4"): "v5p",
        ("cpu", "cpu"): "cpu", ("cpu", "TFRT"): "cpu", ("npu", "Ascend910B"): "a2",
        ("cpu", "NVIDIA H200"): "cpu",  # the platform is what is known for sure
    }  # fmt: skip
    assert {key: machine_of(*key).name for key in kinds} == kinds
    with pytest.raises(InvalidArgumentError, match="platform='metal' is unknown.*known: cpu, gpu, npu, tpu"):
        machine_of("metal", "M1")


def test_an_all_to_all_on_a_torus_is_bounded_by_its_middle():
    torus = Torus(dimensions=2, wraps_from=16)
    # 256 chips of v5e: half of what 128 chips send passes 32 links of 50 GB/s one way; of its rows a chip keeps 1/256.
    sent, bisection = 1e9, 32 * 50e9
    seconds = 128 * (sent * 256 / 255) / 2 / bisection
    assert sent / seconds == pytest.approx(torus.all_to_all_share(256) * 200e9)
    # 8 chips in 2 x 2 x 2 without rings: 3 links each, and 12 steps to 7 others.
    assert Torus(dimensions=3, wraps_from=4).all_to_all_share(8) == pytest.approx(3 / 6 / (12 / 7))
    # Two chips share one link of four; two devices of one chip none.
    assert torus.all_to_all_share(2) == pytest.approx(1 / 4)
    assert Torus(dimensions=3, wraps_from=4, devices_per_chip=2).all_to_all_share(2) == 1
    shares = [MACHINES["v5p"].all_to_all_share(4**n) for n in range(1, 6)]
    assert all(0 < share <= 1 for share in shares) and min(shares) == shares[-1]
    assert MACHINES["h100"].all_to_all_share(8) == MACHINES["v5e"].all_to_all_share(1) == 1


def test_what_is_gathered_on_a_torus_is_bounded_by_its_corners():
    torus = Torus(dimensions=2, wraps_from=16)
    # 2 x 4 chips of v5e: a corner has two neighbours, and links for four; in 16 x 16 all are used.
    assert (torus.gather_share(8), torus.gather_share(256), torus.gather_share(2)) == (1 / 2, 1, 1 / 4)
    # 2 x 2 x 2 chips of v5p have three links of six; from 4 chips on a dimension is a ring.
    box = Torus(dimensions=3, wraps_from=4)
    assert (box.gather_share(8), box.gather_share(64), box.gather_share(16)) == (1 / 2, 1, (1 + 1 + 2) / 6)
    assert Torus(dimensions=3, wraps_from=4, devices_per_chip=2).gather_share(2) == 1
    assert MACHINES["h100"].gather_share(8) == MACHINES["v5e"].gather_share(1) == 1
    # A gather never reaches less than an all-to-all, whose bytes pass through other devices.
    for count in (2, 4, 8, 16, 64, 256):
        assert box.gather_share(count) >= box.all_to_all_share(count)


def test_a_machine_of_ones_own(tmp_path):
    machine = read(tmp_path, OWN)
    assert (machine.name, machine.platform, machine.flops8, machine.between) == ("ours", "gpu", None, None)
    assert machine.inside == Link(bytes_per_second=1e11, latency=0)
    assert machine.source_of("flops16") == str(tmp_path / "ours.toml") == machine.source_of("inside.latency")


def test_a_base_gives_the_rest(tmp_path):
    h100 = MACHINES["h100"]
    text = '[machine]\nbase = "h100"\nflops16 = 800e12\nflops8 = "none"\n[machine.between]\nlatency = 1e-6\n'
    machine = read(tmp_path, text + '[machine.sources]\nflops16 = "measured at 1.6 GHz"\n')
    assert machine.source_of("flops16") == "measured at 1.6 GHz"
    assert machine.source_of("flops32") == h100.source_of("flops32")
    assert machine.source_of("between.latency") == str(tmp_path / "ours.toml")
    assert machine.between == dataclasses.replace(h100.between, latency=1e-6)
    changed = {"name": "ours", "flops16": 800e12, "flops8": None, "between": machine.between}
    assert machine == dataclasses.replace(h100, **changed, sources=machine.sources)
    for said in ('between.latency = "measured"', '"between.latency" = "measured"'):
        assert read(tmp_path, f"{text}[machine.sources]\n{said}\n").source_of("between.latency") == "measured"
    alone = read(tmp_path, '[machine]\nbase = "h100"\nbetween = "none"\ndevices_per_node = "none"\nname = "box"')
    assert (alone.name, alone.between, alone.devices_per_node) == ("box", None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OWN + "flops_16 = 1\n", ["unknown key 'flops_16'", "did you mean 'flops16'?"]),
        (OWN.replace("memory_bandwidth", "#"), ["key 'memory_bandwidth' is missing; add it"]),
        (OWN.replace("2e12", '"2 TB/s"'), ["memory_bandwidth='2 TB/s' must be a finite number"]),
        (OWN.replace("2e12", "nan"), ["memory_bandwidth=nan must be a finite number"]),
        (OWN.replace("2e12", "true"), ["memory_bandwidth=True must be a finite number"]),
        (OWN.replace("100e12", "0"), ["flops16=0 must be above zero"]),
        (OWN.replace("1e11", "-1"), ["inside.bytes_per_second=-1 must be above zero"]),
        (OWN.replace("latency = 0", "latency = -1e-6"), ["inside.latency=-1e-06 must be zero or more"]),
        (OWN.replace(", latency = 0", ""), ["key 'inside.latency' is missing"]),
        (
            OWN.replace("latency", "lag"),
            ["unknown key 'inside.lag'", "known: bytes_per_second, latency", "key 'inside.latency' is missing"],
        ),
        (OWN.replace("{bytes_per_second = 1e11, latency = 0}", "1e11"), ["inside=", "write a table [machine.inside]"]),
        (OWN.replace("80_000_000_000", "80e9"), ["memory_bytes=80000000000.0 must be a whole number of at least 1"]),
        (OWN.replace('"gpu"', '"cuda"'), ["platform='cuda' is unknown", "known: cpu, gpu, npu, tpu"]),
        (OWN + "ragged_share = 2\n", ["ragged_share=2 is a share"]),
        (OWN + "widened = 'bfloat16'\n", ["widened='bfloat16' must be a tuple of words"]),
        (OWN + "devices_per_node = 8\n", ["between=None and devices_per_node=8 belong together"]),
        (OWN + "base = 'h10'\n", ["base='h10' is no known machine", "did you mean 'h100'?"]),
        (OWN + "base = 7\n", ["base=7 is no known machine"]),
        (OWN + "sources = 'me'\n", ["sources='me' must be a table"]),
        (OWN + "sources = {flops15 = 'me', flops16 = 3}\n", ["unknown key 'sources.flops15'", "sources.flops16=3"]),
        (OWN + "sources.inside.lag = 'me'\n", ["unknown key 'sources.inside.lag'", "did you mean"]),
        (OWN + "[machin]\n", ["unknown section 'machin'", "did you mean 'machine'?"]),
        (OWN.replace("[machine]", ""), ["section 'machine' is missing"]),
        ("[machine", ["is not valid TOML"]),
        # All that is wrong at once.
        (
            OWN.replace("100e12", "-1").replace("10e12", "'a'").replace("1e11", "0").replace("launch_", "lunch_"),
            [
                "5 problems",
                "flops16=-1",
                "flops32='a'",
                "inside.bytes_per_second=0",
                "'lunch_seconds'",
                "'launch_seconds'",
            ],
        ),
    ],
)
def test_one_error_for_all_that_is_wrong_in_a_file(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "ours.toml") in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_names_that_are_none(tmp_path):
    with pytest.raises(InvalidArgumentError, match="hardware='h10' is no known machine; did you mean 'h100'?.*toml"):
        find_machine("h10")
    with pytest.raises(InvalidArgumentError, match="hardware=None is neither a name nor a path"):
        find_machine(None)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_machine(tmp_path / "none.toml")
    with pytest.raises(InvalidArgumentError, match=r"Link: bytes_per_second=0 must be above zero"):
        Link(bytes_per_second=0, latency=0)
    with pytest.raises(InvalidArgumentError, match=r"Machine 'h100': 2 problems:\n  - flops16=-1 .*\n  - inside=3"):
        dataclasses.replace(MACHINES["h100"], flops16=-1, inside=3)
