"""Every example runs with tiny settings, and leaves what it promises."""

from pathlib import Path

import pytest
from scripts import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = {
    "arviz_workflow": ["arviz_workflow.png", "arviz_workflow.nc"],
    "noise_models": ["noise_models.png"],
    "survival": ["survival.png"],
    "doctor_visits": ["doctor_visits.png"],
    "wind": ["wind.png"],
    "own_family": ["own_family.png"],
    "sklearn_search": [],
    "geyser": ["geyser.png", "geyser.safetensors", "geyser.nc"],
    "inverse_sine": ["inverse_sine.png"],
    "svi_script": [],
    "likelihood_component": [],
    "mixture_guide": [],
    "conditioning": [],
    "active_learning": ["active_learning.png"],
    "bayesian_weights": ["bayesian_weights.png"],
    "distributed": ["distributed.safetensors"],
    "world_model": ["world_model.png"],
}


def test_all_examples_are_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_example(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 80
    out = ["--out", str(tmp_path)] if FILES[name] else []
    status, shown, complaints = run_script(path, "--smoke", *out, cwd=tmp_path, warn="error")
    assert status == 0, complaints
    assert shown.strip()
    assert all((tmp_path / file).stat().st_size > 1000 for file in FILES[name])
