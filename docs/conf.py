"""How the site is built: ``make docs``."""

import sys
from pathlib import Path

import pyro_mdn

sys.path.insert(0, str(Path(__file__).parent))  # for the extension below
import pictures

project, author, release = "pyro_mdn", "The pyro_mdn developers", pyro_mdn.__version__
project_copyright = f"2026 {author}"
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5", "gallery/*.zip", "gallery/*.json"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # from the site itself, not from the network
    "sphinx_gallery.gen_gallery",
    "pictures",
]

myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "extra_repr"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# References to the package have to lead somewhere; those to others would need their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"pyro_mdn\.[\w.]+\.M"),  # the type of a mixture, which functions of it return
    (r"py:.*", r"(torch|nn|dist|pyro|np|numpy|pandas|matplotlib|lightning|sklearn|xarray|os|collections|typing)\..*"),
    (
        r"py:class",
        r"(Tensor|Size|Module|Axes|DataFrame|PathLike|ArrayLike|DataLoader|Distribution|Any|Self|Callable|Sequence)",
    ),
]
NOT_PUBLIC = [
    "MixtureDensity",
    "UnivariateMixture",
    "contextlib.AbstractContextManager",
    "pyro_mdn.distributions.covariance.base.Whitening",
    "pyro_mdn.distributions.families.components.Sequential",
    "pyro_mdn.distributions.families.family.Block",
    "pyro_mdn.distributions.parameters.Origin",
    "pyro_mdn.distributions.units.units.Units",
    "pyro_mdn.posteriors.guide_draws.LaplaceGuide",
    "pyro_mdn.tensors.mixture_density.Kernel",
    "pyro_mdn.tensors.univariate.Law",
    "pyro_mdn.tensors.univariate.UnivariateMixture",
]
nitpick_ignore = [("py:class", name) for name in NOT_PUBLIC]

html_theme = "furo"
html_title = "pyro_mdn"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": "pictures.difficulty",
    "filename_pattern": pictures.EXECUTED,
    "reset_argv": "pictures.arguments",
    "image_scrapers": ("pictures.written",),
    "default_thumb_file": str(Path(__file__).parent / "_static" / "no_figure.png"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "write_computation_times": False,
    "show_signature": False,
    "min_reported_time": 1,
}
