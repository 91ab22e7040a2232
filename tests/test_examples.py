"""Every example runs with tiny settings, and leaves what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = {
    "arviz_workflow": ["arviz_workflow.png", "arviz_workflow.nc"],
    "noise_models": ["noise_models.png"],
    "survival": ["survival.png"],
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
    command = [sys.executable, "-W", "error", str(path), "--smoke"] + (["--out", str(tmp_path)] if FILES[name] else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip()
    assert all((tmp_path / file).stat().st_size > 1000 for file in FILES[name])
