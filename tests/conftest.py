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
