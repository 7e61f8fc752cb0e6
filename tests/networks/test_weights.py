"""`weights`: parameters from a file, known by its content, with a line for whatever is wrong."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
import torch

import gradflow
from gradflow.errors import SpecError
from gradflow.networks import build, build_network
from gradflow.spec import RunSpec
from gradflow.training.evaluation import evaluate

SMALL = {"depth": 18, "width": 4, "num_classes": 10}
DATA = {"name": "synthetic", "size": 32, "train": 64, "test": 50}


@pytest.fixture
def file(tmp_path):
    """Parameters of a small network that is not at its initialisation."""
    network = build_network("imagenet", **SMALL, seed=5)
    for buffer in network.buffers():
        if buffer.dtype.is_floating_point:
            buffer.add_(0.25)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def saved(tmp_path, state, name="other.pth"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def refused(match, path, **options):
    with pytest.raises(SpecError, match=match) as caught:
        build_network("imagenet", **SMALL | options, weights=str(path))
    assert "\n" not in str(caught.value)


def test_a_network_starts_from_the_file(file):
    state = torch.load(file)
    network = build_network("imagenet", **SMALL, seed=0, weights=str(file))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    spec = RunSpec(network="imagenet", depth=18, width=4, weights=str(file), precision="fp64")
    double = build(spec, in_channels=3, num_classes=10)
    assert all(
        torch.equal(tensor, state[name].double()) for name, tensor in double.named_parameters()
    )
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    build_network("imagenet", **SMALL, weights=str(saved(file.parent, old)))


def test_the_run_is_known_by_the_files_content_wherever_it_lies(file, tmp_path):
    keys = {"network": "imagenet", "depth": 18, "width": 4}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    spec = RunSpec(**keys, weights=str(file))
    assert spec.weights_digest == digest
    copied = tmp_path / "copy.pth"
    copied.write_bytes(file.read_bytes())
    assert RunSpec(**keys, weights=str(copied)).run_id == spec.run_id
    assert spec.run_id != RunSpec(**keys).run_id
    assert "weights" not in spec.to_dict()
    assert spec.to_dict()["weights_digest"] == digest
    told = RunSpec.from_dict(json.loads(json.dumps(spec.to_job())))
    assert (told.weights, told.run_id) == (str(file), spec.run_id)
    again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec.but(weights=None, weights_digest=digest)
    assert again.run_id == spec.run_id
    other = saved(tmp_path, {"a": torch.ones(1)})
    assert spec.but(weights=str(other)).weights_digest != digest
    assert spec.but(seed=1).weights_digest == digest
    assert spec.but(network="mlp", width=8, depth=4).weights_digest is None
    copied.write_bytes(other.read_bytes())  # another file at a known place
    assert RunSpec(**keys, weights=str(copied)).weights_digest != digest


def test_whatever_is_wrong_with_a_file_is_one_line(file, tmp_path):
    state = torch.load(file)
    refused(r"weights=/no/file: No such file or directory", "/no/file")
    refused(r"weights=.*: Is a directory", tmp_path)
    refused(r"weights=.*weights.pth: fc.weight is \[10, 32\], the network's is \[7, 32\]", file,
            num_classes=7)  # fmt: skip
    refused(r"conv1.weight is \[4, 3, 7, 7\], the network's is \[8, 3, 7, 7\]", file, width=8)
    refused(r"lacks layer1.2.conv1.weight and 79 more", file, depth=34)
    refused(r"has, and the network has not, bn1.running_mean and ", file, norm="layer")
    refused(r"lacks layer1.0.skip", file, skip="rezero")
    refused("they are a residual network's, not skip=none", file, skip=False)
    lacking = {name: tensor for name, tensor in state.items() if name != "fc.bias"}
    refused(r"other.pth: lacks fc.bias$", saved(tmp_path, lacking))
    more = saved(tmp_path, {**state, "fc2.bias": torch.zeros(1)})
    refused(r"has, and the network has not, fc2.bias$", more)
    refused(r"wants a state_dict, has keys epoch, state_dict$",
            saved(tmp_path, {"epoch": 3, "state_dict": state}))  # fmt: skip
    refused(r"wants a state_dict, has a list$", saved(tmp_path, [1]))
    refused(
        r"other.pth: damaged, or not what torch.save makes of a state_dict$",
        saved(tmp_path, build_network("imagenet", **SMALL)),
    )  # is code
    (tmp_path / "text.pth").write_text("no archive")
    refused(r"text.pth: damaged, or", tmp_path / "text.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[:-4000])
    refused(r"cut.pth: damaged, or", cut)
    refused(r"has the digest [0-9a-f]{16}, wanted is 0{16}", file, weights_digest="0" * 16)
    refused(r"weights_digest=abc: allowed is 16 hexadecimal digits", file, weights_digest="abc")
    with pytest.raises(SpecError, match=r"weights=a\.pth: network=cifar does not use weights"):
        RunSpec(weights="a.pth")
    with pytest.raises(SpecError, match=r"weights_digest=0{16}: name the file that has it"):
        build_network("imagenet", **SMALL, weights_digest="0" * 16)


def test_step_0_evaluates_before_the_pass_moves_the_statistics(file, tmp_path):
    spec = RunSpec(
        network="imagenet", depth=18, width=4, weights=str(file), data=DATA, batch_size=16,
        max_steps=0,
    )  # fmt: skip
    run = gradflow.run(spec, runs_dir=str(tmp_path / "runs"), threads=1)
    data = gradflow.data.load_data(spec.data)
    network = build_network("imagenet", **SMALL, weights=str(file))
    expected = evaluate(network, data.test, contextlib.nullcontext())
    found = {name: run.metrics[f"test_{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    rows = run.frame("evaluations")
    assert list(zip(rows["step"], rows["split"], strict=True)) == [(0, "test")]
    assert float(rows["loss"].iloc[0]) == run.metrics["test_loss"]
    weights = run.frame("weights")
    assert (weights["step"] == 0).all()
    assert np.isfinite(weights["weight_grad_norm"].to_numpy(float)).all()
    digests = run.record["certificate"]["parameters"]
    conv1 = torch.load(file)["conv1.weight"].numpy().tobytes()
    assert digests["conv1.weight"] == hashlib.sha256(conv1).hexdigest()[:16]
    assert "weights" not in run.spec
    assert gradflow.run(spec, runs_dir=str(tmp_path / "runs")).path == run.path
