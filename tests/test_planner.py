"""`plan` and `sweep`: what they print, what they refuse, and a sweep that goes on where it was."""

import dataclasses
import json
import re
import types
from pathlib import Path

import jax
import pytest

import moe_jax as moe
from moe_jax.config import MeshConfig, MoEConfig, load_config
from moe_jax.errors import CompilationError, DataError, InvalidArgumentError
from moe_jax.hardware import MACHINES
from moe_jax.tools.cli import main
from moe_jax.tools.planner import compiled, figures, here, picture, screen, sweep, words
from moe_jax.tools.planner.meshes import MIN_WIDTH, mesh_words, on_nodes, read_mesh, resized, sensible_meshes
from moe_jax.tools.planner.question import Terms, ask
from moe_jax.tools.planner.rows import RowsFile
from moe_jax.tools.train.model import build_decoder

ROOT = Path(__file__).parent.parent
TINY, DEEPSEEK = (str(ROOT / "configs" / f"{name}.toml") for name in ("tiny", "deepseek_v3"))
MESHES = ("--mesh", "ep=8,dp=8", "--mesh", "ep=64", "--mesh", "ep=32,tp=2")
PHASES = (figures.FORWARD, figures.BOTH)
H100, V5P = MACHINES["h100"], MACHINES["v5p"]


def question(mesh: str, hardware: str = "h100", path: str = DEEPSEEK, **terms):
    machine = MACHINES[hardware]
    return ask(load_config(path), path, machine, read_mesh(mesh, machine), Terms(**terms))


# Meshes.


@pytest.mark.parametrize(
    ("text", "machine", "nodes"),
    [
        ("ep=64", H100, 8),
        ("ep=32,tp=2", H100, 8),
        ("ep=64,dp=4", H100, 8),
        ("ep=8,dp=8", H100, 1),
        ("ep=4", H100, 1),
        ("ep=12", H100, 1),  # no whole number of nodes
        ("ep=64,nodes=4", H100, 4),  # as asked
        ("ep=64,nodes=1", H100, 1),
        ("ep=64", V5P, 1),  # all of one slice
    ],
)
def test_nodes_are_the_machines_where_nobody_says(text, machine, nodes):
    assert read_mesh(text, machine).nodes == nodes


def test_sensible_meshes_are_all_that_divide():
    layer = MoEConfig(num_experts=24, top_k=2, ffn=1024)
    found = sensible_meshes(48, layer, H100)
    assert len(found) == len(set(found)) and all(mesh.num_devices == 48 for mesh in found)
    for mesh in found:
        assert layer.num_experts % mesh.ep == 0 and layer.ffn % mesh.tp == 0
        assert mesh.tp == 1 or (layer.ffn // mesh.tp >= MIN_WIDTH and 8 % mesh.tp == 0)  # 8 to a node
        assert mesh == on_nodes(dataclasses.replace(mesh, nodes=1), H100)
    # By hand: ep of 24, 12, 8, 6, 4, 3, 2, 1 and tp of 1, 2, 4, 8, whose product divides 48.
    pairs = {(mesh.ep, mesh.tp) for mesh in found}
    assert pairs == {(ep, tp) for ep in (24, 12, 8, 6, 4, 3, 2, 1) for tp in (1, 2, 4, 8) if 48 % (ep * tp) == 0}
    narrow = sensible_meshes(48, MoEConfig(num_experts=24, top_k=2, ffn=2 * MIN_WIDTH), H100)
    assert {mesh.tp for mesh in narrow} == {1, 2}


def test_a_mesh_in_words_is_a_mesh():
    for mesh in (MeshConfig(), MeshConfig(ep=8, tp=2, nodes=4, dp=3)):
        assert read_mesh(mesh_words(mesh), V5P) == mesh


# The screen.


def test_numbers_in_words():
    assert [words.size(n) for n in (0, 1, 999, 1000, 12_345, 123_456_789, 5.25e12)] == [
        "0 B", "1 B", "999 B", "1.00 kB", "12.3 kB", "123 MB", "5.25 TB",
    ]  # fmt: skip
    assert [words.milliseconds(s) for s in (0, 1e-6, 0.00123, 0.0123, 0.123, 12.3)] == [
        "0", "0.001", "1.23", "12.3", "123", "12,300",
    ]  # fmt: skip
    assert words.error(100, 110) == "+10.0 %" and words.error(0, 110) == "-"
    assert (words.less(75, 100), words.less(103, 100)) == ("25 % less", "3.0 % more")
    assert [words.many(n, noun) for n, noun in ((1, "mesh"), (2, "mesh"), (1, "layer"), (1200, "token"))] == [
        "1 mesh", "2 meshes", "1 layer", "1,200 tokens",
    ]  # fmt: skip


def test_the_screen_says_what_decides(capsys):
    arguments = ["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100", "--tokens", "4096"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    found = figures.predict(question("ep=64", tokens=4096))
    for name in ("machine", "mesh", "transport", "memory of a device", "largest moment", "speed", "between nodes"):
        assert name in text
    assert "64 x h100, 8 to a node" in text and "ep=64,nodes=8: 4 experts per rank; 4096 tokens per device" in text
    for phase in PHASES:
        assert words.milliseconds(found["time"][phase]["seconds"]) in text
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 120


def test_the_bound_is_the_link_that_decides():
    """A native ragged exchange reaches 2 % of NVLink, so that rows inside a node may take longer than all others."""
    path = str(ROOT / "configs" / "gpt_oss_120b.toml")
    asked = question("ep=32", path=path)
    assert asked.plan().transport == "ragged"
    dispatch = figures.predict(asked)["time"][figures.FORWARD]["phases"]["dispatch"]
    inside = dispatch["inside_bytes"] / H100.inside.bytes_per_second
    between = dispatch["between_bytes"] / H100.between.bytes_per_second
    assert inside < between < inside / H100.ragged_share
    assert dispatch["bound"] == "wire in node"
    whole = dataclasses.replace(asked, machine=dataclasses.replace(H100, ragged_share=1.0))
    assert figures.predict(whole)["time"][figures.FORWARD]["phases"]["dispatch"]["bound"] == "wire between nodes"


@pytest.mark.parametrize(
    ("name", "mesh", "hardware", "terms"),
    [
        ("qwen3_30b_a3b", "ep=1,tp=4,dp=2", "h100", {"tokens": 4096}),
        ("mixtral_8x7b", "ep=2,dp=4", "v7x", {"tokens": 4096}),
        ("mixtral_8x7b", "ep=1,tp=8", "v5e", {}),
        ("deepseek_v3", "ep=1,tp=2,dp=4", "a3", {"tokens": 16384, "layers": 1}),
    ],
)
def test_the_smallest_change_is_what_a_plan_with_it_says(name, mesh, hardware, terms):
    """The plan is made anew: the best transport may be another one then, which holds other memory."""
    asked = question(mesh, hardware, str(ROOT / "configs" / f"{name}.toml"), **terms)
    change = figures.predict(asked)["memory"]["all"]["smallest_change"]
    remat, key, value, size = re.fullmatch(
        r"it fits with (remat=True)?(?: and )?(\w+)?=?(\S+)?: (\S+) GB", change
    ).groups()
    changed = dataclasses.replace(asked, terms=dataclasses.replace(asked.terms, remat=remat is not None))
    if key in ("ep", "tp"):
        extents = {"ep": asked.mesh.ep, "tp": asked.mesh.tp, "dp": asked.mesh.dp, key: int(value)}
        text = ",".join(f"{axis}={extent}" for axis, extent in extents.items())
        config = dataclasses.replace(changed.config, mesh=read_mesh(text, asked.machine))
        changed = dataclasses.replace(changed, config=config)
    elif key == "tokens_per_rank":
        changed = dataclasses.replace(changed, terms=dataclasses.replace(changed.terms, tokens=int(value)))
    else:
        assert key is None, f"{key} is not asked for here"
    memory = figures.predict(changed)["memory"]["all"]
    assert memory["fits"] and f"{memory['peak'] / 1e9:.2f}" == size


def test_nodes_follow_a_change_unless_they_were_asked_for():
    changes = {("ep=8", "ep"): 8, ("ep=8,nodes=2", "ep"): 2, ("ep=8", "tp"): 8, ("ep=4", "ep"): 8}
    for (text, axis), nodes in changes.items():
        assert resized(read_mesh(text, H100), H100, **{axis: 64 if axis == "ep" else 8}).nodes == nodes


def test_the_plan_follows_the_machine_and_the_replicas(capsys):
    """A machine's name makes its plan, wherever it is made; replicas have their gradients summed."""

    def plan(*options):
        assert main(["plan", DEEPSEEK, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    alone, replicated = (plan("--mesh", f"ep=8,dp={dp}", "--hardware", "h100") for dp in (1, 4))
    assert alone["platform"] == "gpu" and alone["hardware"]["name"] == "h100"
    assert replicated["time"][figures.BOTH]["seconds"] > alone["time"][figures.BOTH]["seconds"]
    assert replicated["cost"][figures.BOTH]["wire_bytes"] > 2 * alone["cost"][figures.BOTH]["wire_bytes"]
    assert plan("--mesh", "ep=8", "--hardware", "v5p")["platform"] == "tpu"


def test_a_quantised_wire_is_compared_with_one_that_is_not(capsys):
    assert main(["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100", "--quant", "int8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("saves")]
    assert len(lines) == 2 and all("% less" in line for line in lines)
    assert main(["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100"]) == 0
    assert "saves" not in capsys.readouterr().out


def test_json_has_all_that_the_screen_has(capsys):
    arguments = ["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100", "--json"]
    assert main([*arguments, "--quant", "int8", "--describe"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["unquantised"] == figures.predict(question("ep=64"))["time"]
    assert values["unquantised"][figures.FORWARD]["seconds"] > values["time"][figures.FORWARD]["seconds"]
    assert values["description"] == question("ep=64", quant="int8").plan().describe(ffn=2048)
    assert main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["unquantised"] is values["description"] is values["compiled"] is None


def test_where_nothing_is_trained_the_forward_pass_counts(capsys, folder):
    arguments = [DEEPSEEK, "--hardware", "h100", "--optimizer", "none"]
    assert main(["plan", *arguments, "--mesh", "ep=64"]) == 0
    text = capsys.readouterr().out
    found = figures.predict(question("ep=64", optimizer="none"))
    assert "with backward" not in text and "through 1 layer, forward," in text
    assert found["tokens_per_second"] == pytest.approx(512 / found["time"]["forward"]["seconds"])
    assert found["memory"]["all"]["gradients"] == found["memory"]["all"]["optimizer"] == 0
    assert main(["sweep", *arguments, *MESHES]) == 0
    table, ranking = capsys.readouterr().out.split("\n\n")[1:3]
    assert all(line.split()[6] == "-" for line in table.splitlines()[1:])
    assert f"ep=64,nodes=8: {words.milliseconds(found['time']['forward']['seconds'])} ms" in ranking


def test_describe_is_below_the_screen(capsys):
    arguments = ["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100", "--tokens-per-rank", "64"]
    assert main([*arguments, "--describe"]) == 0
    text = capsys.readouterr().out
    asked = question("ep=64", tokens=64)
    assert text.endswith("\n\n" + asked.plan().describe(ffn=2048, activation="swiglu") + "\n")


# The compiler, a fake one: what a true one says is in tests/test_targets.py and tests/test_compiled_facts.py.


def fake_target(machine, num_devices):
    return types.SimpleNamespace(name=f"{machine.name}:{num_devices}", compiler="a fake")


def told(found: dict, factor: float = 1.0) -> dict:
    """What a compiler would say that agrees with the estimates, times ``factor``."""
    return {
        phase: {
            "target": "h100:64",
            "compiler": "a fake",
            "flops": factor * time["flops"],
            "traffic_bytes": factor * time["traffic_bytes"],
            "wire_bytes": factor * time["wire_bytes"],
            "argument_bytes": 1,
            "output_bytes": 1,
            "temporary_bytes": 1,
            "memory_bytes": 3,
            "cycles": None,
            "compile_seconds": 0.5,
        }
        for phase, time in found["time"].items()
    }


def test_the_compilers_figures_stand_beside_the_estimates(capsys, monkeypatch):
    asked = question("ep=64")
    monkeypatch.setattr(screen, "find_compiler", fake_target)
    monkeypatch.setattr(screen, "compile_layer", lambda question, target: told(figures.predict(question), 0.8))
    arguments = ["plan", DEEPSEEK, "--mesh", "ep=64", "--hardware", "h100", "--compile"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "h100:64: a fake" in text and text.count("+25.0 %") >= 6
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["compiled"] == told(figures.predict(asked), 0.8)


def test_a_builder_for_the_compiler_makes_the_layer_of_the_question():
    asked = question("ep=4,tp=2", "cpu", TINY, tokens=16)
    devices = list(moe.make_mesh(ep=8).devices.flat)
    for phase, count in (("forward", 2), ("forward + backward", 3)):
        fn, arguments = compiled.build(devices, asked, phase)
        assert callable(fn) and len(arguments) == count
        params, x, *_ = arguments
        assert x.shape == (8 * 16, 128) and x.dtype == "float32"
        assert params["w_gate"].shape == (8, 128, 256) and params["w_gate"].dtype == "float32"
        assert all(a.sharding.mesh.shape == {"ep": 4, "tp": 2} for a in (x, params["w_gate"]))


def test_what_cannot_be_compiled_is_refused_before_anything_is_printed(capsys, monkeypatch):
    arguments = ["plan", DEEPSEEK, "--mesh", "ep=64", "--compile", "--hardware"]
    assert main([*arguments, "mi300x"]) == 2
    output, text = capsys.readouterr()
    assert output == "" and "no compiler is known for hardware='mi300x'" in text and "leave --compile out" in text
    monkeypatch.setattr("moe_jax.targets.target.find_spec", lambda name: None)
    assert main([*arguments, "h100"]) == 2
    output, text = capsys.readouterr()
    assert output == "" and "pip install 'moe_jax[aot-gpu]'" in text
    assert main(["sweep", DEEPSEEK, *MESHES, "--hardware", "v5p", "--compile"]) == 2
    output, text = capsys.readouterr()
    assert output == "" and "pip install 'moe_jax[aot-tpu]'" in text


def test_a_layer_that_does_not_fit_is_not_compiled(capsys, monkeypatch, folder):
    """It is refused with the smallest change that would do, before the compiler is asked and anything is printed."""
    monkeypatch.setattr(screen, "find_compiler", fake_target)
    monkeypatch.setattr(sweep, "find_compiler", fake_target)
    options = ["--hardware", "h100", "--tokens", "262144", "--compile"]
    assert main(["plan", DEEPSEEK, "--mesh", "ep=64", *options]) == 2
    output, text = capsys.readouterr()
    assert output == "" and "one of h100 has" in text and "it fits with" in text
    assert main(["sweep", DEEPSEEK, "--mesh", "ep=64", *options]) == 0
    assert re.search(
        r"^ep=64,nodes=8 +compiled .* one of h100 has .* it fits with", capsys.readouterr().out, re.MULTILINE
    )


COMPILED_FOR = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("v5e", marks=[pytest.mark.compilers, pytest.mark.slow]),
    pytest.param("h100", marks=[pytest.mark.compilers, pytest.mark.slow]),
]


SMALL = """
[moe]
num_experts = 16
top_k = 2
ffn = 1024
[model]
layers = 1
hidden = 512
heads = 4
seq_len = 512
"""


@pytest.mark.parametrize("hardware", COMPILED_FOR)
def test_estimates_beside_the_true_compiler(hardware, capsys, folder):
    """Bytes that leave a device are counts (compilers may fill up the smallest ones); memory agrees nearly."""
    (folder / "small.toml").write_text(SMALL)
    assert main(["plan", "small.toml", "--mesh", "ep=8", "--hardware", hardware, "--compile", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    for phase in PHASES:
        found, program = values["compiled"][phase], values["memory"]["one"]["programs"][phase]
        assert found["wire_bytes"] == pytest.approx(values["time"][phase]["wire_bytes"], rel=0.001)
        assert found["argument_bytes"] == pytest.approx(program["arguments"], rel=0.01)
        # All of so small a layer has room in the fast memory of a v5e, where its compiler keeps further copies.
        assert found["memory_bytes"] == pytest.approx(sum(program.values()), rel=0.4 if hardware == "v5e" else 0.15)


# The sweep.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own to sweep in, where nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "draw", lambda path, *others: f"drew {path}")
    return tmp_path


def rows_of(folder, name="deepseek_v3"):
    return [json.loads(line) for line in (folder / "sweeps" / name / "sweep.jsonl").read_text().splitlines()]


def test_a_sweep_ranks_and_leaves_a_picture(folder, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "draw", picture.draw)
    assert main(["sweep", DEEPSEEK, *MESHES, "--hardware", "h100"]) == 0
    text = capsys.readouterr().out
    rows = rows_of(folder)
    assert [row["mesh"] for row in rows] == ["ep=8,dp=8", "ep=64,nodes=8", "ep=32,nodes=8,tp=2"]
    assert [row["source"] for row in rows] == ["predicted"] * 3
    places = [text.index(f"\n{row['mesh']}") for row in rows]
    assert places == sorted(places)
    ranking = re.findall(r"^ +\d+\. (\S+): ", text, re.MULTILINE)
    speed = {row["mesh"]: row["found"]["tokens_per_second"] for row in rows}
    assert ranking == sorted(speed, key=lambda mesh: -speed[mesh])  # no mesh fits, or all do
    assert len({row["found"]["memory"]["all"]["fits"] for row in rows}) == 1
    assert (folder / "sweeps" / "deepseek_v3" / "sweep.png").stat().st_size > 10_000


@pytest.mark.slow
def test_all_meshes_of_so_many_devices(folder, capsys):
    assert main(["sweep", DEEPSEEK, "--devices", "16", "--hardware", "h100", "--json"]) == 0
    *rows, ranking = map(json.loads, capsys.readouterr().out.splitlines())
    machine, layer = MACHINES["h100"], load_config(DEEPSEEK).moe
    assert [row["mesh"] for row in rows] == [mesh_words(mesh) for mesh in sensible_meshes(16, layer, machine)]
    assert ranking["event"] == "ranking" and sorted(ranking["meshes"]) == sorted(row["mesh"] for row in rows)


def test_what_fits_comes_before_what_is_faster(folder, capsys, monkeypatch):
    def only_with_tp(question):
        found = figures.predict(question)
        found["memory"]["all"]["fits"] = question.mesh.tp > 1
        return found

    monkeypatch.setattr(sweep, "predict", only_with_tp)
    assert main(["sweep", DEEPSEEK, "--mesh", "ep=64", "--mesh", "ep=32,tp=2", "--hardware", "h100", "--json"]) == 0
    *rows, ranking = map(json.loads, capsys.readouterr().out.splitlines())
    slower, faster = sorted(rows, key=lambda row: row["found"]["tokens_per_second"])
    assert ranking["meshes"] == [slower["mesh"], faster["mesh"]] == ["ep=32,nodes=8,tp=2", "ep=64,nodes=8"]


@pytest.mark.slow
def test_a_mesh_is_tried_once(folder, capsys):
    arguments = [
        "sweep",
        DEEPSEEK,
        "--hardware",
        "h100",
        "--mesh",
        "ep=16",
        "--mesh",
        "ep=16,nodes=2",
        "--devices",
        "16",
    ]
    assert main(arguments) == 0
    meshes = [row["mesh"] for row in rows_of(folder)]
    assert meshes[0] == "ep=16,nodes=2" and len(meshes) == len(set(meshes))


def test_an_interrupted_sweep_goes_on(folder, capsys, monkeypatch):
    """Rows that are there are not done again, but those of another question are; half a line is dropped with a word."""
    calls = []

    def counted(question):
        calls.append(mesh_words(question.mesh))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return figures.predict(question)

    monkeypatch.setattr(sweep, "predict", counted)
    arguments = ["sweep", DEEPSEEK, *MESHES, "--hardware", "h100"]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err and len(rows_of(folder)) == 2
    path = folder / "sweeps" / "deepseek_v3" / "sweep.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "row", "mesh": "ep=32')
    calls.clear()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert calls == ["ep=32,nodes=8,tp=2"] and "half a line" in text
    assert [row["mesh"] for row in rows_of(folder)] == ["ep=8,dp=8", "ep=64,nodes=8", "ep=32,nodes=8,tp=2"]
    assert path.read_bytes().startswith(whole)
    calls.clear()
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert calls == [] and "half a line" not in again
    assert again[again.index("\n\n") :] == text[text.index("\n\n") :]  # the same table and the same ranking
    assert main([*arguments, "--tokens", "64"]) == 130  # the third call: another question is asked anew
    assert len(rows_of(folder)) == 5


def test_a_file_that_is_no_sweep_is_refused(folder, capsys):
    path = folder / "sweeps" / "deepseek_v3" / "sweep.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    assert main(["sweep", DEEPSEEK, *MESHES, "--hardware", "h100"]) == 2
    assert "sweep.jsonl: line 1 is not a row of a sweep" in capsys.readouterr().err
    assert path.read_text() == "{}\n"


def test_a_row_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = RowsFile(tmp_path / "sweep.jsonl")
    file.add({"source": "predicted", "asked": {"n": 1}, "found": {}})

    def full(file, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_jax.tools.planner.rows.append_line", full)
    with pytest.raises(DataError, match=r"sweep.jsonl: cannot be written \(No space left on device\); make room"):
        file.add({"source": "predicted", "asked": {"n": 2}, "found": {}})
    file.close()
    again = RowsFile(tmp_path / "sweep.jsonl")
    assert again.find("predicted", {"n": 1}) and not again.find("predicted", {"n": 2}) and not again.torn


@pytest.mark.slow
def test_compiled_and_run_rows_are_marked(folder, capsys, monkeypatch):
    """The best ones are compiled first where meshes are many; a refusal is a row, which is done again the next time."""
    seen = []

    def compile_layer(question, target):
        seen.append((mesh_words(question.mesh), target.name))
        if question.mesh.tp == 2:
            raise CompilationError("the compiler refuses it\nat length")
        return told(figures.predict(question))

    monkeypatch.setattr(sweep, "find_compiler", fake_target)
    monkeypatch.setattr(sweep, "compile_layer", compile_layer)
    arguments = ["sweep", DEEPSEEK, *MESHES, "--hardware", "h100", "--compile"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert [mesh for mesh, _ in seen] == ["ep=8,dp=8", "ep=64,nodes=8", "ep=32,nodes=8,tp=2"]
    assert re.search(r"^ep=64,nodes=8 +compiled ", text, re.MULTILINE)
    assert re.search(r"^ep=32,nodes=8,tp=2 +compiled +the compiler refuses it$", text, re.MULTILINE)
    seen.clear()
    assert main(arguments) == 0
    assert [mesh for mesh, _ in seen] == ["ep=32,nodes=8,tp=2"]
    seen.clear()
    capsys.readouterr()
    assert main(["sweep", DEEPSEEK, "--devices", "16", "--hardware", "h100", "--compile", "--top", "2", "--json"]) == 0
    *_, ranking = map(json.loads, capsys.readouterr().out.splitlines())
    assert [mesh for mesh, _ in seen] == ranking["meshes"][:2] and seen[0][1] == "h100:16"


def test_a_sweep_runs_where_the_mesh_fits(folder, capsys, monkeypatch):
    seconds = {
        phase: {"seconds": n, "all_seconds": [n], "device_kind": "cpu"} for phase, n in zip(PHASES, (1, 3), strict=True)
    }
    monkeypatch.setattr(sweep, "time_layer", lambda question: seconds)
    options = ["--mesh", "ep=2", "--mesh", "ep=8,dp=512", "--tokens", "64", "--hardware", "cpu", "--run"]
    assert main(["sweep", TINY, *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ep=2 +run .* 1,000 +3,000 .* 21\.3 ", text, re.MULTILINE)
    assert re.search(r"^ep=8,dp=512 +run +not run: the mesh has 4096 devices and \d+ are here$", text, re.MULTILINE)
    assert main(["sweep", TINY, *options[:-2], "h100", "--run"]) == 2
    assert "hardware='h100' is of another; leave --run out" in capsys.readouterr().err


def test_what_a_configuration_says_of_the_layer_is_in_all_that_it_costs(folder):
    """And in the program for a compiler, and in the model that is trained."""
    path = folder / "special.toml"
    keys = "num_shared_experts = 1\nshared_ffn = 96\nshared_activation = 'relu2'\ngated_shared = true\n"
    path.write_text(
        Path(TINY).read_text().replace("[moe]\n", f"[moe]\n{keys}expert_scale = true\nweigh_inputs = true\n")
    )
    asked = question("ep=2", "cpu", str(path))
    plan, shared = asked.plan(), {"shared_ffn": 96, "shared_activation": "relu2"}
    found = figures.predict(asked)
    assert (
        found["time"]["forward"]["flops"]
        == plan.cost(256, **shared)["forward"].flops
        != plan.cost(256)["forward"].flops
    )
    assert figures.memory_of(asked, plan, 1).weights == plan.memory(256, **shared).weights
    assert plan.describe(ffn=256, **shared) != plan.describe(ffn=256) and plan.describe(**shared) == plan.describe()
    apply, (params, x) = compiled.build(list(moe.make_mesh(ep=2).devices.flat), asked, "forward")
    assert params["shared_up"].shape == (128, 96) and {"shared_router", "expert_scale"} <= set(params)
    assert jax.eval_shape(apply, params, x)[0].shape == x.shape
    trained = build_decoder(load_config(path), moe.make_mesh(ep=2))
    paths = str(jax.tree_util.tree_flatten_with_path(jax.eval_shape(trained.init, jax.random.key(0)))[0])
    assert "shared_router" in paths and "expert_scale" in paths


def test_replicas_count_in_a_plan(tmp_path):
    """Weights and meshes are those of all slots, and the layer that is compiled has a table for its router."""
    path = tmp_path / "more.toml"
    path.write_text(Path(TINY).read_text() + "[balance]\nnum_redundant = 4\n")
    asked, plain = (question("ep=2", "cpu", str(name)) for name in (path, TINY))
    assert asked.plan().num_experts == 12 and plain.plan().num_experts == 8
    weights = [figures.memory_of(each, each.plan(), 1).weights for each in (asked, plain)]
    expert = 3 * 128 * 256 * 4
    assert weights[0] - weights[1] == pytest.approx(2 * expert, rel=0.01)  # two more on each rank
    apply, (params, x) = compiled.build(list(moe.make_mesh(ep=2).devices.flat), asked, "forward")
    assert params["w_up"].shape[0] == 12 and params["router"].shape == (128, 8)
    y, stats = jax.eval_shape(apply, params, x)
    assert y.shape == x.shape and stats.load.shape == (8,)
    config = load_config(path)
    found = {mesh.ep for mesh in sensible_meshes(12, config.moe, H100, config.num_slots)}
    assert found == {1, 2, 3, 4, 6, 12}
    with pytest.raises(InvalidArgumentError, match="12 slots, not a multiple of mesh.ep=8"):
        question("ep=8", "cpu", str(path))


@pytest.mark.slow
def test_a_layer_is_timed_here():
    asked = question("ep=1", "cpu", TINY, tokens=8)
    found = here.time_layer(asked)
    assert list(found) == list(PHASES)
    for times in found.values():
        assert len(times["all_seconds"]) == here.REPEATS and min(times["all_seconds"]) <= times["seconds"] > 0


def test_what_others_published_stands_beside_predictions(capsys):
    assert main(["plan", "--published", "--json"]) == 0
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert {"published_exchange", "published_gather", "published_model"} == set(events) and len(events) > 150


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", DEEPSEEK, "--hardware", "h10"], "hardware='h10' is no known machine; did you mean 'h100'?"),
        (["plan", DEEPSEEK, "--hardware", "mine.toml"], "mine.toml: cannot be read"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--mesh", "ep=48"], "num_experts=256 is not divisible by ep=48"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--mesh", "ep=64,tp=3"], "ffn=2048 must be divisible by tp=3"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--tokens", "-1"], "tokens_per_rank=-1"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--quant", "int9"], "quant='int9' is unknown"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--layers", "0"], "layers=0 must be a whole number of at least 1"),
        (["plan", DEEPSEEK, "--hardware", "h100", "--optimizer", "adm"], "optimizer='adm' is unknown"),
        (["plan"], "the following arguments are required: CONFIG"),
        (["plan", DEEPSEEK, "--published"], "CONFIG does not go with --published"),
        (["plan", "--published", "--mesh", "ep=8"], "--mesh does not go with --published"),
        (["sweep", DEEPSEEK, "--hardware", "h100"], "sweep has no mesh"),
        (["sweep", DEEPSEEK, "--hardware", "h10", "--mesh", "ep=8"], "hardware='h10' is no known machine"),
        (["sweep", DEEPSEEK, "--hardware", "h100", "--mesh", "ep=8", "--mesh", "ep=5"], "not divisible by ep=5"),
        (["sweep", DEEPSEEK, "--hardware", "h100", "--mesh", "ep=8,tp=3"], "ffn=2048 must be divisible by tp=3"),
        (
            ["sweep", DEEPSEEK, "--hardware", "h100", "--devices", "0"],
            "--devices=0 must be a whole number of at least 1",
        ),
        (["sweep", DEEPSEEK, "--hardware", "h100", "--devices", "8", "--top", "0"], "--top=0 must be"),
        (["sweep", DEEPSEEK, "--hardware", "h100", "--mesh", "ep=8", "--out", TINY], "sweep.jsonl: cannot be"),
    ],
)
def test_bad_input(arguments, sentence, capsys, folder):
    assert main(arguments) == 2
    output, text = capsys.readouterr()
    assert output == "" and text.startswith("moe_jax: error: ") and sentence in text
    assert text.count("\n") == 1 and not list(folder.iterdir())
