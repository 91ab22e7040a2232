"""Build the wheel, look at what is in it, and use it in an empty environment, without extras: ``make wheel``.

Another interpreter, and packages of its own: a program, not a test of pytest's.
"""

import email
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONAL = {"arviz", "lightning", "matplotlib", "pandas", "sklearn", "xarray"}


def build(folder):
    """The only wheel that is built there."""
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--quiet", "--no-deps", "--wheel-dir", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def look_at(wheel):
    """All modules, the marker of types and the license; nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        information = {name for name in names if ".dist-info/" in name}
        (metadata,) = (name for name in information if name.endswith("/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pyro_mdn").rglob("*.py")} | {"pyro_mdn/py.typed"}
    assert names - information == expected, (names - information) ^ expected
    assert any(name.endswith("/licenses/LICENSE") for name in information), information
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "pyro_mdn" / "__init__.py").read_text(), flags=re.MULTILINE)
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert fields["Version"] == version[1] == citation[1], (fields["Version"], version[1], citation[1])
    assert fields["License-Expression"] == "MIT"
    assert fields.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    required = [name for name in fields.get_all("Requires-Dist") if "extra ==" not in name]
    assert not OPTIONAL & {re.match(r"[\w-]+", name)[0] for name in required}, required


def use(wheel, folder):
    """Install it where nothing else is, and run the first example of the README from another folder."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    (elsewhere := folder / "elsewhere").mkdir()
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    checks = f"""
import importlib.util, pathlib, sys, pyro_mdn
assert pathlib.Path(pyro_mdn.__file__).is_relative_to(sys.prefix), pyro_mdn.__file__
assert not {OPTIONAL!r} & sys.modules.keys()
found = [name for name in {OPTIONAL!r} if importlib.util.find_spec(name)]
assert not found, found
assert mixture.log_prob(y).isfinite().all()
print("the first example runs, of", pyro_mdn.__file__)
"""
    run(python, "-W", "error", *ALLOWED, "-c", example + checks, cwd=elsewhere)


# torch.jit is deprecated, and Pyro scripts a few functions at import; fit may say that fewer components would do.
ALLOWED = ["-W", "ignore::DeprecationWarning", "-W", "ignore:fit:UserWarning"]


def run(*command, **settings):
    """Run a program that has to succeed."""
    subprocess.run([str(part) for part in command], check=True, **settings)


def main():
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        look_at(wheel)
        print(f"{wheel.name} holds what it should")
        use(wheel, Path(folder))


if __name__ == "__main__":
    main()
