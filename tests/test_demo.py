"""The main job, whole, with its numbers: minutes, so by `make test-slow`."""

import subprocess
import sys
import time

import pytest

import gradflow
from gradflow import report
from gradflow.spec import RunSpec

pytestmark = pytest.mark.slow


def test_the_demo_shows_degradation_and_what_a_skip_does_about_it(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.demo",
         "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout, f"{time.monotonic() - began:.0f} s", sep="\n")
    page = tmp_path / "report" / "index.html"
    assert done.stdout.splitlines()[-1] == str(page)
    assert page.stat().st_size > 100_000
    assert (tmp_path / "report" / "figures" / "initialisation.png").is_file()

    runs = gradflow.load_runs(tmp_path / "runs")
    frame = runs.runs
    assert len(frame) == 18
    assert set(frame["status"]) == {"done"}
    accuracy = frame.set_index(["depth", "skip", "seed"])["train_accuracy"].astype(float)
    for seed in (0, 1, 2):
        assert accuracy[152, "identity", seed] >= 0.95
        assert accuracy[152, "none", seed] <= 0.30
        assert accuracy[20, "identity", seed] >= 0.99
        assert accuracy[20, "none", seed] >= 0.99
    for depth in (20, 56, 152):
        counts = frame[frame["depth"] == depth]["parameter_count"]
        assert counts.nunique() == 1
    certificates = {
        (run.spec["depth"], run.spec["skip"], run.spec["seed"]): run.record["certificate"]
        for run in runs
    }
    for (depth, _, seed), certificate in certificates.items():
        assert certificate == certificates[depth, "none", seed]
    assert report.comparison(runs) in done.stdout
    assert "matched" in report.comparison(runs)


def test_residual_20_learns_the_synthetic_images(tmp_path):
    spec = RunSpec(data="synthetic", batch_size=128, lr=0.1, max_steps=300)  # type: ignore[arg-type]
    run = gradflow.run(spec, runs_dir=str(tmp_path))
    assert run.metrics["train_accuracy"] >= 0.95
    assert run.metrics["test_accuracy"] >= 0.90
