"""A Sphinx extension: every picture on the site is drawn by the code that is shown.

The build runs the examples and takes the figures that they write. Of those that take too long, it shows what a full run
wrote (``make figures``).
"""

import shutil
from pathlib import Path

DOCS = Path(__file__).parent
OUT = DOCS / "_build" / "examples"
# In order of difficulty, with the arguments of their runs; None: too long for a build.
EXAMPLES = {
    "inverse_sine": ["--seeds", "1"],
    "geyser": [],
    "noise_models": [],
    "conditioning": [],
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
    """Command line of an example: figures go to a folder of its own."""
    path = Path(script_vars["src_file"])
    place = OUT / path.stem
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return [*EXAMPLES[path.stem], *(["--out", str(place)] if '"--out"' in path.read_text() else [])]


def written(block, block_vars, gallery_conf):
    """Markup of the figures that an example wrote."""
    from sphinx_gallery.scrapers import figure_rst

    shown = []
    for path in sorted((OUT / Path(block_vars["src_file"]).stem).glob("*.png")):
        shown.append(next(block_vars["image_path_iterator"]))
        shutil.move(path, shown[-1])
    return figure_rst(shown, gallery_conf["src_dir"])


def setup(app):
    """What Sphinx calls."""
    return {"parallel_read_safe": True}
