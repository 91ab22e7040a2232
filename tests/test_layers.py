"""A module imports only from those above it, and what is optional is imported by one module alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_mdn"
ORDER = [
    "checks",
    "arrays",
    "isolation",
    "fingerprint",
    "triangles",
    "kernels",
    "layer",
    "univariate",
    "shortest",
    "whitening",
    "covariance",
    "correlated",
    "noise",
    "reduction",
    "modes",
    "components",
    "indexing",
    "precision",
    "density",
    "algebra",
    "mixture",
    "prediction",
    "divergence",
    "scores",
    "uncertainty",
    "calibration",
    "pareto",
    "raw",
    "head",
    "serialization",
    "loadable",
    "network",
    "network_model",
    "passes",
    "vectorized",
    "dense",
    "guides",
    "initialization",
    "ensemble",
    "latent",
    "bayesian",
    "objectives",
    "optimization",
    "data",
    "member_data",
    "joint",
    "laplace",
    "mcmc",
    "labels",
    "source",
    "generations",
    "leave_one_out",
    "inference_data",
    "grids",
    "plots",
    "loop",
    "member_loop",
    "checkpoint",
    "trainee",
    "training",
    "lightning",
    "scorers",
    "sklearn",
    "__init__",
]


def imports(source):
    """Names of all modules that a file imports, at its top or anywhere else, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["pyro_mdn"] * bool(node.level) + [node.module] * bool(node.module))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden(name, source):
    """Imports of modules that are not above: of the package itself, only modules that are."""
    above = {f"pyro_mdn.{other}" for other in ORDER[: ORDER.index(name)]}
    ours = [target for target in imports(source) if target.split(".")[0] == "pyro_mdn"]
    return [target for target in ours if ".".join(target.split(".")[:2]) not in above]


def test_order_names_every_module():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name):
    assert not forbidden(name, (PACKAGE / f"{name}.py").read_text())


@pytest.mark.parametrize(
    "source",
    ["from .training import fit", "from . import training", "import pyro_mdn", "from pyro_mdn import fit"],
)
def test_no_way_round(source):
    assert forbidden("kernels", source)


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
