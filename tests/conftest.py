"""Eight emulated devices for every test, and the same generated cases on every run. Real ones for ``-m gpu``."""

import functools
import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src import compiler  # no public way to give every program a compiler option

import moe_jax


def pytest_configure(config):
    """Before any test module can query a device."""
    if config.option.markexpr != "gpu":
        moe_jax.emulate_devices(8)


def pytest_ignore_collect(collection_path, config):
    """For ``-m gpu``, files without such tests: some make meshes of eight devices while they are imported."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "pytest.mark.gpu" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The garbage collector, which JAX keeps busy, waits while files are imported, and looks at none of them again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU and JAX runs on {jax.default_backend()}; on a machine with one, run pytest -m gpu")


hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("default")


# Most of what tests cost is compilation, and most of that is spent on making machine code fast. Most laws are about
# values: small integers, whose sums are exact in any order, or a tolerance that says why. So machine code is not
# optimised. What XLA does before it makes machine code stays the same, and so does what a test may read in a compiled
# program. In the line that everybody runs, programs that are called are made by XLA's older emitters, where XLA still
# has them, in half the time. These want loops in place of scatters, so a program that ``lower().compile()`` makes,
# which a test may read, has the newer ones, which users have; and so have the slow tests. In the files below (on bits
# and roundings, on times and memory, on what other compilers make of a program) everything is compiled as users have
# it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 or 1 in the environment decides for all files instead: the step "newest" of
# .ci/run sets 0, so that CI runs the tests that everybody runs both ways.
OPTIMISED = {
    "test_bench",
    "test_bench_here",
    "test_bits",
    "test_compiled_facts",
    "test_gpu",
    "test_gpu_kernels",
    "test_kernels_compiled",
    "test_memory",
    "test_plan",
    "test_planner",
    "test_quant",
    "test_targets",
    "test_timing",
    "test_tpu_kernels",
    "test_window",  # the bits of NaN, which the older emitters change
}
OPTIMISE_LESS = "jax_disable_most_optimizations"
OLDER_EMITTERS = "xla_cpu_use_fusion_emitters"
DECIDED = OPTIMISE_LESS.upper() in os.environ
assert all(Path(__file__).with_name(f"{name}.py").exists() for name in OPTIMISED)


@functools.cache
def _has_older_emitters():
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={OLDER_EMITTERS: False})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def _take_older_emitters(patch):
    """For programs for CPUs that are called, but not for those that are compiled by ``jax.stages.Lowered.compile``."""
    newer, compile_lowered = compiler.get_compile_options, jax.stages.Lowered.compile

    def older(*args, env_options_overrides, backend, **options):
        if backend.platform == "cpu":
            env_options_overrides = {OLDER_EMITTERS: False, **env_options_overrides}
        return newer(*args, env_options_overrides=env_options_overrides, backend=backend, **options)

    def compile_to_read(lowered, *args, **options):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(compiler, "get_compile_options", newer)
            return compile_lowered(lowered, *args, **options)

    patch.setattr(compiler, "get_compile_options", older)
    patch.setattr(jax.stages.Lowered, "compile", compile_to_read)


@pytest.fixture(scope="module", autouse=True)
def _compile(request):
    """Decides how much the programs of a file are optimised, and forgets them after it.

    A compiled program holds memory mappings while it is cached, and Linux allows a process 65530 of them.
    """
    before = jax.config.read(OPTIMISE_LESS)
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in OPTIMISED and not DECIDED:
            jax.config.update(OPTIMISE_LESS, True)
            patch.setenv(OPTIMISE_LESS.upper(), "1")  # for the processes that a test starts
            if "not slow" in request.config.option.markexpr and _has_older_emitters():
                _take_older_emitters(patch)
        yield
    jax.config.update(OPTIMISE_LESS, before)
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
    """Of a test marked ``quick("id", ...)`` the default line runs the cases with these ids; the others are slow."""
    made = yield
    wanted = {case for mark in getattr(obj, "pytestmark", ()) if mark.name == "quick" for case in mark.args}
    if wanted and made:
        unknown = wanted - {item.callspec.id for item in made}
        if unknown:
            raise pytest.Collector.CollectError(
                f"{name} is marked quick for {sorted(unknown)}, which are no cases of it"
            )
        for item in made:
            if item.callspec.id not in wanted:
                item.add_marker(pytest.mark.slow)
    return made
