"""The conformance kit catches planted bugs, each by the law that is about it, and lets right back ends pass.

And back ends that other packages offer are found when they are named, and only then.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from planted_bugs import BUGS, FUSED, RIGHT, right_and_added_to

import moe_jax as moe
from moe_jax import errors, verify
from moe_jax.kernels import backend_names, table, xla
from moe_jax.testing import BackendConformance
from moe_jax.tools.cli import main
from moe_jax.verify.backend import LAWS, BackendContractError, backend_contract, hold

PAGE = Path(__file__).parent.parent / "docs" / "how_to" / "prove_a_back_end.md"


@pytest.fixture(autouse=True)
def table_of_its_own(monkeypatch):
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))


# --- planted bugs ----------------------------------------------------------------------------------------------------


@pytest.mark.quick(*(bug.name for bug in BUGS if bug.quick))
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught_by_its_law(bug):
    moe.register_backend(bug.backend())
    kit = type("TestBug", (BackendConformance,), {"backend": bug.name})()
    with pytest.raises(
        BackendContractError, match=f"'{bug.name}' breaks the law '{bug.law}' with {bug.dtype}"
    ) as caught:
        getattr(kit, f"test_{bug.law}")(bug.dtype)
    assert bug.raises == ("it raises" in str(caught.value)), "caught for another reason than the one that was planted"


class TestARightBackEnd(BackendConformance):
    backend = "right"
    dtypes = ("bfloat16",)

    @pytest.fixture(autouse=True)
    def _register(self, table_of_its_own):
        kernels = {**RIGHT, "grouped_matmul": right_and_added_to}
        moe.register_backend(moe.Backend(name="right", platforms=("cpu", "tpu"), kernels=kernels, accumulates=True))


@pytest.mark.slow
class TestOneThatBringsAll(BackendConformance):
    backend = "all"
    dtypes = ("float32", "bfloat16")

    @pytest.fixture(autouse=True)
    def _register(self, table_of_its_own):
        moves = {"padded": lambda blocks, axes: xla.lax.all_to_all(blocks, axes, 0, 0)}
        moe.register_backend(moe.Backend(name="all", kernels={**RIGHT, **FUSED}, transports=moves))


def test_every_law_has_a_test_and_a_bug():
    tests = {name.removeprefix("test_") for name in vars(BackendConformance) if name.startswith("test_")}
    assert tests == set(LAWS)
    # The operator makes higher derivatives of the same two kernels, so no kernel breaks that law and no other one.
    assert {bug.law for bug in BUGS} == set(LAWS) - {"every_mode"}


def test_the_page_lists_every_bug_and_the_law_that_catches_it():
    rows = re.findall(r"^\| (?!bug|---)(.*?) \| `(\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(bug.about, bug.law) for bug in BUGS]
    laws = re.findall(r"^- `(\w+)`", PAGE.read_text(), re.MULTILINE)
    assert sorted(laws) == sorted(LAWS)


def test_what_is_not_promised_or_brought_is_skipped():
    moe.register_backend(moe.Backend(name="some", kernels=RIGHT, unpromised=("vmap",)))
    kit = type("TestSome", (BackendConformance,), {"backend": "some"})()
    for law in ("vmap", "added_to", "rows_in_slots", "activation", "transports", "lowering"):
        with pytest.raises(pytest.skip.Exception, match=f"{law} does not apply: back end 'some'"):
            getattr(kit, f"test_{law}")("float32")


def test_a_name_that_is_registered_again_is_compiled_again():
    values = []
    for kernels in (RIGHT, {**RIGHT, "grouped_matmul": BUGS[0].backend().kernels["grouped_matmul"]}):
        moe.register_backend(moe.Backend(name="mine", kernels=kernels), replace=True)
        try:
            values.append(hold("values", "mine"))
        except BackendContractError:
            values.append("wrong")
    assert values == [1, "wrong"]


def test_the_contract_as_a_whole_lists_every_broken_law():
    few = {"laws": ("values", "gradients", "empty_groups", "added_to"), "dtypes": ("float32",)}
    assert backend_contract("xla", **few) == {"values": 1, "gradients": 2, "empty_groups": 12}
    bad = next(bug for bug in BUGS if bug.law == "empty_groups" and "wrong" in bug.about)
    moe.register_backend(bad.backend())
    with pytest.raises(BackendContractError, match="breaks the law 'empty_groups'") as caught:
        backend_contract(bad.name, **few)
    assert "'values'" not in str(caught.value)


def test_unknown_laws_and_back_ends_are_named():
    with pytest.raises(errors.InvalidArgumentError, match="law='valuez' is unknown; did you mean 'values'"):
        hold("valuez", "cpu")
    with pytest.raises(errors.InvalidArgumentError, match="laws='vmapp' is unknown; did you mean 'vmap'"):
        backend_contract("cpu", laws=("vmapp",))
    with pytest.raises(errors.InvalidArgumentError, match="backend='cpuu' is unknown; did you mean 'cpu'"):
        hold("values", "cpuu")


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_has_a_line_for_each_law_and_goes_on_after_a_broken_one(monkeypatch, capsys):
    bug = next(bug for bug in BUGS if bug.law == "gradients")
    moe.register_backend(bug.backend())
    monkeypatch.setattr(verify.table, "dtypes_of", lambda law: ("float32",))
    checks = [verify.table._of_backend(law, bug.name) for law in ("values", "gradients", "activation")]
    assert [check and (check.law, check.passed) for check in checks] == [
        ("back end: values", True),
        ("back end: gradients", False),
        None,  # it brings no such kernel
    ]
    verify.table._show(checks[1], json_lines=False)
    said = capsys.readouterr().out
    assert "FAILED" in said and "d_rhs, group_sizes=[10, 7, 8, 5, 7]: off by" in said
    assert checks[1].cases == 2 and checks[1].worst > 0


# --- back ends of other packages -------------------------------------------------------------------------------------


MODULES = {
    "good": "import moe_jax\nfrom moe_jax.kernels import xla\n"
    "BACKEND = moe_jax.Backend(name='good', kernels=xla.BACKEND.kernels)\n",
    "itself": "import moe_jax\nBACKEND = moe_jax.Backend(name='itself')\nmoe_jax.register_backend(BACKEND)\n",
    "broken": "import no_such_driver\n",
    "nothing": "",
    "no_backend": "BACKEND = 3\n",
    "other_name": "import moe_jax\nBACKEND = moe_jax.Backend(name='other')\n",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that offers a back end for each of MODULES."""
    for name, text in MODULES.items():
        (tmp_path / f"kernels_{name}.py").write_text(text)
    info = tmp_path / "far_kernels-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far-kernels\nVersion: 1.2\n")
    points = (f"{name} = kernels_{name}:BACKEND" for name in MODULES)
    (info / "entry_points.txt").write_text("[moe_jax.backends]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(f"kernels_{name}", None)


def test_an_offered_back_end_is_loaded_when_it_is_named(installed):
    moe.resolve_backend("grouped_matmul", "auto")
    moe.resolve_backend("grouped_matmul", "cpu")
    assert not any(f"kernels_{name}" in sys.modules for name in MODULES)
    assert moe.resolve_backend("grouped_matmul", "good").name == "good" and "good" in backend_names()
    assert "kernels_broken" not in sys.modules
    moe.kernels.check_backend("itself")
    sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 8, "top_k": 2, "dtype": "float32"}
    assert moe.make_plan(moe.make_mesh(), **sizes, backend="cpu+good").backend == "cpu+good"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_driver'; mend or uninstall"),
        ("nothing", "cannot be loaded: AttributeError"),
        ("no_backend", "leads to an object of type int; it must lead to a moe_jax.Backend with name='no_backend'"),
        ("other_name", "leads to the back end 'other'; it must lead to a moe_jax.Backend with name='other_name'"),
        ("goood", "did you mean 'good'"),
    ],
)
def test_a_broken_offer_says_whose_it_is(installed, name, says, capsys):
    with pytest.raises(errors.InvalidArgumentError) as caught:
        moe.kernels.check_backend(name)
    assert f"backend='{name}'" in str(caught.value) and says in str(caught.value)
    if name != "goood":
        assert f"the entry point {name} = kernels_{name}:BACKEND of far-kernels 1.2" in str(caught.value)
    assert main(["verify", "--backend", name]) == 2
    assert says in capsys.readouterr().err and name not in backend_names()


def test_without_pytest_one_sentence_says_what_to_install():
    text = (
        "import sys; sys.modules['pytest'] = None\n"
        "try: import moe_jax.testing\n"
        "except NotImplementedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "moe_jax.testing needs pytest, which is not installed; run: pip install pytest\n"
