"""The benchmarks run with tiny settings, and the pages show what their results say."""

import importlib
import json
from pathlib import Path

import pytest
from scripts import run_script

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


THREADS = ["--threads", "1"]
JOBS = ["--jobs", "1"]
COMMANDS = dict.fromkeys(
    ("uci", "ablation", "missing", "diabetes", "survival", "counts", "known_truth", "angles", "few_rows", "kinds"), JOBS
)
COMMANDS |= dict.fromkeys(("log_prob", "channels", "families", "train_step", "sampling", "posterior"), THREADS)
COMMANDS |= {"memory": [], "scaling": [], "time_to_quality": [], "against": [str(ROOT)]}


@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_runs(name, tmp_path):
    out = tmp_path / "out"
    status, shown, complaints = run_script(
        BENCHMARKS / f"{name}.py", "--smoke", *COMMANDS[name], "--out", str(out), cwd=tmp_path
    )
    assert status == 0, complaints
    assert shown.startswith("| ")
    assert "nan" not in shown
    assert json.loads(out.read_text())


ELSEWHERE = {
    "uci": ("summary", "docs/quality.md"),
    "ablation": ("nll", "docs/training.md"),
    "missing": (None, "docs/training.md"),
    "few_rows": ("nll", "docs/training.md"),
    "kinds": ("rows", "docs/training.md"),
    "posterior": ("ratios", "docs/uncertainty.md"),
    "diabetes": ("summary", "docs/sklearn.md"),
    "survival": ("summary", "docs/quality.md"),
    "counts": ("summary", "docs/quality.md"),
    "angles": ("summary", "docs/quality.md"),
    "known_truth": ("rows", "docs/targets.md"),
    "log_prob": (None, "docs/performance.md"),
}
PAGES = dict.fromkeys(COMMANDS, ("rows", "docs/performance.md")) | ELSEWHERE
del PAGES["against"]  # whose figures depend on another build


@pytest.mark.parametrize(("name", "part", "page"), [(name, *where) for name, where in PAGES.items()])
def test_pages_show_the_results(name, part, page, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paths = list((BENCHMARKS / "results").glob(f"{name}.json")) + list(
        (BENCHMARKS / "results").glob(f"{name}_gpu.json")
    )
    assert paths
    for path in paths:
        results = json.loads(path.read_text())
        table = importlib.import_module(name).table(results[part] if part else results)
        assert table in (ROOT / page).read_text(), path.name
