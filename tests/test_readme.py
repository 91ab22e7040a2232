"""The code of README and pages runs as it stands, in the order of the page; none is left out; links lead somewhere."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import pyro_mdn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.glob("*.md"))]
REFERENCE = sorted(DOCS.glob("api/*.md"))


def module(name):
    """A module of the build of the site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


snippets = module("snippets")
CODE = [page for page in PAGES if snippets.snippets((ROOT / page).read_text())]


@pytest.fixture(autouse=True)
def closed():
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore:(loo|compare).* expected Pareto")
@pytest.mark.parametrize("page", CODE)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets.run(ROOT / page)


@pytest.mark.parametrize("page", [*PAGES, *(str(path.relative_to(ROOT)) for path in REFERENCE)])
def test_no_code_is_left_out(page):
    """Fences are Python that runs, shell, directives, or Python that says it is of another library."""
    text = (ROOT / page).read_text()
    fences = re.findall(r"^ *(`{3,}|~{3,})(.*)\n", text, flags=re.MULTILINE)
    opening = [info.strip() for _, info in fences[::2]]
    assert len(fences) % 2 == 0
    assert not any(info for _, info in fences[1::2])
    assert set(opening) <= {"python", "sh", "{toctree}", "{eval-rst}", "{code-block} python"}
    assert opening.count("python") == len(snippets.snippets(text))
    foreign = re.findall(
        r"^```\{code-block\} python\n:class: other-library\n\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert opening.count("{code-block} python") == len(foreign)
    assert not foreign or page == "docs/other_libraries.md"
    for code in foreign:
        compile(code, page, "exec")
        assert "pyro_mdn" not in code


def test_pages_with_code():
    """A page that loses its code, or a fence that is no longer recognised, shows here."""
    counts = {page: len(snippets.snippets((ROOT / page).read_text())) for page in CODE}
    assert counts["README.md"] >= 3
    assert counts["docs/features.md"] >= 2
    assert counts["docs/pyro.md"] >= 2
    assert counts["docs/start.md"] >= 8
    names = ["examples", "glossary", "performance", "quality", "testing"]
    without = {"CONTRIBUTING.md", *(f"docs/{name}.md" for name in names)}
    assert set(PAGES) - set(CODE) == without


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        # The gallery is made from the examples when the site is built, and the first page draws its figure itself.
        name = re.fullmatch(r"gallery/(?:images/sphx_glr_)?(\w+?)(?:_001\.png|\.rst)|gallery/pages/(\w+)\.png", target)
        made = name and (ROOT / "examples" / f"{name[1]}.py" if name[1] else DOCS / f"{name[2]}.md")
        assert (made or (ROOT / page).parent / target).exists(), target


def slugs(text):
    """Anchors that headings have, on the site and on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
        other = text if not target else ((ROOT / page).parent / target).read_text()
        assert anchor in slugs(other), f"{target}#{anchor}"


def test_first_screen_of_the_readme():
    """The problem, ten lines of code, one picture, two commands and three links, in this order."""
    text = (ROOT / "README.md").read_text().split("\n## ")[0]
    code, commands = re.findall(r"^```(?:python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) <= 12
    assert [line.split()[:2] for line in commands.splitlines()] == [["make", "demo"], ["make", "test"]]
    pictures, links = re.findall(r"^!\[", text, re.MULTILINE), re.findall(r"^- \[.*?\]\(docs/", text, re.MULTILINE)
    assert (len(pictures), len(links)) == (1, 3)
    assert text.index("```python") < text.index("![") < text.index("```sh") < text.index("- [")


@pytest.mark.parametrize(
    "term",
    [
        "aleatoric",
        "calibration",
        "censoring",
        "dequantisation",
        "early stopping",
        "epistemic",
        "homoscedastic",
        "identifiability",
        "proper scoring rule",
    ],
)
def test_terms_of_the_field_are_found(term):
    """In the glossary, and on a page that explains them."""
    pages = {path.stem for path in DOCS.glob("*.md") if term in path.read_text().lower()}
    assert "glossary" in pages
    assert pages - {"glossary", "features"}


def test_examples_are_in_one_order():
    """That of the gallery, which is that of their page."""
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(\.\./examples/", (DOCS / "examples.md").read_text(), flags=re.MULTILINE)
    tree = ast.parse((DOCS / "pictures.py").read_text())
    assigned = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
    assert list(ast.literal_eval(assigned["EXAMPLES"])) == listed
    assert set(listed) == {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_reference_has_every_public_name():
    documented, current = set(), ""
    for path in REFERENCE:
        for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", path.read_text(), flags=re.MULTILINE):
            if directive == "currentmodule":
                current = name
            elif directive.startswith("auto"):
                documented.add(name if name.startswith("pyro_mdn.") else f"{current}.{name}")
    names = ["scores", "uncertainty", "calibration", "inference_data", "plots", "lightning", "sklearn"]
    public = {f"pyro_mdn.{name}" for name in pyro_mdn.__all__}
    for name in names:
        public |= {f"pyro_mdn.{name}.{child}" for child in importlib.import_module(f"pyro_mdn.{name}").__all__}
    assert public - documented <= {"pyro_mdn.inference_data.to_inference_data"}  # it has its name in the package
    for name in documented:
        home, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(home), last), name
