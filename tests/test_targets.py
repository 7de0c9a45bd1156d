"""Compiling for hardware that is not here. What needs the compilers for TPU and GPU is slow, or skipped without."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import target_programs
from helpers import mesh_of, needs
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat
from moe_jax import mesh as mesh_module
from moe_jax.errors import CompilationError, InvalidArgumentError, MeshError, UnsupportedError
from moe_jax.hardware import GPUS
from moe_jax.targets import target as target_module
from moe_jax.targets.compile import _job_of_function
from moe_jax.targets.target import find_target, name_target

ALONE = ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1"]
ELSEWHERE = ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "a100:8", "h100:8", "h200:8", "b200:8", "gb200:8"]
ROWS, WIDTH = 64, 128


def on_mesh(mesh, *shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("ep")))


def exchange_over(mesh):
    def shard(x):
        return lax.all_to_all(x, "ep", 0, 0, tiled=True)

    return _compat.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))


def test_a_function_over_a_mesh_with_trees_and_donation(monkeypatch, tmp_path):
    """One child process: bytes of an exchange, flops, aliases, and what a contract of the report says."""
    mesh = mesh_of(8, 1)

    def step(tree, w):
        with jax.named_scope("products"):
            y = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), tree["x"])
        return {"y": exchange_over(mesh)(y), "same": tree["kept"] + 1}

    tree = {name: on_mesh(mesh, 8 * ROWS, width) for name, width in (("x", WIDTH), ("kept", 2), ("unread", 5))}
    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32", sharding=NamedSharding(mesh, P()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = moe.compile_for("cpu:8", jax.jit(step, donate_argnums=0), tree, w)
    assert not list(tmp_path.iterdir())

    size = ROWS * WIDTH * 4
    assert report.flops == 3 * 2 * ROWS * WIDTH * WIDTH and not report.uncounted_loops
    assert report.num_devices == 8 and report.platform == "cpu" and report.cycles is None
    assert [(c.op, c.operand_bytes, c.wire_bytes) for c in report.collectives] == [("all-to-all", size, size * 7 // 8)]
    assert report.work.collective_bytes == size
    assert report.argument_bytes == size + ROWS * 2 * 4 + WIDTH * WIDTH * 4
    assert report.alias_bytes == size + ROWS * 2 * 4  # the results: both arguments of the tree are donated
    assert report.compile_seconds > 0

    values = json.loads(json.dumps(report.as_dict()))
    assert values["flops"] == report.flops and values["work"]["flops_by_op"] == {"dot": report.flops}
    assert "hlo" not in values
    text = str(report)
    assert text.startswith("cpu:8: 8 devices") and f"{report.flops:,} flops" in text and "1 x all-to-all inline" in text

    rules = {"collectives": {"all-to-all": 1, "all-gather": 0}, "no_float_scatter": True, "max_wire_bytes": size}
    assert moe.assert_hlo_contract(report, **rules, max_temporary_bytes=report.temporary_bytes) is report
    assert moe.assert_hlo_contract(report.hlo, **rules).wire_bytes == size * 7 // 8
    with pytest.raises(AssertionError, match="max_wire_bytes"):
        moe.assert_hlo_contract(report.hlo, max_wire_bytes=0)
    with pytest.raises(InvalidArgumentError, match="does not say what memory"):
        moe.assert_hlo_contract(report.hlo, max_temporary_bytes=1)
    with pytest.raises(InvalidArgumentError, match="takes none"):
        moe.assert_hlo_contract(report, jnp.ones(3))
    with pytest.raises(InvalidArgumentError, match="no entry computation"):
        moe.assert_hlo_contract("not a module")


def test_what_the_other_process_refuses_comes_back():
    with pytest.raises(CompilationError, match="MeshError: 2 devices are too few"):
        moe.compile_for("cpu:2", "target_programs:refused")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit axes", "shardings of the jit", "keys", "64 bits"])
def test_what_an_argument_may_be(kind):
    mesh = mesh_of(4, 2)
    x = jax.ShapeDtypeStruct((64, 32), "float32")
    if kind == "explicit axes":
        mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            report = moe.compile_for("cpu:8", lambda x: jax.sharding.reshard(x, P()), on_mesh(mesh, 64, 32))
        assert report.counts == {"all-gather": 1} and report.argument_bytes == 64 * 32 * 4 // 8
    elif kind == "shardings of the jit":
        here = NamedSharding(mesh, P("ep", "tp"))
        report = moe.compile_for("cpu:8", jax.jit(lambda x: x + 1, in_shardings=here, out_shardings=here), x)
        assert report.argument_bytes == 64 * 32 * 4 // 8 and not report.collectives
    elif kind == "keys":
        report = moe.compile_for("cpu:1", lambda key, x: jax.random.normal(key, x.shape), jax.random.key(0), x)
        assert report.argument_bytes == 8  # the key: of x nothing but the shape is read
    else:
        with jax.enable_x64(True):
            report = moe.compile_for("cpu:1", lambda x: x + 1, jax.ShapeDtypeStruct((4,), "float64"))
        assert report.argument_bytes == 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,text",
    [
        ("nothing", "a builder returns a function"),
        ("absent", "absent"),
        (":f", "does not name a builder"),
        ("__main__:f", "cannot import a script"),
    ],
)
def test_a_builder_that_is_none(name, text):
    with pytest.raises(moe.MoEError, match=text):
        moe.compile_for("cpu:2", name if ":" in name else f"target_programs:{name}")


def test_an_interrupt_ends_the_other_process_and_leaves_no_folder(monkeypatch):
    started = []
    wait = subprocess.Popen.wait

    def interrupted(self, *args, **kwargs):
        started.append(self)
        if len(started) == 1:
            raise KeyboardInterrupt
        return wait(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        moe.compile_for("cpu:1", "target_programs:slow")
    monkeypatch.undo()
    assert time.monotonic() - start < 30  # it was ended, not waited for
    assert started[0].returncode is not None and not os.path.exists(started[0].args[-1])


@pytest.mark.slow
def test_the_other_process_ends_with_its_caller():
    code = "import moe_jax; moe_jax.compile_for('cpu:1', 'target_programs:slow')"
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})

    def children():
        pids = (p for p in Path("/proc").iterdir() if p.name.isdigit())
        return [p for p in pids if "moe_jax_compile_" in _command(p) and "targets.child" in _command(p)]

    try:
        deadline = time.time() + 60
        while not (found := children()):
            assert time.time() < deadline
            time.sleep(0.1)
        time.sleep(5)  # past its imports
    finally:
        caller.kill()
        caller.wait()
    deadline = time.time() + 10
    while any(p.exists() for p in found):
        assert time.time() < deadline
        time.sleep(0.1)


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "name,text",
    [
        (
            "h10:8",
            "did you mean 'h100:8'.*known: a100:8, b200:8, cpu:8, gb200:8, h100:8, h200:8, v5e:2x4, v5p:2x2x2, v6e:2x4",
        ),
        ("h100", "lacks a number of devices; write it as in 'h100:8'"),
        ("h100:0", "lacks a number"),
        ("h100:12", "a multiple"),
        ("v5e:8", "lacks a topology; write it as in 'v5e:2x4'"),
        ("v5e:2x", "lacks a topology"),
        ("cpu:2x4", "lacks a number"),
        (8, "is unknown"),
    ],
)
def test_unknown_targets(name, text):
    with pytest.raises(InvalidArgumentError, match=text):
        moe.compile_for(name, jnp.sin, jnp.ones(3))


def test_targets_by_name():
    assert (find_target("v5p:4x4x8").num_devices, find_target("v5p:4x4x8").platform) == (128, "tpu")
    assert (
        find_target("v5e:1x1").topology["chips_per_host_bounds"] == (1, 1, 1)
        and find_target("v5p:1x1x2").num_devices == 2
    )
    assert find_target("h100:4").topology["topology"] == "1x1x4"
    assert find_target("h100:16").topology["topology"] == "1x2x8"
    assert find_target("cpu:3").num_devices == 3


def test_the_target_of_so_many_devices():
    """Each has as many devices as were asked for, on the topology that is most nearly square or a cube."""
    for kind, counts in (("v5e", (1, 2, 4, 8, 16, 32, 64, 128, 256)), ("v5p", (1, 2, 4, 8, 16, 64, 256, 512))):
        for count in counts:
            assert find_target(name_target(kind, count)).num_devices == count
    names = [name_target(*asked) for asked in (("v5e", 32), ("v5p", 4), ("v5p", 16), ("v5p", 256), ("cpu", 3))]
    assert names == ["v5e:4x8", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x8x8", "cpu:3"]
    for asked, text in {("v5e", 6): "a multiple of them", ("h100", 12): "a multiple", ("v5", 4): "v5p"}.items():
        with pytest.raises(InvalidArgumentError, match=text):
            name_target(*asked)


@pytest.mark.compilers
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_named_topologies_are_the_compilers(kind):
    """In a process of its own, since the compiler wants an environment of its own."""
    needs(name_target(kind, 4))
    names = [name_target(kind, count) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    program = (
        "from jax.experimental import topologies; from moe_jax.targets.target import find_target\n"
        f"for name in {names!r}:\n"
        "    target = find_target(name)\n"
        "    devices = topologies.get_topology_desc(platform='tpu', **target.topology).devices\n"
        "    assert len(devices) == target.num_devices, name\n"
    )
    environment = {**find_target(names[0]).environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("target,extra", [("v5e:2x4", "aot-tpu"), ("h100:8", "aot-gpu")])
def test_a_compiler_that_is_not_installed(monkeypatch, target, extra):
    monkeypatch.setattr(target_module, "_is_installed", lambda module: False)
    with pytest.raises(UnsupportedError) as caught:
        moe.compile_for(target, jnp.sin, jnp.ones(3))
    assert f"pip install 'moe_jax[{extra}]'" in str(caught.value) and "\n" not in str(caught.value)


def test_the_environment_is_the_childs_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_dump_to=x")
    before = dict(os.environ)
    gpu, cpu = find_target("h100:8").environment(), find_target("cpu:8").environment()
    assert gpu["CUDA_VISIBLE_DEVICES"] == "-1" and gpu["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_autotune_level=0"
    assert cpu["XLA_FLAGS"] == "--xla_dump_to=x" and cpu["JAX_NUM_CPU_DEVICES"] == "8"
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", GPUS)
def test_gpus_have_a_source_and_every_figure(name):
    gpu = GPUS[name]
    text = gpu.target_config()
    assert "xla/backends/gpu/target_config/specs/" in gpu.source and len(gpu.source.split()[-1]) == 40
    assert f"memory_bandwidth: {gpu.memory_bandwidth}" in text and f"core_count: {gpu.core_count}" in text
    assert text.count("{") == text.count("}") and "None" not in text


def test_bad_arguments():
    x = jnp.ones(3)
    with pytest.raises(InvalidArgumentError, match="neither a function nor"):
        moe.compile_for("cpu:1", 3, x)
    with pytest.raises(InvalidArgumentError, match="abstract_args hold 'word'"):
        moe.compile_for("cpu:1", jnp.sin, "word")
    with pytest.raises(InvalidArgumentError, match="cannot be pickled"):
        moe.compile_for("cpu:1", "target_programs:nothing", lambda: 0)
    with pytest.raises(MeshError, match="has 4 devices and fn is over a mesh of 8"):
        moe.compile_for("cpu:4", exchange_over(mesh_of(8, 1)), on_mesh(mesh_of(8, 1), 64, 2))
    with pytest.raises(CompilationError, match="cannot be lowered"):
        moe.compile_for("cpu:1", lambda x: jax.debug.callback(print, x) or x, x)


@pytest.mark.parametrize("platform_target", ["v5e:2x4", "h100:8"])
def test_functions_take_the_targets_branch(platform_target):
    """platform_dependent is decided by the target, before its compiler is asked."""

    def which(x):
        return lax.platform_dependent(x, cpu=jnp.sin, cuda=jnp.cos, tpu=jnp.tanh)

    job = _job_of_function(find_target(platform_target), which, (jnp.ones(3),))
    word = {"tpu": "tanh", "gpu": "cosine"}[find_target(platform_target).platform]
    module = job["exported"].mlir_module()
    assert word in module and "sine " not in module.replace("cosine ", "")


@pytest.mark.compilers
@pytest.mark.parametrize("target", ELSEWHERE)
def test_known_counts_elsewhere(target):
    needs(target)
    a, b = jax.ShapeDtypeStruct((512, 256), "bfloat16"), jax.ShapeDtypeStruct((256, 384), "bfloat16")
    report = moe.compile_for(target, lambda a, b: a @ b, a, b)
    assert report.flops == 2 * 512 * 384 * 256 and report.num_devices == 1
    assert (report.cycles is None) == (report.platform == "gpu") and (report.cycles or 1) > 0
    assert report.argument_bytes == 2 * (512 + 384) * 256

    mesh = mesh_of(8, 1)
    size = ROWS * WIDTH * 4
    for x in (on_mesh(mesh, 8 * ROWS, WIDTH), jax.ShapeDtypeStruct((8 * ROWS, WIDTH), "float32")):
        report = moe.compile_for(target, exchange_over(mesh), x)
        assert [(c.op, c.operand_bytes, c.group_size) for c in report.collectives] == [("all-to-all", size, 8)]
        assert report.wire_bytes == size * 7 // 8 and report.work.collective_bytes == size
        assert report.num_devices == 8 and report.argument_bytes == size


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
def test_ragged_products_as_the_compilers_make_them_today(target):
    """XLA:TPU has a kernel that multiplies each row once; XLA:GPU multiplies all rows with every group's matrix."""
    needs(target)
    rows, groups, k, n = 1024, 4, 512, 256
    arrays = [((rows, k), "bfloat16"), ((groups, k, n), "bfloat16"), ((groups,), "int32")]
    report = moe.compile_for(target, lax.ragged_dot, *(jax.ShapeDtypeStruct(*array) for array in arrays))
    once = 2 * rows * k * n
    assert report.flops == (once if report.platform == "tpu" else groups * once)
    assert any(kernel.name.startswith("ragged-dot") for kernel in report.kernels) == (report.platform == "tpu")


@pytest.mark.compilers
def test_kernels_of_pallas_elsewhere():
    """A kernel counts what it declares, under its own name; JAX's kernel for Hopper declares nothing."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows, groups, k, n = 1024, 4, 512, 256
    arrays = [((rows, k), "bfloat16"), ((groups, k, n), "bfloat16"), ((groups,), "int32")]
    args = [jax.ShapeDtypeStruct(*array) for array in arrays]
    needs("v5e:2x4")
    report = moe.compile_for("v5e:2x4", lambda a, b, sizes: gmm(a, b, sizes, preferred_element_type=jnp.float32), *args)
    (kernel,) = report.kernels
    assert (kernel.name, kernel.target, kernel.executions) == ("gmm", "tpu_custom_call", 1)
    assert kernel.flops == report.flops == 2 * rows * k * n and dict(report.work.unpriced)["gmm"] == 1

    needs("h100:8")
    blocks = {"block_m": 64, "block_n": 64, "block_k": 64, "max_concurrent_steps": 2, "grid_block_n": 2}

    def product(a, b, sizes):
        return ragged_dot_mgpu.ragged_dot(a, b, group_sizes=sizes, **blocks)

    report = moe.compile_for("h100:8", product, *args)
    (kernel,) = report.kernels
    assert (kernel.target, kernel.flops, report.flops) == ("mosaic_gpu_v2", None, 0) and not report.temporary_bytes


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
def test_loops_elsewhere(target):
    needs(target)
    square = jax.ShapeDtypeStruct((256, 256), "bfloat16")

    def step(x, w):
        with jax.named_scope("known"):
            x = lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)
        with jax.named_scope("unknown"):
            return lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x @ w + 1, x)

    report = moe.compile_for(target, step, square, square)
    assert (report.flops, report.loop_work.flops) == (5 * 2 * 256**3, 2 * 256**3)
    if report.platform == "tpu":
        assert report.cycles_by_scope["known"] % 5 == 0 and "unknown" in dict(report.loop_work.scope_cycles)


@pytest.mark.compilers
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
def test_the_layer_elsewhere(target, gradient):
    """A function of this process and a builder in the other give the same program."""
    needs(target)
    platform = find_target(target).platform
    fn, args = target_programs.layer(jax.devices(), gradient, backend=platform)
    here = moe.compile_for(target, fn, *args)
    built = moe.compile_for(target, "target_programs:layer", gradient)
    for name in ("flops", "cycles", "bytes_accessed", "temporary_bytes", "argument_bytes", "counts", "wire_bytes"):
        assert getattr(here, name) == getattr(built, name), name
    sizes, devices = target_programs.SIZES, 8
    routed = 3 * 2 * sizes["tokens_per_rank"] * sizes["top_k"] * sizes["hidden"] * target_programs.FFN
    assert here.flops >= routed * (3 if gradient else 1) and here.num_devices == devices
    assert here.counts["all-to-all"] >= (4 if gradient else 2) and not here.float_scatters


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["v5e:4x4", "h100:16"])
def test_an_abstract_mesh_larger_than_what_is_here(target):
    needs(target)
    mesh = AbstractMesh((16, 1), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)
    report = moe.compile_for(target, exchange_over(mesh), on_mesh(mesh, 16 * 32, WIDTH))
    assert [(c.op, c.operand_bytes, c.group_size) for c in report.collectives] == [("all-to-all", 32 * WIDTH * 4, 16)]


@pytest.mark.compilers
@pytest.mark.parametrize("target,text", [("v5e:3x5", "not divisible"), ("v5e:2x4", "memory")])
def test_what_a_compiler_refuses(target, text):
    """A topology that does not exist, and a program that does not fit into the chip's memory."""
    needs(target)
    huge = jax.ShapeDtypeStruct((2**17, 2**17), "float32")
    with pytest.raises(CompilationError, match=text):
        moe.compile_for(target, lambda x: x @ x, huge)


def test_a_compiler_alone_is_no_accelerator(monkeypatch):
    """With the extras installed, and no accelerator there, the command line still emulates devices."""
    installed = [SimpleNamespace(name=name) for name in ("jax_cuda12_plugin", "libtpu")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    monkeypatch.setattr(_compat, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(_compat, "config_value", lambda name: None)
    for there, expected in [((), False), (("/dev/nvidia*",), True), (("/dev/accel*",), True), (("/dev/kfd",), False)]:
        monkeypatch.setattr(mesh_module.glob, "glob", lambda pattern: [pattern] * (pattern in there))
        assert mesh_module.has_accelerator() is expected
