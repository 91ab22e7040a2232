"""The README's code runs as it stands, in the order of the page, and its links lead somewhere."""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def closed():
    mpl.use("Agg")
    yield
    plt.close("all")


PAGES = {"README.md": 4, "docs/training.md": 1, "docs/uncertainty.md": 6, "docs/arviz.md": 5, "docs/sklearn.md": 4}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.parametrize(("page", "count"), PAGES.items())
def test_snippets_run(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(snippets) >= count
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_relative_links_exist(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert all(((ROOT / page).parent / target).exists() for target in targets)
