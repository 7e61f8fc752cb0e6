"""`python -m experiments`: a finding is one file, from its runs to its verdict and back."""

import pytest

import experiments
from experiments import __main__ as command_line
from gradflow import load_runs

FILE = '''"""A linear chain of orthogonal maps keeps the gradient at any depth.

Source: Saxe et al. 2013 (arXiv 1312.6120).

Measured: ρ.

Deviations: none.

Cost: {seeds} runs, 1 s.
"""

from gradflow.findings import Comparison, Finding, about
from gradflow.measures import growth

FINDING = Finding(
    source="Saxe et al. 2013, arXiv 1312.6120",
    chapter="initialisation",
    specs={{
        "orthogonal": {{
            "network": {{
                "target": "gradflow.networks.chain",
                "args": {{"depth": 14, "width": 8, "branch": "linear", "activation": "linear",
                         "init": "orthogonal"}},
            }},
            "data": {{"name": "gaussian", "channels": 8, "size": 1}},
            "probe": "propagation",
        }}
    }},
    comparisons=(
        Comparison("ρ", ("orthogonal",), growth(), about({rate}, 0.01), ratio=True, unit="ρ"),
    ),
    recorded="{recorded}",
    seeds={seeds},
)
'''


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line over a directory with one finding; returns exit code and both texts."""
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path)])

    def run(*arguments, name="kept", rate=1.0, recorded="reproduced", seeds=4):
        text = FILE.format(rate=rate, recorded=recorded, seeds=seeds)
        (tmp_path / f"{name}.py").write_text(text)
        code = command_line.main([*arguments, "--runs", str(tmp_path / "runs")])
        return (code, *capsys.readouterr())

    return run


def test_from_a_file_to_a_verdict(call, tmp_path):
    code, said, _ = call()
    assert code == 0
    assert "kept: not run\n      A linear chain of orthogonal maps" in said
    code, said, _ = call("kept", "--quick", "--check")
    assert code == 0
    assert "kept: reproduced, quick" in said
    assert len(load_runs(tmp_path / "runs")) == 3
    code, said, _ = call("--all", "--check")
    assert code == 0
    assert "1 finding: 1 reproduced.\n4 runs: 4 done; 3 of them from before." in said
    code, said, _ = call()
    assert "kept: reproduced" in said


def test_a_verdict_that_is_not_the_recorded_one(call):
    code, said, error = call("other", "--check", name="other", rate=2.0)
    assert code == 1
    assert "other: contradicted" in said
    assert error.splitlines()[-1] == "experiments: other: contradicted; recorded is reproduced"
    code, *_ = call("other", name="other", rate=2.0)
    assert code == 0


def test_a_file_that_cannot_be_read_is_named(call, tmp_path):
    (tmp_path / "broken.py").write_text("FINDING = 1 / 0\n")
    code, _, error = call("unread", name="unread")
    assert code == 1
    assert error == "experiments: broken.py: ZeroDivisionError: division by zero\n"


def test_an_unknown_id(call):
    code, _, error = call("kepd")
    assert code == 1
    assert error == "experiments: kepd: no such finding; did you mean kept?\n"


def test_the_catalogue_is_whole():
    """Twelve findings of the core story and twenty-one of propagation at initialisation."""
    assert len(experiments.load()) == 33
