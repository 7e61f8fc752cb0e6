"""Runs with a probe: what is asked for, what is recorded, and that nothing is trained for it."""

import subprocess
import sys

import numpy as np
import pytest

import gradflow
from gradflow import probe, spec
from gradflow.data import load_data
from gradflow.errors import SpecError
from gradflow.measures import hidden, layers, readings
from gradflow.spec import DataSpec, RunSpec

SMALL = {
    "network": "mlp", "depth": 6, "width": 16, "norm": "none", "skip": False, "batch_size": 32,
    "data": {"name": "gaussian", "channels": 16, "size": 1, "train": 64, "test": 8},
}  # fmt: skip
CHAIN = {"target": "gradflow.networks.chain", "args": {"depth": 6, "width": 16, "branch": "linear"}}
TOKENS = {"target": "gradflow.networks.transformer.transformer", "args": {"depth": 2, "width": 16}}
WHERE = {
    "jacobian": {**SMALL, "network": CHAIN, "depth": 6, "width": None, "norm": None, "skip": None},
    "shattering": {**SMALL, "data": {"name": "gaussian", "channels": 1, "size": 1}},
    "path_length": {**SMALL, "skip": True},
    "length_ratio": {**SMALL, "probe": {"name": "length_ratio", "networks": 5}},
    "token_cosine": {"network": TOKENS, "batch_size": 4,
                     "data": {"name": "gaussian", "channels": 3, "size": 4}},
    "underflow": {**SMALL, "init": "gaussian", "sigma_w": 1e-20},
    "displacement": {**SMALL, "max_steps": 2},
    "lesion": {"depth": 8, "width": 4, "max_steps": 2, "data": {"name": "synthetic", "train": 64}},
}  # fmt: skip


def run(tmp_path, **keys):
    return gradflow.run(RunSpec(**keys), runs_dir=str(tmp_path), threads=1)


def test_names_are_those_of_the_specs():
    assert tuple(probe.PROBES) == spec.PROBES


@pytest.mark.parametrize("name", spec.PROBES)
def test_every_probe_can_be_asked_for(name, tmp_path):
    keys = {"probe": name, **WHERE.get(name, SMALL)}
    keys = {key: value for key, value in keys.items() if value is not None}
    done = run(tmp_path, **keys)
    assert done.status == "done"
    table = done.table("probes")
    assert table is not None
    assert set(table["step"].to_pylist()) == {keys.get("max_steps", 0)}
    assert np.isfinite(table["value"].to_numpy()).any()


def test_a_probe_is_no_training_and_is_made_once(tmp_path):
    """Without Lightning; the second call finds it."""
    code = (
        "import sys, gradflow\n"
        f"run = lambda: gradflow.run(gradflow.RunSpec(probe='cosine', **{SMALL!r}), "
        f"runs_dir={str(tmp_path)!r}, emit=seen.append)\n"
        "seen = []; run(); run()\n"
        "print('pytorch_lightning' in sys.modules, [e['reused'] for e in seen if e['event'] == "
        "'end'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False [False, True]"


def test_the_pass_is_that_of_a_random_readout(tmp_path):
    """A linear chain of orthogonal maps keeps every norm; the loss is no cross-entropy."""
    args = {**CHAIN["args"], "init": "orthogonal", "activation": "linear"}
    keys = {**SMALL, "network": {**CHAIN, "args": args}, "probe": "propagation"}
    del keys["width"], keys["norm"], keys["skip"]
    done = run(tmp_path, **keys)
    norms = hidden(done, "output_grad_norm")
    assert norms == pytest.approx(np.full(6, norms[0]), rel=1e-5)
    assert norms[0] == pytest.approx(np.sqrt(32 * 16), rel=0.15)  # of 32 × 16 standard normals
    rms = layers(done, "outputs", "output_rms", kind="linear")[1]
    names, _, variances = readings(done, "batch_variance")
    assert len(names) == len(variances) > 0
    assert rms[0] == pytest.approx(1.0, rel=0.15)


def test_only_the_last_blocks_move(tmp_path):
    keys = {"depth": 14, "width": 4, "max_steps": 3, "data": "synthetic", "trainable_blocks": 1}
    done = run(tmp_path, probe="displacement", **keys)
    names, _, values = readings(done, "displacement")
    moved = {name for name, value in zip(names, values, strict=True) if value > 0}
    last = {name for name in names if name.startswith(("layer3.1", "fc"))}
    assert {name for name in moved if name in last} == {n for n in last if "skip" not in n}
    assert all(name in last for name in moved)
    assert done.run_id != RunSpec(probe="displacement", **keys | {"trainable_blocks": 2}).run_id


def test_what_may_be_asked():
    assert RunSpec(probe="jacobian", **SMALL).max_steps == 0
    assert RunSpec(probe="jacobian", epochs=2, **SMALL).max_steps is None
    assert RunSpec(probe="lesion").epochs == spec.EPOCHS
    assert RunSpec(probe={"name": None}).run_id == RunSpec().run_id
    assert RunSpec(probe="shattering", **SMALL).probe.points == 256
    for line, keys in {
        "probe=lesion: says nothing of a network not trained": {"probe": "lesion", "max_steps": 0},
        "probe.points=9: probe=cosine does not use probe.points": {
            "probe": {"name": "cosine", "points": 9}
        },
        "probe.format=fp8: allowed is fp16, bf16, fp32, fp64": {
            "probe": {"name": "underflow", "format": "fp8"}
        },
        "norm=batch: probe=jacobian is of one input, without batch statistics": {
            "probe": "jacobian"
        },
        "precision=bf16: probe=cosine wants fp32 or fp64": {
            **SMALL,
            "probe": "cosine",
            "precision": "bf16",
        },
        "data.size=4: allowed is a whole number from 8": {"data": {"name": "synthetic", "size": 4}},
    }.items():
        with pytest.raises(SpecError) as caught:
            RunSpec(**keys)
        assert str(caught.value) == line


def test_gaussian_images_are_what_theory_assumes():
    data = load_data(DataSpec("gaussian", channels=300, size=1, train=200, test=10))
    x = data.train.images.flatten(1)
    cosines = (x @ x.T / x.norm(dim=1).outer(x.norm(dim=1)))[~np.eye(200, dtype=bool)]
    assert float(cosines.abs().mean()) == pytest.approx(np.sqrt(2 / np.pi / 300), rel=0.05)
    assert float(x.square().mean()) == pytest.approx(1.0, abs=0.01)
    assert set(data.train.labels.tolist()) == set(range(10))


def test_from_the_command_line(command, tmp_path):
    keys = ["network=mlp", "depth=6", "width=16", "norm=none", "skip=false", "threads=1"]
    done = command("-m", "gradflow", "-m", *keys, "probe=cosine,propagation", "jobs=1")
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 done." in done.stdout
    wrong = command("-m", "gradflow", *keys, "probe=cosin")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("gradflow: probe.name=cosin: allowed is propagation, cosine,")
