"""The conformance kit: tests that an author of a back end runs in the test suite of their own package.

A file such as ``tests/test_mine.py`` of that package needs a few lines::

    import moe_jax.testing

    class TestMine(moe_jax.testing.BackendConformance):
        backend = "mine"

pytest then runs every law that applies: see ``moe_jax.verify.backend``, where the laws stand. Importing this module
needs pytest, which nothing else of the package does.
"""

from typing import Any, ClassVar

from moe_jax.errors import UnsupportedError
from moe_jax.kernels import FLOAT_DTYPES
from moe_jax.verify.backend import dtypes_of, hold

try:
    import pytest
except ModuleNotFoundError as error:
    if error.name != "pytest":
        raise
    raise UnsupportedError("moe_jax.testing needs pytest, which is not installed; run: pip install pytest") from None

__all__ = ["BackendConformance"]


class BackendConformance:
    """The laws of a back end, one test each. Derive a class whose name begins with ``Test``.

    A law that does not apply is skipped: kernels that the back end does not bring, platforms that it does not list, and
    what its entry says that it does not promise (``Backend.unpromised``). A test that fails names the law and every
    case that is off. Have several devices, or emulate them (``moe_jax.emulate_devices(4)`` in ``conftest.py``), so that
    ``shard_map`` and exchanges have something to do.

    Attributes:
      backend: its name: registered, or offered by an installed package by the entry-point group "moe_jax.backends".
      dtypes: those that it serves; laws that look at one dtype take the first.
      platforms: what to lower for, as JAX names it: "cpu", "cuda", "rocm", "tpu"; None: the platforms that it lists.
    """

    backend: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = FLOAT_DTYPES
    platforms: ClassVar[tuple[str, ...] | None] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Gives each law the dtypes that it is held with."""
        law = metafunc.function.__name__.removeprefix("test_")
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", dtypes_of(law, self.dtypes))

    def hold(self, law: str, dtype: str) -> None:
        """Fails unless the back end keeps the law; skips where it does not apply."""
        if hold(law, self.backend, dtype, platforms=self.platforms) is None:
            pytest.skip(f"{law} does not apply: back end {self.backend!r} brings or promises nothing of it")

    def test_values(self, dtype: str) -> None:
        """The product equals the float64 oracle, rounded once."""
        self.hold("values", dtype)

    def test_gradients(self, dtype: str) -> None:
        """So do the gradients of rows and of matrices."""
        self.hold("gradients", dtype)

    def test_every_mode(self, dtype: str) -> None:
        """Forward mode, and both modes of the gradient."""
        self.hold("every_mode", dtype)

    def test_empty_groups(self, dtype: str) -> None:
        """The first, the middle, the last, or all groups have no rows; their gradients are zero."""
        self.hold("empty_groups", dtype)

    def test_one_group_has_all(self, dtype: str) -> None:
        """All rows in one group, and one row in each."""
        self.hold("one_group_has_all", dtype)

    def test_rows_past_the_groups(self, dtype: str) -> None:
        """NaN and infinity in rows past the sum reach nothing."""
        self.hold("rows_past_the_groups", dtype)

    def test_weights_of_others(self, dtype: str) -> None:
        """NaN and infinity in a matrix reach no row of another group."""
        self.hold("weights_of_others", dtype)

    def test_dtypes_of_results(self, dtype: str) -> None:
        """Results have the dtype of the operands, or the one that was asked for."""
        self.hold("dtypes_of_results", dtype)

    def test_sums_in_fp32(self, dtype: str) -> None:
        """Long sums are accumulated in fp32, and fp32 operands keep their bits."""
        self.hold("sums_in_fp32", dtype)

    def test_odd_extents(self, dtype: str) -> None:
        """Extents are no multiples of tiles."""
        self.hold("odd_extents", dtype)

    def test_extents_of_zero(self, dtype: str) -> None:
        """No rows, nothing to sum, no columns."""
        self.hold("extents_of_zero", dtype)

    def test_many_rows(self, dtype: str) -> None:
        """More rows than 16 bits count."""
        self.hold("many_rows", dtype)

    def test_transposed(self, dtype: str) -> None:
        """Matrices are given transposed."""
        self.hold("transposed", dtype)

    def test_traced_group_sizes(self, dtype: str) -> None:
        """One program serves all group sizes."""
        self.hold("traced_group_sizes", dtype)

    def test_vmap(self, dtype: str) -> None:
        """A batch is its members, each with sizes of its own."""
        self.hold("vmap", dtype)

    def test_shard_map(self, dtype: str) -> None:
        """Inside ``shard_map`` with ``check_vma``, with replicated matrices."""
        self.hold("shard_map", dtype)

    def test_lowering(self, dtype: str) -> None:
        """It lowers for the platforms that it lists."""
        self.hold("lowering", dtype)

    def test_added_to(self, dtype: str) -> None:
        """With ``accumulates``: the sum is rounded once."""
        self.hold("added_to", dtype)

    def test_rows_in_slots(self, dtype: str) -> None:
        """With "slot_matmul" and "slot_outer": rows are read from slots and written there."""
        self.hold("rows_in_slots", dtype)

    def test_activation(self, dtype: str) -> None:
        """With "gated_matmul": both products, the activation, and every gradient."""
        self.hold("activation", dtype)

    def test_transports(self, dtype: str) -> None:
        """With exchanges of its own: dispatch, combine and their gradients."""
        self.hold("transports", dtype)
