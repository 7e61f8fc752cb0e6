"""A spec becomes a record: certificates, metrics, what is measured and what is reused."""

import json
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

import gradflow
from gradflow.data import Batches, load_data
from gradflow.errors import GradflowError, SpecError
from gradflow.networks import build
from gradflow.run import _try_out
from gradflow.spec import RunSpec

TINY = {"depth": 8, "width": 4, "batch_size": 100, "max_steps": 3}


@pytest.fixture
def run(tmp_path):
    def call(**keys):
        options = {"runs_dir": str(tmp_path / "runs"), "threads": 1}
        options |= {name: keys.pop(name) for name in ("logger", "emit", "device") if name in keys}
        return gradflow.run(RunSpec(**TINY | keys), **options)

    return call


def test_a_matched_pair_is_certified_as_one(run):
    plain, residual = run(skip=False), run(skip=True)
    one, other = plain.record["certificate"], residual.record["certificate"]
    assert one == other
    assert one["parameter_count"] == sum(p.numel() for p in _network(RunSpec(**TINY)).parameters())
    assert run(skip=True, seed=1).record["certificate"]["batches"] != one["batches"]
    gated = run(skip="highway").record["certificate"]
    shared = {name: gated["parameters"][name] for name in one["parameters"]}
    assert shared == one["parameters"]
    assert gated["batches"] == one["batches"]
    extras = set(gated["parameters"]) - set(one["parameters"])
    assert extras
    assert all(".skip.gate." in name for name in extras)


def _network(spec: RunSpec) -> torch.nn.Module:
    return build(spec, in_channels=1, num_classes=10)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_step_0_is_the_gradient_at_initialisation(run, precision):
    """Against one backward pass by hand; and the probe's step 0 is the training's step 0."""
    spec = RunSpec(**TINY, precision=precision)
    data, network = load_data(spec.data), _network(spec)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    network.to(dtype)
    images, labels, _ = next(iter(Batches(data.train, batch_size=100)))
    functional.cross_entropy(network(images.to(dtype)), labels).backward()
    probe = run(precision=precision, max_steps=0).with_modules("weights").set_index("layer")
    for name, module in network.named_modules():
        own = [p.grad.double().flatten() for p in module.parameters(recurse=False)]
        if own:
            expected = torch.cat(own).norm().item()
            assert probe.loc[name, "weight_grad_norm"] == pytest.approx(expected, rel=1e-4)
    trained = run(precision=precision).frame("weights")
    first = trained[trained["step"] == 0].set_index("layer")
    np.testing.assert_allclose(
        first["weight_grad_norm"].astype(float),
        probe.loc[first.index, "weight_grad_norm"].astype(float),
        rtol=1e-5,
    )


@pytest.mark.parametrize("keys", [{"skip": "stochastic_depth", "drop_rate": 0.9, "depth": 20}, {}])
def test_step_0_is_that_of_training_also_where_the_network_draws(run, keys):
    keys |= {"batch_size": 50, "accumulate": 2}
    torch.manual_seed(1)
    probe = run(**keys, max_steps=0).frame("steps")
    torch.manual_seed(2)
    trained = run(**keys).frame("steps")
    for name in ("loss", "accuracy", "grad_norm"):
        assert probe[name][0] == pytest.approx(trained[name][0], rel=1e-5)


def test_metrics_are_evaluation_mode_passes_over_whole_splits(run):
    """Repeated by hand: the recipe in a bare loop ends with the same numbers."""
    done = run(lr=0.1, schedule="constant", weight_decay=0.01, max_steps=20)
    spec = RunSpec(**TINY | {"max_steps": 20}, lr=0.1, schedule="constant", weight_decay=0.01)
    data, network = load_data(spec.data), _network(spec)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for images, labels, _ in islice(Batches(data.train, batch_size=100), 20):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    for split, name in ((data.train, "train"), (data.test, "test")):
        with torch.no_grad():
            logits = network(split.images)
        loss = functional.cross_entropy(logits, split.labels).item()
        accuracy = (logits.argmax(1) == split.labels).float().mean().item()
        assert done.metrics[f"{name}_loss"] == pytest.approx(loss, rel=1e-3)
        assert done.metrics[f"{name}_accuracy"] == pytest.approx(accuracy, abs=2e-3)


def test_the_store_is_what_the_contract_says(run):
    done = run(skip=True, record="all")
    assert {path.name for path in done.path.iterdir()} == {
        "spec.json", "run.json", "modules.parquet", "weights.parquet", "outputs.parquet",
        "blocks.parquet", "steps.parquet", "evaluations.parquet",
    }  # fmt: skip
    columns = {p.stem: pq.read_schema(p).names for p in done.path.glob("*.parquet")}
    assert columns["weights"] == ["step", "layer", "weight_grad_norm", "weight_norm", "update_norm"]
    assert columns["outputs"] == ["step", "layer", "output_rms", "output_grad_norm"]
    assert columns["blocks"] == [
        "step", "layer", "branch_rms", "skip_rms", "branch_grad_norm", "skip_grad_norm"
    ]  # fmt: skip
    assert columns["modules"] == [
        "layer", "position", "kind", "stage", "shape", "parameters", "calls"
    ]  # fmt: skip
    assert {"step", "loss", "lr", "grad_norm", "accuracy"} <= set(columns["steps"])
    assert columns["evaluations"][:2] == ["step", "split"]
    field = pq.read_schema(done.path / "weights.parquet").field("weight_grad_norm")
    assert b"before clipping" in field.metadata[b"meaning"]
    assert str(pq.read_schema(done.path / "weights.parquet").field("step").type) == "int32"
    modules = done.frame("modules")
    assert list(modules["position"]) == list(range(len(modules)))
    assert modules["parameters"].sum() == done.record["certificate"]["parameter_count"]
    assert set(done.frame("evaluations")["split"]) == {"train", "test", "train_batches"}
    assert done.spec == json.loads(json.dumps(RunSpec(**TINY, record="all").to_dict()))


def test_load_runs_gives_the_numbers_of_the_files(run, tmp_path):
    done = [run(skip=skip, seed=seed) for skip in (True, False) for seed in (0, 1)]
    runs = gradflow.load_runs(tmp_path / "runs")
    assert len(runs) == 4
    frame = runs.weights("weight_grad_norm")
    assert {"run_id", "network", "depth", "skip", "seed", "step", "layer", "position"} <= set(frame)
    for one in done:
        mine = frame[frame["run_id"] == one.run_id]
        assert set(mine["skip"]) == {one.spec["skip"]}
        there = pq.read_table(one.path / "weights.parquet")
        assert mine["weight_grad_norm"].tolist() == there["weight_grad_norm"].to_pylist()
        assert mine["layer"].tolist() == there["layer"].to_pylist()
    overview = runs.runs.set_index("run_id")
    for one in done:
        assert overview.loc[one.run_id, "train_accuracy"] == one.metrics["train_accuracy"]


def test_what_is_done_is_not_computed_again_but_a_failure_is(run):
    events = []
    first = run(emit=events.append)
    assert [e["event"] for e in events if e["event"] in ("begin", "end")] == ["begin", "end"]
    events.clear()
    again = run(emit=events.append)
    assert [e["event"] for e in events] == ["end"]
    assert events[0]["reused"] is True
    assert again.path == first.path
    record = json.loads((first.path / "run.json").read_text())
    (first.path / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    events.clear()
    assert run(emit=events.append).status == "done"
    assert [event["event"] for event in events[:2]] == ["claimed", "begin"]


def test_a_network_of_the_users_own(run, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "import torch\n"
        "def make(width):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width),\n"
        "                               torch.nn.ReLU(), torch.nn.Linear(width, 10))\n"
        "def broken():\n"
        "    raise RuntimeError('as written')\n"
        "def narrow():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 10))\n"
        "def three():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))\n"
        "class Leave(torch.nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        raise SystemExit(3)\n"
        "def leave():\n"
        "    return torch.nn.Sequential(Leave(), torch.nn.Linear(64, 10))\n"
        "class Detached(torch.nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).detach()\n"
        "def detached():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), Detached())\n"
        "def frozen():\n"
        "    return detached().requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"depth": None, "width": None, "network": {"target": "mynet.make", "args": {"width": 5}}}
    done = run(**own)
    assert done.path.name.startswith("custom-na-na-s0-")
    assert list(done.frame("modules")["layer"]) == ["1", "3"]
    assert done.record["certificate"] == run(**own, max_steps=4).record["certificate"] | {
        "batches": done.record["certificate"]["batches"]
    }
    for name, message in (
        ("broken", "as written"),
        ("narrow", r"images \[2, 1, 8, 8\] do not pass"),
        ("three", r"returns \[2, 3\], wants logits \[2, 10\]"),
        ("leave", r"called sys.exit\(3\)"),
        ("detached", "its logits have no gradient: they are detached from its parameters"),
        ("frozen", "has no parameters to train"),
        ("absent", "cannot be imported"),
    ):
        with pytest.raises(GradflowError, match=message) as caught:
            run(**own | {"network": {"target": f"mynet.{name}"}})
        assert "\n" not in str(caught.value)
    statuses = [one.status for one in gradflow.load_runs(tmp_path / "runs")]
    assert sorted(statuses) == ["done"] * 2 + ["failed"] * 6  # none of what cannot be imported


def test_trying_out_leaves_a_network_as_it_was():
    args = {"name": "cifar", "depth": 8, "width": 4, "in_channels": 1}
    spec = RunSpec(network={"target": "gradflow.build_network", "args": args})
    network = _network(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _try_out(network, spec, load_data(spec.data))
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_users_files_are_read_again_before_a_run_is_reused(run, tmp_path):
    for name, value in (("train", 0.0), ("test", 1.0)):
        x = np.random.default_rng(0).normal(value, 1, (100, 1, 8, 8))
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(100) % 10)
    data = {"name": "files", "root": str(tmp_path)}
    events = []
    for changed in (False, False, True):
        if changed:
            np.savez(tmp_path / "test.npz", x=x + 1, y=np.arange(100) % 10)
        run(data=data, max_steps=0, emit=events.append)
    assert [e["reused"] for e in events if e["event"] == "end"] == [False, True, False]
    with pytest.raises(GradflowError, match="batch_size=101, accumulate=1: there are 100 training"):
        run(data=data, max_steps=1, batch_size=101)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_devices_that_are_not_there(run):
    with pytest.raises(GradflowError, match="device=mps: this machine has no such device"):
        run(device="mps")
    with pytest.raises(SpecError, match="precision=fp16: the CPU"):
        run(device="cpu", precision="fp16")


def test_a_run_that_raises_is_failed_and_says_why(run, tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "import torch\n"
        "class Late(torch.nn.Linear):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        "        if self.calls == 5:  # the first two are the trying out\n"
        "            raise ValueError('enough')\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), Late(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="enough"):
        run(depth=None, width=None, network={"target": "late.make"})
    [failed] = gradflow.load_runs(tmp_path / "runs")
    assert failed.status == "failed"
    assert failed.record["error"] == "ValueError: enough"
    assert list(failed.frame("steps")["step"]) == [0, 1]
