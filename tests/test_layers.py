"""A module imports only from those above it, and what is optional is imported by one module alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_mdn"
ORDER = [
    "kernels",
    "covariance",
    "correlated",
    "noise",
    "reduction",
    "density",
    "mixture",
    "divergence",
    "scores",
    "head",
    "serialization",
    "network",
    "training",
    "__init__",
]


def imports(path):
    """Names of all modules that a file imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_order_names_every_module():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name):
    below = {f"pyro_mdn.{other}" for other in ORDER[ORDER.index(name) :]}
    assert below.isdisjoint(imports(PACKAGE / f"{name}.py"))


def test_import_leaves_optional_packages_alone():
    code = "import sys, pyro_mdn; print({'arviz', 'matplotlib', 'pandas', 'sklearn'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
