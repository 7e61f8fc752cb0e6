"""`GradientFlow` in a Trainer, against a `Recorder` in a bare loop."""

import copy
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradflow import GradientFlow, Recorder, Skip, load_runs
from gradflow.data import Batches, Split
from gradflow.errors import SpecError
from gradflow.recording import Divergence
from gradflow.spec import RunSpec
from gradflow.store import Run
from gradflow.training.module import Classifier

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

EVERY = lambda step: True  # noqa: E731
NEVER = dict.fromkeys(("weights", "outputs", "blocks"), lambda step: False)
TABLES = ("modules", "weights", "outputs", "blocks", "steps")
STEPS = 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.skip = nn.Linear(4, 4), nn.BatchNorm1d(4), Skip()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, self.norm(self.linear(x)))


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Residual(), nn.Linear(4, 1))


def batches() -> Tensor:
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01, weight_decay=0.1)


class Module(pl.LightningModule):
    """Somebody's: `disturb` may change a batch's loss, or raise."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        disturb: Callable[[int, Tensor], Tensor] = lambda batch, loss: loss,
    ) -> None:
        super().__init__()
        self.network, self.optimizer, self.disturb = make_network(), optimizer, disturb

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.disturb(batch_idx, self.network(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.network.parameters())


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **quiet | {"max_epochs": 1} | options)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(batches().flatten(0, 1)), batch_size=8)


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Lightning leaves it switched off."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fit(module: Module, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    made = trainer(*callbacks, **options)
    made.fit(module, loader())
    return made


def by_hand(accumulate: int = 1, clip: float | None = None, **options: Any) -> Recorder:
    """The same training as a bare loop."""
    network = make_network()
    optimizer = sgd(network.parameters())
    with Recorder(network, optimizer=optimizer, **options) as recorder:
        for group in batches().split(accumulate):
            optimizer.zero_grad()
            losses = []
            for batch in group:
                losses.append(network(batch).square().mean() / accumulate)
                losses[-1].backward()
            recorder.step(sum(loss.detach() for loss in losses))
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
    return recorder


def assert_equal(one: Recorder, other: Recorder) -> None:
    for table in TABLES:
        frames = one.table(table), other.table(table)
        assert len(frames[0])
        pd.testing.assert_frame_equal(*frames, check_exact=True)


# --- the same record ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_it_records_what_a_bare_loop_records(accumulate: int, clip: float | None) -> None:
    """Complete under accumulation, the loss its mean, gradients not yet clipped."""
    module = Module()
    flow = GradientFlow("all", EVERY, model=module.network)
    fit(module, flow, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    expected = by_hand(accumulate, clip, quantities="all", schedule=EVERY)
    assert_equal(flow.recorder, expected)
    steps = flow.recorder.table("steps")
    assert steps["step"].tolist() == list(range(STEPS // accumulate))
    assert (steps["grad_norm"] > 1e-2).all()
    if clip is not None:
        updates = flow.recorder.table("weights").query("step == 0")
        decay = 0.1 * 0.1 * updates["weight_norm"]
        assert (updates["update_norm"] <= 0.1 * clip + decay + 1e-6).all()


def test_by_default_it_watches_the_whole_module() -> None:
    flow = GradientFlow()
    fit(Module(), flow)
    watched = flow.recorder.table("weights")
    pd.testing.assert_series_equal(
        watched["weight_grad_norm"], by_hand().table("weights")["weight_grad_norm"]
    )
    assert watched["layer"].tolist()[:4] == [
        "network.0", "network.1.linear", "network.1.norm", "network.2"
    ]  # fmt: skip


def test_recording_leaves_parameters_bitwise_alone() -> None:
    states = []
    for callbacks in ((), (GradientFlow("all", EVERY),)):
        module = Module()
        fit(module, *callbacks)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_validation_in_between_leaves_no_trace() -> None:
    class Validated(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.network(100 * batch[0])

    module, flow = Validated(), GradientFlow(schedule=EVERY)
    trainer(flow, val_check_interval=2).fit(module, loader(), loader())
    plain = GradientFlow(schedule=EVERY)
    fit(Module(), plain)
    assert_equal(flow.recorder, plain.recorder)


def test_more_values_a_step() -> None:
    count = iter(range(100))
    flow = GradientFlow((), values=lambda: {"accuracy": torch.tensor(next(count) / 10)})
    fit(Module(), flow, max_steps=3)
    assert flow.recorder.table("steps")["accuracy"].tolist() == pytest.approx([0, 0.1, 0.2])
    assert flow.recorder.table("steps")["lr"].tolist() == [0.1] * 3


def test_bf16_is_read_in_its_own_precision() -> None:
    flow = GradientFlow(schedule=EVERY)
    fit(Module(), flow, precision="bf16-mixed")
    first = flow.recorder.table("steps").iloc[0]
    expected = by_hand().table("steps").iloc[0]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-2)
    assert first["grad_norm"] != expected["grad_norm"]


def test_losses_are_unscaled() -> None:
    """fp16 asks for a GPU: the hooks alone, with a GradScaler on the CPU."""
    network = make_network()
    optimizer, scaler = sgd(network.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    stub: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler),
        optimizers=[optimizer],
        should_stop=False,
        strategy=None,
    )
    flow, module = GradientFlow(), Module()
    flow.on_train_start(stub, module)
    for part in (0.5, 1.5):
        flow.on_before_backward(stub, module, scaler.scale(torch.tensor(part)))
    flow.on_before_optimizer_step(stub, module, optimizer)
    assert flow.recorder.table("steps")["loss"].tolist() == [2.0]


# --- divergence -----------------------------------------------------------------------------------


def broken(*at: int) -> Callable[[int, Tensor], Tensor]:
    return lambda batch, loss: loss * math.nan if batch in at else loss


def state(module: Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_parameter_is_changed_by_a_diverged_step(
    optimizer: Callable[..., torch.optim.Optimizer], clip: float | None
) -> None:
    """Neither by momentum, nor by weight decay; and the fit ends there."""
    module, flow = Module(optimizer, broken(3)), GradientFlow(schedule=EVERY)
    done = fit(module, flow, gradient_clip_val=clip)
    assert flow.recorder.divergence == Divergence(3, "network.2", "weight_grad_norm")
    assert flow.recorder.table("steps")["step"].tolist() == [0, 1, 2, 3]
    assert done.global_step == 4
    shorter = Module(optimizer)
    fit(shorter, max_steps=3, gradient_clip_val=clip)
    assert all(map(torch.equal, state(module).values(), state(shorter).values()))
    longer = Module(optimizer)
    fit(longer, max_steps=4, gradient_clip_val=clip)
    assert not all(map(torch.equal, state(module).values(), state(longer).values()))


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_it_may_go_on(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """As a loop that leaves out the updates that are not finite."""
    module = Module(optimizer, broken(1, 3))
    flow = GradientFlow(schedule=EVERY, on_divergence="continue")
    done = fit(module, flow)
    assert flow.recorder.divergence is not None
    assert flow.recorder.divergence.step == 1
    assert done.global_step == STEPS
    finite = [math.isfinite(value) for value in flow.recorder.table("steps")["grad_norm"]]
    assert finite == [True, False, True, False, True, True]
    network = make_network()
    bare = optimizer(network.parameters())
    for index, batch in enumerate(batches()):
        bare.zero_grad()
        network(batch).square().mean().backward()
        if index not in (1, 3):
            bare.step()
    assert all(map(torch.equal, module.network.parameters(), network.parameters()))


class Overflow(nn.Module):
    """Adds infinity from a call on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        self.call -= self.training
        return x + (math.inf if self.call < 0 else 0)


def test_the_forward_pass_is_repeated_to_find_the_module() -> None:
    module = Module()
    module.network.insert(1, Overflow(3))
    calls: list[None] = []

    def repeat() -> None:
        calls.append(module.network(torch.ones(8, 4)))

    flow = GradientFlow(schedule=NEVER, model=module.network, repeat_forward=repeat)
    fit(module, flow)
    assert flow.recorder.divergence == Divergence(3, "2.linear", "output_rms")
    assert len(calls) == 1
    module = Module()
    module.network.insert(1, Overflow(3))
    flow = GradientFlow(schedule=EVERY, model=module.network, repeat_forward=repeat)
    fit(module, flow)
    assert flow.recorder.divergence == Divergence(3, "2.linear", "output_rms")
    assert len(calls) == 1  # outputs were measured: no need to


def test_a_gradient_that_breaks_alone_keeps_its_module() -> None:
    """The repeated forward pass is finite: what the backward pass said stands."""
    module = Module(disturb=broken(2))
    flow = GradientFlow(
        schedule=NEVER | {"weights": EVERY},
        model=module.network,
        repeat_forward=lambda: module.network(torch.ones(8, 4)),
    )
    fit(module, flow)
    assert flow.recorder.divergence == Divergence(2, "2", "weight_grad_norm")


def test_repeating_the_forward_pass_leaves_batch_statistics_alone() -> None:
    spec = RunSpec(depth=8, width=4, batch_size=8, max_steps=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    module = Classifier(network, spec, 1)
    data = Batches(Split(torch.randn(8, 1, 4, 4), torch.arange(8) % 4), batch_size=8)
    seen: list[Tensor] = []
    network.register_forward_hook(lambda module, args, output: seen.append(output.detach()))

    class Repeat(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = copy.deepcopy(network.state_dict())
            module.repeat_forward()
            assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())
            assert before["2.num_batches_tracked"] == 1

    trainer(Repeat(), max_steps=1).fit(module, data)
    assert len(seen) == 2
    assert torch.equal(*seen)  # and draws the same random numbers


# --- how it ends ----------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[int, Tensor], Tensor]:
    def disturb(batch: int, loss: Tensor) -> Tensor:
        if batch == 3:
            raise error
        return loss

    return disturb


@pytest.mark.parametrize(
    ("disturb", "raised", "status"),
    [
        (broken(), None, "done"),
        (broken(3), None, "diverged"),
        (raising(ValueError("no")), ValueError, "failed"),
        (raising(KeyboardInterrupt()), SystemExit, "interrupted"),
    ],
)
def test_a_saved_fit_is_a_run(
    disturb: Callable[[int, Tensor], Tensor],
    raised: type[BaseException] | None,
    status: str,
    tmp_path: Path,
) -> None:
    flow = GradientFlow(save=tmp_path / "mine", meta={"depth": 3})
    module = Module(disturb=disturb)
    if raised is None:
        fit(module, flow)
    else:
        with pytest.raises(raised):
            fit(module, flow)
    (run,) = load_runs(tmp_path)
    assert run.status == status
    assert not run.alive
    count = {"done": STEPS, "diverged": 4}.get(status, 3)
    assert run.frame("steps")["step"].tolist() == list(range(count))
    assert run.record["steps"] == count - (status == "diverged")  # updates
    assert not any(each._forward_hooks for each in module.modules())


def test_a_callback_serves_one_fit_after_another() -> None:
    """What a fit that broke off had summed up of its loss is not the next one's."""
    flow = GradientFlow(schedule=EVERY)
    with pytest.raises(ValueError):
        fit(Module(disturb=raising(ValueError())), flow, accumulate_grad_batches=2)
    first = flow.recorder
    assert first.table("steps")["step"].tolist() == [0]
    module = Module()
    fit(module, flow, accumulate_grad_batches=2)
    assert flow.recorder is not first
    expected = GradientFlow(schedule=EVERY)
    fit(Module(), expected, accumulate_grad_batches=2)
    assert_equal(flow.recorder, expected.recorder)


def test_a_fit_resumed_from_a_checkpoint_numbers_on(tmp_path: Path) -> None:
    whole, first = GradientFlow(schedule=EVERY), GradientFlow(schedule=EVERY)
    fit(Module(), whole, max_epochs=2)
    stopped = fit(Module(), first)
    stopped.save_checkpoint(tmp_path / "epoch.ckpt")
    second = GradientFlow(schedule=EVERY)
    trainer(second, max_epochs=2).fit(Module(), loader(), ckpt_path=tmp_path / "epoch.ckpt")
    for table in ("weights", "outputs", "blocks", "steps"):
        parts = [flow.recorder.table(table) for flow in (first, second)]
        assert parts[1]["step"].tolist()[0] == STEPS
        together = pd.concat(parts, ignore_index=True)
        pd.testing.assert_frame_equal(together, whole.recorder.table(table), check_exact=True)


@pytest.mark.parametrize("wrong", ["stpo", None])
def test_what_is_done_on_divergence_is_one_of_two(wrong: str | None) -> None:
    with pytest.raises(SpecError, match=f"^on_divergence={wrong}: allowed is stop, continue$"):
        GradientFlow(on_divergence=wrong)  # type: ignore[arg-type]


def test_a_module_without_an_optimizer() -> None:
    class Bare(Module):
        def configure_optimizers(self) -> None:  # type: ignore[override]
            return None

    flow = GradientFlow()
    with pytest.warns(UserWarning, match="configure_optimizers"):
        fit(Bare(), flow)
    assert flow.recorder.table("steps")["step"].tolist() == list(range(STEPS))
    assert "lr" not in flow.recorder.table("steps")


# --- several optimizers ---------------------------------------------------------------------------


class Adversaries(pl.LightningModule):
    """Two optimizers that step in turn, each after its own loss."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maker, self.judge = nn.Linear(4, 4), nn.Linear(4, 1)
        self.norms: list[tuple[str, float]] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [sgd(self.maker.parameters()), adam(self.judge.parameters())]

    def training_step(self, batch: Any, index: int) -> None:
        for name, optimizer in zip(("maker", "judge"), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.judge(self.maker(batch[0])).square().mean())
            gradients = [p.grad for p in getattr(self, name).parameters()]
            self.norms.append((name, math.hypot(*(g.norm().item() for g in gradients))))
            optimizer.step()


def test_each_of_several_optimizers_has_its_steps() -> None:
    module, flow = Adversaries(), GradientFlow("all", EVERY)
    trainer(flow).fit(module, loader())
    assert len(module.norms) == 2 * STEPS
    weights = flow.recorder.table("weights")
    for step, (name, value) in enumerate(module.norms):
        rows = weights[weights["step"] == step].set_index("layer")
        assert rows["weight_grad_norm"].dropna().to_dict() == {name: pytest.approx(value, rel=1e-6)}
        assert list(rows["update_norm"].dropna().index) == [name]
    assert flow.recorder.table("steps")["lr"].tolist() == [0.1, 0.01] * STEPS


def test_two_callbacks_may_watch_two_models() -> None:
    module = Module()
    flows = [GradientFlow(model=part) for part in (module.network[0], module.network[1])]
    fit(module, *flows)
    layers = [set(flow.recorder.table("weights")["layer"]) for flow in flows]
    assert layers == [{"Linear"}, {"linear", "norm"}]


class Quasi(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_a_closure_that_runs_repeatedly_is_one_step() -> None:
    flow = GradientFlow(schedule=EVERY)
    fit(Quasi(make_network()), flow)
    assert flow.recorder.table("steps")["step"].tolist() == list(range(STEPS))
    assert flow.recorder.table("modules")["calls"].tolist()[0] == 1


# --- several processes ----------------------------------------------------------------------------

PARALLEL = """
import os, sys
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradflow

torch.set_num_threads(1)
devices, save = int(sys.argv[1]), sys.argv[2]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch, index):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


rank = int(os.environ.get("LOCAL_RANK", 0))
images = torch.randn(6, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
each = 8 // devices
images = images[:, rank * each : (rank + 1) * each].flatten(0, 1)  # a batch's share
flow = gradflow.GradientFlow("all", lambda step: True, save=save)
strategy = {"strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, max_epochs=1, logger=False, callbacks=[flow],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **strategy,
)
trainer.fit(Module(), DataLoader(TensorDataset(images), batch_size=each))
"""


@pytest.mark.slow
def test_a_trainer_with_ddp_records_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PARALLEL)
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), str(tmp_path / str(devices))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (Run(tmp_path / name) for name in ("1", "2"))
    for table, quantity in (
        ("weights", "weight_grad_norm"), ("weights", "update_norm"), ("outputs", "output_rms"),
        ("outputs", "output_grad_norm"), ("steps", "loss"), ("steps", "grad_norm"),
    ):  # fmt: skip
        known, found = (run.frame(table) for run in (one, two))
        order = [name for name in ("step", "layer") if name in known]
        known, found = (frame.sort_values(order)[quantity] for frame in (known, found))
        assert found.to_numpy(float) == pytest.approx(known.to_numpy(float), rel=1e-10, abs=0)
    assert len(two.frame("steps")) == 6
