"""Training: schedules in closed form, precision, clipping, accumulation, divergence."""

import math

import numpy as np
import pytest
import torch

import gradflow
from gradflow.spec import RunSpec
from gradflow.training import module
from gradflow.training.module import make_optimizer, make_scheduler, rate

TINY = {"depth": 8, "width": 4, "batch_size": 100, "max_steps": 3}


@pytest.fixture
def run(tmp_path):
    def call(**keys):
        return gradflow.run(RunSpec(**TINY | keys), runs_dir=str(tmp_path), threads=1)

    return call


def rates(total: int, **keys) -> list[float]:
    spec = RunSpec(**keys)
    network = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(network, spec)
    scheduler = make_scheduler(optimizer, spec, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_and_step_schedules():
    assert rates(4, schedule="constant", lr=0.3) == pytest.approx([0.3] * 4)
    got = rates(6, schedule="step", milestones=[2, 4], lr=1.0)
    assert got == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_ends_at_nothing():
    got = rates(10, schedule="cosine", lr=2.0)
    assert got == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(10)])
    assert rate(10, RunSpec(schedule="cosine"), 10) == pytest.approx(0)


def test_warmup_rises_linearly():
    got = rates(6, schedule="constant", warmup=3, lr=1.0)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_one_cycle_peaks_at_lr():
    got = rates(100, schedule="one_cycle", lr=0.5)
    assert got[0] == pytest.approx(0.5 / 25)
    assert max(got) == pytest.approx(0.5)
    assert np.argmax(got) == 29
    assert got[-1] < 1e-4


def test_the_recorded_rate_is_the_one_of_the_step(run):
    steps = run(schedule="step", milestones=[1], lr=1e-3).frame("steps")
    assert steps["lr"].tolist() == pytest.approx([1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers(optimizer):
    made = make_optimizer(torch.nn.Linear(2, 2), RunSpec(optimizer=optimizer, weight_decay=0.1))
    assert type(made).__name__.lower() == optimizer
    assert made.defaults["weight_decay"] == 0.1


NETWORKS = [
    {"shortcut": "A"},
    {"shortcut": "B", "order": "pre"},
    {"skip": "none", "norm": "none", "padding": "circular"},
    {"skip": "stochastic_depth", "drop_rate": 0.9},
    {"skip": "highway"},
    {"trainable_blocks": 1},
    {"network": "imagenet", "depth": 18, "width": 4},
    {"network": "mlp", "depth": 5, "width": 8, "skip": "stochastic_depth", "drop_rate": 0.9},
]


@pytest.mark.parametrize("keys", NETWORKS, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_fused_update_is_the_one_parameter_by_parameter(optimizer, keys, monkeypatch, tmp_path):
    """Fused kernels take each gradient to lie in memory as its parameter does: whatever a network
    does, they must, in every step."""
    spec = RunSpec(**TINY | keys | {"optimizer": optimizer, "precision": "fp64", "lr": 1e-3})
    made = []

    def plain(network, spec):
        optimizer = make_optimizer(network, spec)
        made.append(optimizer.defaults["fused"])
        optimizer.defaults["fused"] = False
        for group in optimizer.param_groups:
            group["fused"] = False
        return optimizer

    fused = gradflow.run(spec, runs_dir=str(tmp_path / "fused"), threads=1)
    monkeypatch.setattr(module, "make_optimizer", plain)
    alone = gradflow.run(spec, runs_dir=str(tmp_path / "alone"), threads=1)
    assert made == [True]
    for table, columns in {"steps": ["loss", "grad_norm"], "weights": ["weight_grad_norm"]}.items():
        for column in columns:
            np.testing.assert_allclose(
                fused.frame(table)[column].astype(float),
                alone.frame(table)[column].astype(float),
                rtol=1e-10,
            )


def test_networks_of_others_and_half_precision_have_no_fused_kernels():
    """Gradients may be sparse there, and clipping is refused."""
    network = torch.nn.Linear(2, 2)
    custom = RunSpec(network={"name": "custom", "target": "torch.nn.Linear"})
    assert not make_optimizer(network, custom).defaults["fused"]
    assert not make_optimizer(network, RunSpec(precision="bf16")).defaults["fused"]


def test_gradients_are_recorded_before_they_are_clipped(run):
    free, clipped = run(), run(clip=1e-3, record="all", optimizer="sgd", momentum=0.0)
    first = [one.frame("steps")["grad_norm"][0] for one in (free, clipped)]
    assert first[0] == first[1] > 1e-2
    updates = clipped.frame("weights")
    lr = clipped.frame("steps")["lr"][0]
    step = updates[updates["step"] == 0]["update_norm"].astype(float)
    decay = 1e-4 * updates[updates["step"] == 0]["weight_norm"].astype(float)
    total = math.sqrt((step**2).sum())
    assert total <= lr * (1e-3 + math.sqrt((decay**2).sum())) * 1.01


def test_train_batches_are_means_over_the_updates(run):
    """Of loss and accuracy, also where an update has several batches."""
    for accumulate in (1, 2):
        done = run(batch_size=100, accumulate=accumulate, max_steps=None, epochs=2)
        steps, per_epoch = done.frame("steps"), 14 // accumulate
        seen = done.frame("evaluations")
        seen = seen[seen["split"] == "train_batches"].reset_index()
        assert seen["step"].tolist() == [per_epoch, 2 * per_epoch]
        for epoch in (0, 1):
            part = steps.iloc[epoch * per_epoch : (epoch + 1) * per_epoch]
            for name in ("loss", "accuracy"):
                assert seen[name][epoch] == pytest.approx(part[name].mean(), rel=1e-5)


def test_rates_of_recording(run):
    done = run(record={"every": {"weights": 2, "outputs": 0, "blocks": 7}}, max_steps=9)
    assert sorted(set(done.frame("weights")["step"])) == [0, 2, 4, 6, 8]
    assert done.table("outputs") is None
    assert sorted(set(done.frame("blocks")["step"])) == [0, 1, 2, 3, 4, 7]


def test_momentum_is_constant_under_one_cycle():
    network = torch.nn.Linear(2, 2)
    spec = RunSpec(momentum=0.8)
    optimizer = make_optimizer(network, spec)
    scheduler = make_scheduler(optimizer, spec, 10)
    for _ in range(9):
        assert optimizer.param_groups[0]["momentum"] == 0.8
        optimizer.step()
        scheduler.step()


def test_accumulated_batches_make_the_gradient_of_one(run):
    """Without batch statistics, two halves accumulated are one whole."""
    keys = {"norm": "none", "padding": "circular", "weight_decay": 0.0}
    whole = run(**keys).frame("steps")
    halves = run(**keys, batch_size=50, accumulate=2).frame("steps")
    np.testing.assert_allclose(halves["loss"], whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(halves["grad_norm"], whole["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(halves["accuracy"], whole["accuracy"], rtol=1e-5)


def test_bf16_is_near_fp32_and_fp64_nearer(run):
    losses = {p: run(precision=p).frame("steps")["loss"][0] for p in ("fp32", "bf16", "fp64")}
    assert losses["fp64"] == pytest.approx(losses["fp32"], rel=1e-6)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


def test_what_is_random_depends_on_the_step_alone(run):
    """Stochastic depth draws the same blocks whatever was drawn before, recorded or not."""
    keys = {"skip": "stochastic_depth", "depth": 20, "drop_rate": 0.9}
    torch.manual_seed(1)
    one = run(**keys).frame("steps")
    torch.manual_seed(2)
    other = run(**keys, record="all").frame("steps")
    assert one["loss"].tolist() == other["loss"].tolist()


def test_recording_changes_no_result(run):
    keys = {"depth": 14, "max_steps": 12}
    runs = [run(**keys, record=record) for record in ("none", "default", "all")]
    losses = [one.frame("steps")["loss"].tolist() for one in runs]
    assert losses[0] == losses[1] == losses[2]
    assert {name for name in ("weights", "outputs", "blocks") if not runs[0].frame(name).empty} == (
        set()
    )


# --- divergence -----------------------------------------------------------------------------------

HOT = {"lr": 1e9, "schedule": "constant", "norm": "none", "max_steps": 40}


def test_a_diverged_run_names_step_and_module(run):
    done = run(**HOT)
    assert done.status == "diverged"
    found = done.record["divergence"]
    steps = done.frame("steps")
    finite = np.isfinite(steps[["loss", "grad_norm"]].astype(float)).all(axis=1)
    assert found["step"] == int(np.argmin(finite)) == len(steps) - 1
    assert done.record["steps"] == found["step"]  # the update of that step was not applied
    modules = set(done.frame("modules")["layer"])
    assert found["layer"] in modules
    assert set(done.frame("weights")["step"]) == set(range(len(steps)))


def test_a_diverged_step_updates_nothing(run):
    """The run stops with the parameters of its last finite update: a step less is the same run."""
    done = run(**HOT)
    step = done.record["divergence"]["step"]
    shorter = run(**HOT | {"max_steps": step})
    assert shorter.status == "done"
    assert done.metrics == pytest.approx(shorter.metrics, nan_ok=True)
    final = done.frame("evaluations")
    assert final[final["split"] == "train"]["step"].tolist() == [step]


def test_the_module_is_found_where_outputs_were_not_measured(run):
    hot = HOT | {"record": {"every": {"outputs": 1, "blocks": 0}}}
    seen = run(**hot).record["divergence"]
    blind = run(**hot | {"record": {"every": {"outputs": 0, "blocks": 0}}}).record["divergence"]
    assert seen == blind


def test_continue_goes_on_and_says_so(run):
    done = run(**HOT | {"on_divergence": "continue", "max_steps": 12})
    assert done.record["steps"] == 12
    assert len(done.frame("steps")) == 12
    assert done.status == "diverged"
    assert done.record["divergence"]["step"] < 12
