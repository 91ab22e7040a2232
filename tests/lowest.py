"""Print the lowest versions that ``pyproject.toml`` allows on this interpreter, as constraints for pip."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = {"pyright", "ruff"}  # they look at the code, and run none of it


def requirements(project, extra):
    """What an extra requires, with the extras that it names itself; those whose markers hold here."""
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        if requirement.name == project["name"]:
            for other in requirement.extras:
                yield from requirements(project, other)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def lowest(project):
    """Lower bound of each package, by name; the greatest of them where there are several."""
    bounds = {}
    for requirement in [*map(Requirement, project["dependencies"]), *requirements(project, "dev")]:
        if requirement.name not in TOOLS:
            (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
            bounds[requirement.name] = max(bound, bounds.get(requirement.name, bound))
    return bounds


if __name__ == "__main__":
    # Here alone, since pip imports distutils: tests that import this file would find setuptools at odds with it.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name, version in lowest(pyproject["project"]).items():
        print(f"{name}=={version}")
