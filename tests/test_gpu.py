"""What only a GPU can show: run with ``-m gpu``. Collected everywhere, so that it is ready when there is one."""

import jax
import pytest

import moe_jax as moe
from moe_jax import verify
from moe_jax.errors import UnsupportedError
from moe_jax.hardware import peak_of
from moe_jax.tools.bench import here

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", here.DTYPES)
@pytest.mark.parametrize("backend", here.backends_for("gpu"))
def test_every_product_of_every_back_end(backend, dtype):
    """Forward and both gradients, exactly, with empty groups and NaN past the last."""
    try:
        rows = list(here.product_checks(backend, dtype, here.EXTENTS))
    except UnsupportedError as error:  # a kernel for another generation says so
        pytest.skip(str(error))
    assert all(row["passed"] for row in rows), rows


@pytest.mark.parametrize("dtype,wire", here.LAYERS)
def test_the_layer_and_every_gradient(dtype, wire):
    rows = list(here.layer_checks(moe.make_mesh(), dtype, wire, small=False))
    assert all(row["passed"] for row in rows), rows


def test_every_recipe_to_the_bit():
    rows = list(here.recipe_checks())
    assert all(row["passed"] for row in rows), rows


def test_every_law_on_all_gpus(capsys):
    assert verify.run() == 0, capsys.readouterr().out


def test_the_peaks_of_this_gpu_are_known():
    kind = jax.devices()[0].device_kind
    assert peak_of(kind) is not None, f"moe_jax.hardware.PEAKS lacks {kind!r}"
