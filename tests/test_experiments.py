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

    def run(*arguments, name="kept", rate=1.0, recorded="reproduced", seeds=8):
        text = FILE.format(rate=rate, recorded=recorded, seeds=seeds)
        (tmp_path / f"{name}.py").write_text(text)
        code = command_line.main([*arguments, "--runs", str(tmp_path / "runs")])
        return (code, *capsys.readouterr())

    return run


def test_from_a_file_to_a_verdict(call, tmp_path):
    code, said, _ = call()
    assert code == 0
    assert "kept: not run\n      A linear chain of orthogonal maps" in said
    code, said, _ = call("kept", "--quick", "--check", "--jobs", "1")
    assert code == 0
    assert "kept: reproduced, quick" in said
    assert len(load_runs(tmp_path / "runs")) == 6
    code, said, _ = call("--all", "--check", "--jobs", "1")
    assert code == 0
    assert "1 finding: 1 reproduced.\n8 runs: 8 done; 6 of them from before." in said
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
    core = """degradation causal_skip bn_explosion cifar_init_profile bn_residual_power_law
        degradation_without_vanishing one_step_relaxation shattering looks_linear_fix path_length
        lesion he2015_response"""
    propagation = """he_vs_xavier default_init_vanishing sigmoid_vanishing edge_of_chaos depth_scale
        resblock_growth tanh_residual_subexp ratio_to_one skipinit_downscaling identity_gradient
        shortcut_scaling highway_gate relu_cosine_collapse jacobian_spectrum width_variance
        delta_orthogonal layernorm_vs_batchnorm underflow_depth tat_slope preln_postln
        rank_collapse"""
    assert len(core.split()) == 12
    assert len(propagation.split()) == 21
    assert {*core.split(), *propagation.split()} <= set(experiments.load())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"probe": "propagation"', '"prob": "propagation"', "orthogonal: RunSpec.__init__"),
        ('"size": 1', '"size": -1', "orthogonal: data.size=-1: allowed is a whole number from 1"),
        ("Cost:", "Costs:", "its docstring has no paragraph 'Cost:'"),
        ("FINDING = Finding", "FINDING = dict", "FINDING is a dict, not a Finding"),
    ],
)
def test_a_finding_that_is_not_complete_is_named(call, monkeypatch, old, new, said):
    monkeypatch.setitem(globals(), "FILE", FILE.replace(old, new))
    code, _, error = call(name=f"wrong{abs(hash(new))}")
    assert code == 1
    assert said in error
    assert error.count("\n") == 1
