"""What an installed wheel must do, run with nothing but the core dependencies, and from another directory.

It imports every module, each of which works or says in one sentence what to install; it asks the command line for
training, which says the same; and it runs a few laws.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import traceback
from importlib.metadata import files, version
from pathlib import Path

import moe_jax as moe

moe.emulate_devices(4)  # before anything asks for devices


def check_files(checkout: Path) -> None:
    """The package is the installed one, and the wheel holds what it should and nothing else."""
    place = Path(moe.__file__).resolve()
    assert checkout not in place.parents, f"{place} is in the checkout"
    assert version("moe_jax") == moe.__version__
    names = {str(path) for path in files("moe_jax") or ()}
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"moe_jax", "..", "moe_jax.dist"}, names
    assert "moe_jax/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    here = {str(path.relative_to(checkout)) for path in (checkout / "moe_jax").rglob("*.py")}
    assert here == {name for name in names if name.endswith(".py")}, here ^ names


def import_everything() -> list[str]:
    """Imports every module; returns those that need a package which is not here, and say so.

    What trains is imported by the command "train" alone, which asks for its packages first.
    """
    lacking = []
    for module in pkgutil.walk_packages(moe.__path__, "moe_jax.", onerror=lambda name: None):
        if module.name == "moe_jax.__main__" or module.name.startswith("moe_jax.tools.train."):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:  # noqa: BLE001 - whatever an import may raise is looked at
            sentence = re.fullmatch(r"[^\n]* needs [^\n]*, which is not installed; run: pip install [^\n]*", str(error))
            if not (isinstance(error, moe.MoEError) and sentence):
                traceback.print_exc()
                sys.exit(f"{module.name} cannot be imported, and does not say what to install")
            lacking.append(module.name)
    return lacking


def ask_for_training(config: Path) -> None:
    """The command says what it needs, without a traceback."""
    command = [sys.executable, "-m", "moe_jax", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.fullmatch(
        r"moe_jax: error: training needs \w+, which is not installed; run: pip install .*\n", done.stderr
    )
    assert done.returncode == 2 and said, done.stderr


def run_laws() -> None:
    """Of a back end, and of the layer over a mesh, beside the oracle."""
    from moe_jax.verify import backend_contract
    from moe_jax.verify.layer import Layer

    print(backend_contract("cpu", laws=("values", "gradients", "empty_groups"), dtypes=("float32",)))
    layer = Layer(moe.make_mesh(ep=2, tp=2), "padded", "auto")
    worst = max(*layer.values(), *layer.gradients())
    print(f"the layer and its gradients deviate by {worst:.1e}")
    assert worst < 1e-5


if __name__ == "__main__":
    check_files(Path(sys.argv[1]).resolve())
    print("need a package that is not here:", ", ".join(import_everything()) or "none")
    ask_for_training(Path(sys.argv[1]) / "configs" / "tiny.toml")
    run_laws()
