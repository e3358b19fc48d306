"""What is shipped: the packages, their data, the command, and versions that install together."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("compress", "kernels", "recipes", "evaluation")
EXTRAS = PROJECT["project"]["optional-dependencies"]
PINS = dict(
    line.lower().replace("_", "-").split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
DATA = [
    *ROOT.glob("kernels/tables/*.json"), *ROOT.glob("recipes/*.yaml"), *ROOT.glob("evaluation/tasks/*.yaml"), *ROOT.glob("evaluation/reference/model/*"),
    *ROOT.glob("evaluation/html/templates/*"),
    ROOT / "compress/py.typed",
]  # fmt: skip


def package_of(folder: Path) -> str:
    """The import name of a folder of the checkout, by pyproject's mapping."""
    mapping = {ROOT / place: name for name, place in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    nearest = next(place for place in (folder, *folder.parents) if place in mapping)
    return ".".join((mapping[nearest], *folder.relative_to(nearest).parts))


def test_every_folder_with_python_is_a_listed_package_and_every_listed_package_a_folder():
    sources = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    assert {package_of(path.parent) for path in sources} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_kernels_holds_no_init_so_that_it_cannot_shadow_hugging_faces_kernels():
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_every_data_file_of_the_checkout_is_installed(path):
    below = path.parent.name in ("model", "tables", "templates")  # folders of data inside a package
    package = import_module(package_of(path.parent.parent if below else path.parent))
    installed = Path(next(iter(package.__path__)))
    inside = f"{path.parent.name}/" if below else ""
    assert (installed / f"{inside}{path.name}").read_bytes() == path.read_bytes()


def test_the_paredown_command_is_installed_and_points_at_a_function():
    (entry,) = entry_points(group="console_scripts", name="paredown")
    assert callable(entry.load())


def test_help_pays_for_no_library():
    code = (
        "import sys, json\n"
        "from paredown.commands.app import main\n"
        "sys.argv = ['paredown', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.stderr.write(json.dumps(sorted(name for name in sys.modules if '.' not in name)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compress" in done.stdout
    assert not {"torch", "transformers", "datasets", "lm_eval", "numpy"} & set(json.loads(done.stderr))


@pytest.mark.parametrize("wanted", [*PROJECT["project"]["dependencies"], *EXTRAS["eval"], *EXTRAS["test"][1:]])
def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows(wanted):
    requirement = Requirement(wanted)
    assert requirement.specifier.contains(PINS[requirement.name.lower()])


def test_serving_and_every_other_extra_but_that_of_tasks_installs_no_harness():
    assert EXTRAS["test"][0] == "paredown[eval]"  # the tests run all
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(line for name in EXTRAS if name != "eval" for line in EXTRAS[name]),
    ]
    names = {Requirement(line).name.lower() for line in wanted}
    assert not {"lm-eval", "datasets", "pyarrow"} & names


def test_pins_are_plain_versions_that_any_platforms_wheel_satisfies():
    assert all("+" not in pin and "*" not in pin and ";" not in pin for pin in PINS.values())


def test_the_triton_pinned_is_the_one_that_torchs_cuda_wheel_asks_for():
    asked = [Requirement(line) for line in requires("torch") or [] if Requirement(line).name == "triton"]
    if not asked or version("torch").split("+")[0] != PINS["torch"]:
        pytest.skip("the torch that is installed here names no triton, or is not the pinned one")
    assert all(requirement.specifier.contains(PINS["triton"]) for requirement in asked)
