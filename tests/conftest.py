"""Eight emulated devices for every test, and the same generated cases on every run."""

import hypothesis
import jax
import pytest

import moe_jax

moe_jax.emulate_devices(8)  # before any test module can query a device

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs():
    """A compiled program holds memory mappings while it is cached, and Linux allows a process 65530 of them."""
    yield
    jax.clear_caches()
