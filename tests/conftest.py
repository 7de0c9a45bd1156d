"""Eight emulated devices for every test, and the same generated cases on every run. Real ones for ``-m gpu``."""

import hypothesis
import jax
import pytest

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


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU and JAX runs on {jax.default_backend()}; on a machine with one, run pytest -m gpu")


hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs():
    """A compiled program holds memory mappings while it is cached, and Linux allows a process 65530 of them."""
    yield
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
