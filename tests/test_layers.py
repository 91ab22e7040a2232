"""A module imports only from those above it, and what is optional is imported by one module alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_mdn"
PUBLIC = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
# From the ground up: packages, and groups of public modules. Within one of these, modules import each other freely as
# long as there is no circle, which Python itself refuses.
FLOORS = [
    {"support"},
    {"tensors"},
    {"distributions"},
    {"scores", "decisions", "uncertainty", "calibration"},
    {"networks"},
    {"posteriors"},
    {"training"},
    {"adapters"},
    {"plots", "inference_data", "sklearn", "lightning"},
    {"__init__"},
]
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# A result draws itself, although figures are built from results.
ALLOWED = {("training", "pyro_mdn.plots.plot_training")}


def imports(source):
    """Names of all modules that a file imports, at its top or anywhere else, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["pyro_mdn"] * bool(node.level) + [node.module] * bool(node.module))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def forbidden(room, source):
    """Imports of a floor above, or of the package itself rather than one of its rooms."""
    rooms = {name for rooms in FLOORS[: floor_of(room) + 1] for name in rooms} - {"__init__"}
    ours = [target for target in imports(source) if target.split(".")[0] == "pyro_mdn"]
    wrong = [target for target in ours if len(target.split(".")) < 2 or target.split(".")[1] not in rooms]
    return [target for target in wrong if (room, target) not in ALLOWED]


def test_every_room_has_a_floor():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages | PUBLIC | {"__init__"} == {room for rooms in FLOORS for room in rooms}


def test_layout_of_the_contributors_page():
    """It names every module once, from the ground up, and nothing else; the same of packages."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    layout = text.split("## Layout\n")[1].split("\n## ")[0]
    packages, modules = layout.split("### Modules\n")
    named = re.findall(r"^\| `([\w/]+\.py)` \|", modules, re.MULTILINE)
    assert sorted(named) == sorted(str(path) for path in MODULES if path.name != "__init__.py")
    floors = [floor_of(name.split("/")[0].removesuffix(".py")) for name in named]
    assert floors == sorted(floors)
    rows = re.findall(r"^\| (`.*?`) \|", packages, re.MULTILINE)
    rooms = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row)]
    folders = {f"{path.parent}/" for path in MODULES if path.name == "__init__.py"} - {"./"}
    assert sorted(rooms) == sorted(folders | {f"{name}.py" for name in PUBLIC})
    floors = [floor_of(name.split("/")[0].removesuffix(".py")) for name in rooms]
    assert floors == sorted(floors)


def test_sizes_of_the_contributors_page():
    """Modules of 350 lines at most, and at most ten of them in a package."""
    lines = {str(path): (PACKAGE / path).read_text().count("\n") for path in MODULES}
    assert not {path: count for path, count in lines.items() if count > 350}
    packages = [str(path.parent) for path in MODULES if path.name != "__init__.py"]
    assert not {package for package in packages if packages.count(package) > 10}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_only_from_its_floor_or_below(path):
    assert not forbidden(path.parts[0].removesuffix(".py"), (PACKAGE / path).read_text())


@pytest.mark.parametrize(
    "source",
    ["from pyro_mdn.training.fit import fit", "from . import training", "import pyro_mdn", "from pyro_mdn import fit"],
)
def test_no_way_round(source):
    assert forbidden("tensors", source)


def test_import_leaves_optional_packages_alone():
    slow = {"arviz", "lightning", "matplotlib", "pandas", "scipy", "sklearn", "xarray"}
    code = f"import sys, pyro_mdn; print({slow} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_modules_are_there_after_a_bare_import():
    code = """
import sys, pyro_mdn
modules = ["calibration", "inference_data", "lightning", "plots", "sklearn"]
assert {*modules} <= {*dir(pyro_mdn)}
assert not {"matplotlib", "sklearn", "lightning", "pyro_mdn.plots", "pyro_mdn.calibration"} & {*sys.modules}
assert pyro_mdn.calibration.coverage_table and pyro_mdn.plots.plot_training and pyro_mdn.sklearn.MDNRegressor
assert pyro_mdn.lightning.LightningObjective and pyro_mdn.inference_data.to_inference_data
assert not hasattr(pyro_mdn, "nothing")
"""
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert not shown.returncode, shown.stderr


def test_a_module_whose_package_is_missing_is_no_attribute():
    """Whoever asks whether it is there gets an answer; whoever takes it is told what to install."""
    code = """
import sys
sys.modules["lightning"] = None
import pyro_mdn
assert not hasattr(pyro_mdn, "lightning")
try:
    pyro_mdn.lightning
except AttributeError as error:
    assert "pip install" in str(error)
try:
    from pyro_mdn import lightning
except ImportError as error:
    assert "pip install" in str(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not shown.returncode, shown.stderr
