"""Other people's models by import path, and torchvision's parameters in gradflow's networks."""

import contextlib
import json

import numpy as np
import pytest
import torch
from formats import write_folder
from torch.nn.functional import cross_entropy

import gradflow
from gradflow import networks, report, tables
from gradflow.errors import GradflowError
from gradflow.networks import build_network
from gradflow.spec import DataSpec, RunSpec
from gradflow.training.evaluation import evaluate

torchvision = pytest.importorskip("torchvision")  # these are read where there is none, too
pytestmark = pytest.mark.vision

SMALL = {"name": "synthetic", "size": 32, "train": 32, "test": 20}
MODELS = {
    "vgg16": ("torchvision.models.vgg16", {"num_classes": 10}),
    "alexnet": ("torchvision.models.alexnet", {"num_classes": 10}),
    "googlenet": (
        "torchvision.models.googlenet",
        {"num_classes": 10, "aux_logits": False, "init_weights": False},
    ),
    "densenet": ("torchvision.models.densenet121", {"num_classes": 10}),
    "mobilenet": ("torchvision.models.mobilenet_v3_small", {"num_classes": 10}),
    "vit": (
        "torchvision.models.VisionTransformer",
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
         "mlp_dim": 32, "num_classes": 10},
    ),
    "timm-resnet": ("timm.create_model", {"model_name": "resnet18", "num_classes": 10}),
    "timm-vit": (
        "timm.create_model",
        {"model_name": "vit_tiny_patch16_224", "num_classes": 10, "img_size": 32, "drop_rate": 0.1},
    ),
    "own": ("gradflow.networks.alexnet", {"num_classes": 10}),
}  # fmt: skip


def spec_of(name: str, **keys) -> RunSpec:
    target, args = MODELS[name]
    data = SMALL | ({"size": 64} if name in ("alexnet", "own") else {})
    keys = {"batch_size": 8, "max_steps": 0} | keys
    return RunSpec(network={"target": target, "args": args}, data=data, **keys)  # type: ignore[arg-type]


def run(spec: RunSpec, store, **settings):
    return gradflow.run(spec, runs_dir=str(store), threads=1, **settings)


# --- by import path -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_recorded_and_reported(tmp_path, name):
    """Every weight layer has a gradient, which is that of a pass of the model by itself."""
    spec = spec_of(name)
    done = run(spec, tmp_path / "runs")
    weights = tables.profile(done.with_modules("weights"), "weight_grad_norm")
    found = weights.set_index("layer")["weight_grad_norm"]
    data = gradflow.data.load_data(spec.data)
    model = networks.build(spec, in_channels=3, num_classes=10)
    images, labels, _ = next(iter(gradflow.data.Batches(data.train, batch_size=8, seed=0)))
    gradflow.data.seed_step(0, 0, 0)
    cross_entropy(model.train()(images), labels).backward()
    for layer, module in model.named_modules():
        own = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if own and layer in found.index:
            norm = torch.cat([gradient.flatten() for gradient in own]).double().norm().item()
            assert found[layer] == pytest.approx(norm, rel=2e-3, abs=1e-9), layer
    assert len(found) >= 8
    assert (found[[kind in ("conv", "linear") for kind in weights["kind"]]] >= 0).all()
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize("name", ["mobilenet", "timm-vit"])
def test_dropout_depends_on_the_runs_seed_alone(tmp_path, name):
    finals = set()
    for store in ("one", "other"):
        torch.manual_seed(len(finals) + 7)
        done = run(spec_of(name, max_steps=2, record="none"), tmp_path / store)
        finals.add(done.record["final_parameters"])
    assert len(finals) == 1


def test_a_model_with_other_outputs_in_training_is_one_line(tmp_path):
    args = {"num_classes": 10, "init_weights": False}
    network = {"target": "torchvision.models.googlenet", "args": args}
    spec = RunSpec(network=network, data=SMALL, max_steps=2, batch_size=8)  # type: ignore[arg-type]
    expected = (
        "network.target=torchvision.models.googlenet: returns GoogLeNetOutputs in training mode, "
        r"wants logits \[2, 10\] alone: switch other heads off, e.g. by {aux_logits:false}$"
    )
    with pytest.raises(GradflowError, match=expected):
        run(spec, tmp_path)


def test_a_try_out_leaves_the_model_as_it_was(tmp_path):
    """Running statistics of the first step are those of the first batch alone."""
    from gradflow.run import _try_out

    spec = spec_of("mobilenet")
    model = networks.build(spec, in_channels=3, num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    _try_out(model, spec, gradflow.data.load_data(spec.data))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        ("torchvision.models.resnet18", {}, "returns [2, 1000], wants logits [2, 10]"),
        ("torchvision.models.resnet17", {}, "cannot be imported: AttributeError"),
        ("torchvision.models.resnet18", {"classes": 10}, "the call failed: TypeError"),
        (
            "timm.create_model",
            {"model_name": "resnet0"},
            "the call failed: RuntimeError: Unknown model (resnet0)",
        ),
        (
            "timm.create_model",
            {"model_name": "vit_tiny_patch16_224"},
            "images [2, 3, 32, 32] do not pass: Input height (32) doesn't match model (224).",
        ),
        (
            "torchvision.models.inception_v3",
            {"init_weights": False, "num_classes": 10},
            "images [2, 3, 32, 32] do not pass: Calculated padded input size per channel: (1 x 1)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, target, args, expected):
    spec = RunSpec(network={"target": target, "args": args}, data=SMALL, max_steps=0, batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(GradflowError) as caught:
        run(spec, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"network.target={target}: {expected}")
    assert "\n" not in said


OWN = """
from torch import nn


class Block(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.conv, self.norm, self.skip = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), skip

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return x + y if self.skip else y


def make(depth, skip):
    blocks = [Block(skip) for _ in range(depth - 2)]
    ends = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(ends[0], *blocks, *ends[1:])
"""


def test_a_users_module_in_the_working_directory_is_compared_pairwise(tmp_path, command):
    (tmp_path / "mymodels.py").write_text(OWN)
    done = command(
        "-m", "gradflow", "-m", "network.target=mymodels.make", "data=synthetic", "data.train=64",
        "network.args={depth:${depth},skip:${skip}}", "depth=6", "skip=true,false", "seed=0,1",
        "max_steps=2", "jobs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = gradflow.load_runs(tmp_path / "runs")
    frame = tables.overview(runs)
    pairs = tables.pairs(runs, frame)
    assert len(frame) == 4
    assert set(frame["group"]) == {0}
    assert list(pairs["match"]) == ["matched"] * 2
    assert sorted(pairs["seed"]) == [0, 1]
    shown = command("-m", "gradflow.report", "runs", "--text").stdout.splitlines()
    assert shown[0].split() == ["depth", "plain", "residual", "difference", "seeds", "matched"]
    assert shown[2].split()[0] == "6"
    assert shown[2].endswith("2 of 2")


# --- torchvision's parameters ---------------------------------------------------------------------


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("depth", [18, 50, 152])
def test_a_resnet_with_torchvisions_parameters_is_torchvisions(tmp_path, depth, training):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    with torch.no_grad():  # running statistics as after some training
        for _ in range(10):
            theirs(torch.randn(4, 3, 64, 64))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    ours = build_network("imagenet", depth=depth, num_classes=1000, weights=weights)
    check_equal(ours.train(training), theirs.train(training), torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_classics_with_torchvisions_parameters_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=20)
    ours = getattr(networks, name)(num_classes=20)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    check_equal(ours.train(), theirs.train(), torch.randn(2, 3, 96, 80))


def check_equal(ours, theirs, images) -> None:
    labels = torch.arange(len(images))
    results = []
    for network in (ours, theirs):
        torch.manual_seed(1)  # of dropout
        logits = network(images)
        cross_entropy(logits, labels).backward()
        results.append((logits.detach(), {name: p.grad for name, p in network.named_parameters()}))
    (found, gradients), (expected, wanted) = results
    assert relative(found, expected) < 1e-5
    assert gradients.keys() == wanted.keys()
    assert max(relative(gradients[name], wanted[name]) for name in wanted) < 1e-5
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_weights_on_a_folder_give_top_1_and_top_5_and_the_gradients(tmp_path, command):
    """Classes are numbered in the order of their directories' names, as torchvision's are."""
    write_folder(tmp_path / "folder", classes=12, train=4, val=3)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=12)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    keys = ("network=imagenet", "depth=18", "weights=weights.pth", "data=imagefolder")
    done = command(
        "-m", "gradflow", *keys, "data.root=folder", "data.size=64", "batch_size=16", "max_steps=0",
        "threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [found] = gradflow.load_runs(tmp_path / "runs")
    folder = {"name": "imagefolder", "root": str(tmp_path / "folder"), "size": 64, "workers": 0}
    data = gradflow.data.load_data(DataSpec(**folder))
    expected = evaluate(theirs, data.test, contextlib.nullcontext())
    assert set(expected) == {"loss", "accuracy", "top5"}
    assert found.metrics == pytest.approx({f"test_{k}": v for k, v in expected.items()}, rel=1e-5)
    row = found.frame("evaluations").iloc[0]
    assert (row["step"], row["split"], row["top5"]) == (0, "test", found.metrics["test_top5"])
    first = found.frame("weights").query("layer == 'conv1' and step == 0")
    images, labels, _ = next(iter(gradflow.data.Batches(data.train, batch_size=16, seed=0)))
    cross_entropy(theirs.train()(images), labels).backward()
    norm = theirs.conv1.weight.grad.double().norm().item()
    assert float(first["weight_grad_norm"].iloc[0]) == pytest.approx(norm, rel=1e-4)
    assert f"(top-5 {expected['top5']:.3f})" in done.stdout
    assert json.loads((found.path / "spec.json").read_text())["weights_digest"]
    assert np.isfinite(norm)
