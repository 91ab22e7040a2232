"""A Sphinx extension: every picture on the site is drawn by the code that is shown.

The build runs the examples and takes the figures that they write. Of those that take too long, it shows what a full run
wrote (``make figures``). The first page draws its figure by its own code.
"""

import builtins
import contextlib
import shutil
from pathlib import Path

from snippets import run

DOCS = Path(__file__).parent
GALLERY = DOCS / "gallery"
DRAWING = ["start"]  # pages whose code draws
# In order of difficulty, with the arguments of their runs; None: too long for a build.
EXAMPLES = {
    "inverse_sine": ["--seeds", "1"],
    "geyser": [],
    "survival": [],
    "doctor_visits": [],
    "wind": [],
    "own_family": [],
    "noise_models": [],
    "conditioning": [],
    "sklearn_search": [],
    "bayesian_weights": None,
    "active_learning": None,
    "arviz_workflow": None,
    "svi_script": [],
    "likelihood_component": [],
    "mixture_guide": [],
    "world_model": [],
    "distributed": None,
}
EXECUTED = rf"/({'|'.join(name for name, settings in EXAMPLES.items() if settings is not None)})\.py$"


def difficulty(filename):
    """Place of an example in the gallery."""
    return list(EXAMPLES).index(Path(filename).stem)


def arguments(gallery_conf, script_vars):
    """Command line of an example, which runs in its own folder."""
    path = Path(script_vars["src_file"])
    figure_of(path).unlink(missing_ok=True)
    builtins.__file__ = str(path)  # sphinx-gallery leaves it undefined, and the data lie beside the script
    return EXAMPLES[path.stem]


def figure_of(script):
    """Where an example writes its figure."""
    return Path(script).parent / "out" / f"{Path(script).stem}.png"


def written(block, block_vars, gallery_conf):
    """Markup of the figure that an example wrote, if it did."""
    from sphinx_gallery.scrapers import figure_rst

    figure = figure_of(block_vars["src_file"])
    if not figure.exists():
        return ""
    shown = next(block_vars["image_path_iterator"])
    shutil.move(figure, shown)
    return figure_rst([shown], gallery_conf["src_dir"])


def show_full_runs(app):
    """Put the figures of full runs on the pages of examples that the build does not run."""
    from sphinx_gallery.utils import scale_image

    for name in (name for name, settings in EXAMPLES.items() if settings is None):
        page, figure = GALLERY / f"{name}.rst", DOCS / f"{name}.png"
        text = page.read_text()
        note = "This one takes minutes, or several processes: the build of the site does not run it."
        if figure.exists():
            note += f" The figure is of a full run, by ``make figures``.\n\n.. image:: /{name}.png"
            thumbnail = GALLERY / "images" / "thumb" / f"sphx_glr_{name}_thumb.png"
            scale_image(figure, thumbnail, *app.config.sphinx_gallery_conf["thumbnail_size"])
        if note not in text:
            head, mark, code = text.partition(".. GENERATED FROM PYTHON SOURCE LINES")
            page.chmod(0o644)
            page.write_text(f"{head}{note}\n\n{mark}{code}")


def draw_pages(app):
    """Run the pages that draw, where their figures are missing or older."""
    folder = GALLERY / "pages"
    folder.mkdir(parents=True, exist_ok=True)
    for name in DRAWING:
        page, figure = DOCS / f"{name}.md", folder / f"{name}.png"
        if not figure.exists() or figure.stat().st_mtime < page.stat().st_mtime:
            with contextlib.chdir(folder), contextlib.redirect_stdout(None):
                run(page)


def keep_to_the_package(app, what, name, obj, skip, options):
    """Leave out members that a class inherits from another package."""
    function = getattr(obj, "fget", None) or getattr(obj, "__wrapped__", obj)
    module = getattr(function, "__module__", None) or "pyro_mdn"
    return True if what == "class" and not module.startswith("pyro_mdn") else None


def find_public(app, env, node, contnode):
    """Lead references by the module that defines something to where it is public."""
    name = node.get("reftarget", "").rpartition(".")[2]
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", f"pyro_mdn.{name}", node, contnode)


def setup(app):
    """What Sphinx calls."""
    app.connect("builder-inited", show_full_runs, priority=900)
    app.connect("builder-inited", draw_pages, priority=900)
    app.connect("autodoc-skip-member", keep_to_the_package)
    app.connect("missing-reference", find_public)
    return {"parallel_read_safe": True}
