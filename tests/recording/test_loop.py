"""The recorder in somebody's loop: updates, schedules, evaluations, exceptions, copies."""

import contextlib
import copy
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from recorded import ALWAYS, Block, cells, column, loop, near, norm, record, rms, steps_of
from torch import Tensor, nn

from gradflow import Recorder, Skip, build_network, schema
from gradflow.errors import GradflowError, SpecError
from gradflow.recording import Divergence, buffers
from gradflow.recording.schedules import every


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 0.01),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
])  # fmt: skip
def test_update_norm_is_what_the_optimizer_added(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = make(network.parameters())
    expected = {}
    with Recorder(network, "all", {"weights": every(2)}, optimizer) as recorder:
        for step in range(5):
            optimizer.zero_grad()
            loss = network(torch.randn(8, 3)).square().mean()
            loss.backward()
            before = copy.deepcopy(network)
            recorder.step(loss)
            optimizer.step()
            for name in ("0", "1", "2"):
                parts = zip(
                    network.get_submodule(name).parameters(),
                    before.get_submodule(name).parameters(),
                    strict=True,
                )
                expected[step, name] = math.hypot(*(norm(new - old) for new, old in parts))
    found = cells(recorder.table("weights"), "update_norm")
    assert sorted(found) == [(step, name) for step in (0, 2, 4) for name in ("0", "1", "2")]
    assert found == near({place: expected[place] for place in found}, rel=1e-6)
    assert recorder.table("steps")["lr"].tolist() == [optimizer.param_groups[0]["lr"]] * 5


def test_update_norm_is_null_where_no_update_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "BUFFER_BYTES", 1)  # each step takes the place of the one before
    network = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with Recorder(network, ["update_norm", "weight_norm"], optimizer=optimizer) as recorder:
        for step in range(5):
            network(torch.randn(2, 3)).sum().backward()
            recorder.step()
            if step == 2:
                recorder.table("weights")  # the step leaves the buffer before its update
            if step in (0, 2, 4):
                optimizer.step()
    found = cells(recorder.table("weights"), "update_norm")
    assert [value is None for value in found.values()] == [False, True, True, True, False]
    assert all(value != 0 for value in found.values())


def test_an_update_is_that_of_its_own_step() -> None:
    """Nothing was added after the measured step; what a later one adds is not its update."""
    network = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    first = {"weights": lambda step: step == 0}
    with Recorder(network, "all", first, optimizer) as recorder:
        for _ in range(2):
            network(torch.randn(2, 3)).sum().backward()
            recorder.step()
        optimizer.step()
    assert cells(recorder.table("weights"), "update_norm") == {(0, "Linear"): None}


def test_update_norm_needs_an_optimizer() -> None:
    with pytest.raises(SpecError, match=r"^update_norm: give the optimizer"):
        Recorder(nn.Linear(2, 2), "update_norm")


# --- the loop -------------------------------------------------------------------------------------


def test_schedules_say_when() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
    with Recorder(network) as recorder:
        loop(recorder, 25)
    assert steps_of(recorder, "weights") == list(range(25))
    assert steps_of(recorder, "steps") == list(range(25))
    assert steps_of(recorder, "outputs") == [0, 1, 2, 3, 4, 10, 20]
    assert steps_of(recorder, "blocks") == [0, 1, 2, 3, 4, 10, 20]
    with Recorder(network, schedule=lambda step: step in (3, 7)) as recorder:
        loop(recorder, 9)
    assert steps_of(recorder, "steps") == list(range(9))
    for table in ("weights", "outputs", "blocks"):
        assert steps_of(recorder, table) == [3, 7]
    mapping = {"weights": every(4), "outputs": every(0)}
    with Recorder(network, schedule=mapping) as recorder:
        loop(recorder, 6)
    assert steps_of(recorder, "weights") == [0, 4]
    assert recorder.table("outputs").empty
    assert steps_of(recorder, "blocks") == [0, 1, 2, 3, 4]


def test_a_schedule_of_no_table_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^schedule: weight: allowed is weights, outputs, blocks"):
        Recorder(nn.Linear(2, 2), schedule={"weight": ALWAYS})


def test_only_what_was_chosen_is_recorded() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
    with Recorder(network, ["weight_norm", "skip_rms", "output_grad_norm"]) as recorder:
        loop(recorder, 1)
    named = {
        table: [n for n in recorder.table(table).columns if n.endswith(("_norm", "_rms"))]
        for table in ("weights", "outputs", "blocks")
    }
    assert named == {
        "weights": ["weight_norm"], "outputs": ["output_grad_norm"], "blocks": ["skip_rms"]
    }  # fmt: skip
    with Recorder(network, ()) as recorder:
        loop(recorder, 2)
    assert recorder.table("weights").empty
    assert recorder.table("steps")["grad_norm"].notna().all()


def test_evaluation_without_gradients_leaves_no_trace() -> None:
    def train(evaluated: bool) -> Recorder:
        torch.manual_seed(5)
        network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
        batches = torch.randn(3, 6, 4)
        with Recorder(network, schedule=ALWAYS) as recorder:
            for batch in batches:
                network.zero_grad()
                loss = network(batch).square().mean()
                if evaluated:
                    with torch.no_grad():
                        network(batch * 100)
                loss.backward()
                recorder.step(loss)
                if evaluated:
                    with torch.inference_mode():
                        network(batch * 100)
        return recorder

    without, between = train(False), train(True)
    for table in ("modules", "weights", "outputs", "blocks", "steps"):
        pd.testing.assert_frame_equal(without.table(table), between.table(table))


def penalised(paused: bool) -> Recorder:
    """A loop whose every step has other passes in between, with gradients."""
    torch.manual_seed(5)
    network = Shaped()
    batches = torch.randn(3, 6, 4)
    with Recorder(network, schedule=ALWAYS) as recorder:
        for batch in batches:
            if paused:
                with recorder.paused(), recorder.paused():
                    torch.autograd.grad(network(batch[:, :2], wide=True).sum(), network.weight)
                    network.eval()
                    network(100 * batch)
                    network.train()
            network.zero_grad()
            loss = network(batch).square().mean()
            if paused:
                with recorder.paused():
                    torch.autograd.grad(loss, network.weight, retain_graph=True)
                    with contextlib.suppress(ValueError):
                        network(batch, broken=True)
            loss.backward()
            recorder.step(loss)
    return recorder


class Shaped(nn.Module):
    """May take another way, where its layers come in another order and size, or raise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.first, self.block = nn.Linear(4, 4), Block(Skip(), torch.float32)
        self.other, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, wide: bool = False, broken: bool = False) -> Tensor:
        if wide:
            return self.last(self.first(self.block(self.other(x * self.weight))))
        y = self.block(self.first(x * self.weight))
        if broken:
            raise ValueError
        return self.last(y)


RECORDED = ("modules", "weights", "outputs", "blocks", "steps")


def test_passes_while_it_is_paused_leave_no_trace() -> None:
    with_others, without = penalised(True), penalised(False)
    for table in RECORDED:
        assert len(without.table(table))
        pd.testing.assert_frame_equal(with_others.table(table), without.table(table))


def test_it_is_paused_until_the_block_ends() -> None:
    network = nn.Linear(4, 4)
    with Recorder(network) as recorder:
        with pytest.raises(ZeroDivisionError), recorder.paused():
            raise ZeroDivisionError
        loop(recorder, 1)
    assert len(recorder.table("outputs")) == 1


@pytest.mark.parametrize("before", [False, True])
def test_what_a_pass_that_raised_left_is_dropped(before: bool) -> None:
    """And what the same step had seen before it; a batch that is tried again counts once."""

    def train(failing: bool) -> Recorder:
        torch.manual_seed(5)
        network = Shaped()
        batches = torch.randn(3, 6, 4)
        with Recorder(network, schedule=ALWAYS) as recorder:
            for batch in batches:
                network.zero_grad()
                early = network(100 * batch[:, :2], wide=True) if before and failing else None
                for _ in range(2 if failing else 0):
                    with pytest.raises(ValueError):
                        network(10 * batch, broken=True)
                loss = network(batch).square().mean()
                if early is not None:
                    early.sum().backward()  # too late
                    network.zero_grad()
                loss.backward()
                recorder.step(loss)
        return recorder

    failed, well = train(True), train(False)
    for table in RECORDED:
        pd.testing.assert_frame_equal(failed.table(table), well.table(table))


class Silent(nn.Module):
    """Keeps its output to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> None:
        self.output = self.linear(x)


def test_only_a_pass_that_raised_is_dropped() -> None:
    """Not one without an output, nor for an evaluation that raised."""
    network = Silent()
    with Recorder(network) as recorder:
        network(torch.randn(3, 4))
        with torch.no_grad(), pytest.raises(RuntimeError):
            network(torch.randn(3, 5))
        network.output.sum().backward()
        recorder.step()
    assert column(recorder, "outputs", "output_rms") == {
        "linear": near(rms(network.output), rel=1e-6)
    }
    assert column(recorder, "outputs", "output_grad_norm")["linear"] == near(12**0.5, rel=1e-6)


def test_a_recorder_goes_on_where_another_stood() -> None:
    network = nn.Linear(4, 4)
    with Recorder(network) as recorder:
        loop(recorder, 2)
        recorder.evaluate("test", loss=0.5)
        recorder.step(math.nan)
        recorder.flush()
        state = json.loads(json.dumps(recorder.state_dict()))
    after = Recorder(network)
    after.load_state_dict(state)
    assert after.divergence == recorder.divergence == Divergence(2, None, "loss")
    assert after.seconds == state["seconds"] > 0
    with after:
        loop(after, 9)
        after.evaluate("train", loss=0.25)
    assert steps_of(after, "steps") == list(range(3, 12))
    assert steps_of(after, "outputs") == [3, 4, 10]  # schedules go by the whole run's numbers
    assert after.divergence == recorder.divergence
    assert after.table("modules")["calls"].tolist() == [1]
    assert after.state_dict()["metrics"] == {"test_loss": 0.5, "train_loss": 0.25}
    assert after.state_dict()["next_step"] == 12


def test_a_model_in_evaluation_mode_is_recorded() -> None:
    network = build_network("cifar", depth=8, width=4).eval()
    before = copy.deepcopy(network.state_dict())
    recorder = record(network, lambda: network(torch.randn(2, 3, 8, 8)).sum())
    assert (recorder.table("outputs")["output_grad_norm"] > 0).all()
    assert len(recorder.table("blocks")) == 3
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_looking_in_the_middle_of_a_step_changes_nothing() -> None:
    def train(looking: bool) -> Recorder:
        torch.manual_seed(6)
        network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
        with Recorder(network, schedule=ALWAYS) as recorder:
            for _ in range(3):
                network.zero_grad()
                for _ in range(2):
                    loss = network(torch.randn(3, 4)).square().mean()
                    if looking:
                        recorder.table("outputs")
                    loss.backward()
                    if looking:
                        recorder.flush()
                recorder.step(loss)
        return recorder

    plain, watched = train(False), train(True)
    for table in ("modules", "weights", "outputs", "blocks", "steps"):
        pd.testing.assert_frame_equal(plain.table(table), watched.table(table))


def test_a_gradient_that_comes_too_late_is_no_later_step_s() -> None:
    network = nn.Linear(4, 4)
    with Recorder(network, schedule=ALWAYS) as recorder:
        late = network(torch.randn(3, 4))
        with pytest.warns(UserWarning, match="call it after backward"):
            recorder.step()
        output = network(torch.randn(3, 4))
        output.retain_grad()
        late.sum().backward()
        output.square().sum().backward()
        recorder.step()
    assert output.grad is not None
    assert cells(recorder.table("outputs"), "output_grad_norm") == {
        (0, "Linear"): None,
        (1, "Linear"): near(norm(output.grad), rel=1e-6),
    }


def zeroed_early(network: nn.Module) -> Callable[[], None]:
    return network.zero_grad


def updated_in_backward(network: nn.Module) -> Callable[[], None]:
    for parameter in network.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        for then in (optimizer.step, optimizer.zero_grad):
            parameter.register_post_accumulate_grad_hook(lambda _, then=then: then())
    return lambda: None


@pytest.mark.parametrize("prepare", [zeroed_early, updated_in_backward])
def test_gradients_that_have_gone_are_missed_once(
    prepare: Callable[[nn.Module], Callable[[], None]],
) -> None:
    network = nn.Linear(4, 4)
    before_step = prepare(network)
    with Recorder(network, schedule=ALWAYS) as recorder:
        for step in range(2):
            network(torch.randn(3, 4)).sum().backward()
            before_step()
            with (
                contextlib.nullcontext()
                if step
                else pytest.warns(UserWarning, match="no parameter has a gradient at Recorder.step")
            ):
                recorder.step()
    assert list(cells(recorder.table("weights"), "weight_grad_norm").values()) == [None, None]
    assert recorder.table("outputs")["output_grad_norm"].notna().all()
    with pytest.raises(GradflowError, match=r"^weight_grad_norm: nothing recorded to draw$"):
        recorder.plot()


def test_a_step_without_a_pass_misses_no_gradient() -> None:
    """Nor one of a network of which nothing is learnt."""
    network = nn.Linear(4, 4)
    with Recorder(network) as recorder:
        recorder.step()
        network.requires_grad_(False)
        network(torch.randn(3, 4))
        recorder.step()
    assert recorder.next_step == 2


def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How much of a recorder a model and an optimizer carry."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    patched = sum("terms" in vars(module) for module in model.modules())
    return hooks + patched + len(optimizer._optimizer_step_post_hooks)


def test_an_exception_leaves_the_record_readable_and_the_model_clean() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    recorder = Recorder(network, "all", ALWAYS, optimizer)

    def train() -> None:
        with recorder:
            # Two layers and the whole, before and after each, a block's terms, the optimizer.
            assert attached(network, optimizer) == 2 * 2 + 2 + 2
            loop(recorder, 2)
            assert attached(network, optimizer) == 2 + 2 + 2  # their order is known
            network(torch.randn(3, 4))  # the step under way is not finished: nothing of it stays
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert attached(network, optimizer) == 0
    assert steps_of(recorder, "steps") == [0, 1]
    for table in ("weights", "outputs", "blocks"):
        assert steps_of(recorder, table) == [0, 1]
    assert recorder.table("outputs")["output_grad_norm"].notna().all()


def test_step_outside_the_block_is_refused() -> None:
    network = nn.Linear(4, 4)
    recorder = Recorder(network)
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        recorder.step()
    with recorder:
        loop(recorder, 1)
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        recorder.step()


def test_a_recorder_may_be_entered_again() -> None:
    """One block an epoch: steps count on; an unfinished one is forgotten."""
    network = nn.Linear(4, 4)
    recorder = Recorder(network)
    for _ in range(2):
        with recorder:
            loop(recorder, 2)
            late = network(1000 * torch.randn(3, 4))
    with recorder:
        output = network(torch.randn(3, 4))
        late.sum().backward()
        output.sum().backward()
        recorder.step()
    assert steps_of(recorder, "outputs") == [0, 1, 2, 3, 4]
    assert recorder.table("outputs")["output_rms"].max() < 10
    assert recorder.table("outputs")["output_grad_norm"].tolist()[4] == near(12**0.5, rel=1e-6)
    assert recorder.table("modules")["calls"].tolist() == [1]
    with recorder, pytest.raises(RuntimeError, match="watching already"):
        recorder.__enter__()
    assert not network._forward_hooks


def test_two_recorders_at_once_see_the_same() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
    with Recorder(network) as outer:
        with Recorder(network) as inner:
            network(torch.randn(3, 4)).sum().backward()
            inner.step()
            outer.step()
        network(torch.randn(3, 4)).sum().backward()
        outer.step()
    assert len(inner.table("blocks")) == 1
    assert steps_of(outer, "blocks") == [0, 1]
    first = outer.table("blocks").query("step == 0")
    pd.testing.assert_frame_equal(first, inner.table("blocks"))
    assert "terms" not in vars(network[1].skip)


def test_recorders_may_end_in_the_order_in_which_they_began() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32))
    first, second = Recorder(network, schedule=ALWAYS), Recorder(network, schedule=ALWAYS)
    first.__enter__()
    second.__enter__()
    for recorders in ((first, second), (second,)):
        network(torch.randn(3, 4)).sum().backward()
        for recorder in recorders:
            recorder.step()
        recorders[0].__exit__(None, None, None)
    assert steps_of(first, "blocks") == [0]
    assert steps_of(second, "blocks") == [0, 1]
    assert "terms" not in vars(network[1].skip)


def test_batched_backward_passes_leave_no_trace() -> None:
    network = nn.Linear(4, 3)
    with Recorder(network, schedule=ALWAYS) as recorder:
        output = network(torch.randn(5, 4))
        torch.autograd.grad(
            output.sum(0), network.weight, torch.eye(3), is_grads_batched=True, retain_graph=True
        )
        output.sum().backward()
        recorder.step()
    found = column(recorder, "outputs", "output_grad_norm")
    assert found == {"Linear": near(15**0.5, rel=1e-6)}


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return (x * self.weight).to_sparse(), x * self.weight


def test_sparse_outputs_are_passed_over() -> None:
    network = Outputs()
    recorder = record(network, lambda: network(torch.ones(2, 3))[1].sum())
    assert column(recorder, "outputs", "output_rms") == {"Outputs": 1}


def copies(network: nn.Module) -> Iterator[nn.Module]:
    """As for a running average of the weights, and as in a checkpoint of the whole model."""
    yield copy.deepcopy(network)
    stored = io.BytesIO()
    torch.save(network, stored)
    stored.seek(0)
    yield torch.load(stored, weights_only=False)


def test_copies_of_a_watched_model_are_not_recorded() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Block(Skip("rezero"), torch.float32))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    optimizer.held = threading.Lock()  # type: ignore[attr-defined]  # cannot be copied
    x = torch.randn(3, 4)
    with Recorder(network, "all", ALWAYS, optimizer) as recorder:
        loop(recorder, 1)
        network[1].seen.clear()
        for copied in copies(network):
            nn.init.ones_(copied[1].skip.beta)
            y = copied(x)
            y.sum().backward()
            inner = copied[0](x)
            torch.testing.assert_close(y, inner + copied[1].inner(torch.tanh(inner)))
        loop(recorder, 1)
    assert recorder.table("modules")["calls"].tolist() == [1, 1, 1]
    assert len(recorder.table("outputs")) == 2 * 3  # the block's factor is a parameter too
    assert len(recorder.table("blocks")) == 2
    assert network[1].skip.beta.item() == 0


def test_a_stored_model_loads_without_gradflow() -> None:
    network, stored = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), io.BytesIO()
    with Recorder(network):
        torch.save(network, stored)
    assert b"gradflow" not in stored.getvalue()
    stored.seek(0)
    x = torch.randn(3, 4)
    loaded = torch.load(stored, weights_only=False)
    assert torch.equal(loaded(x), network(x))
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), network(x))


def test_values_of_a_step() -> None:
    network = nn.Linear(4, 4)
    with Recorder(network) as recorder:
        for step, accuracy in enumerate((0.5, torch.tensor(0.75), None)):
            loss = network(torch.randn(3, 4)).square().mean()
            loss.backward()
            values = {} if accuracy is None else {"accuracy": accuracy}
            recorder.step(loss if step else 2, lr=0.1, **values)
    frame = recorder.table("steps")
    assert frame.columns.tolist()[0] == "step"
    assert frame["loss"].tolist()[0] == 2
    assert frame["lr"].tolist() == [0.1] * 3
    assert cells(frame.assign(layer=""), "accuracy") == {
        (0, ""): 0.5, (1, ""): 0.75, (2, ""): None
    }  # fmt: skip


def test_evaluations_stand_at_the_number_of_updates() -> None:
    network = nn.Linear(4, 4)
    with Recorder(network) as recorder:
        recorder.evaluate("test", loss=torch.tensor(2.5), accuracy=0.5)
        loop(recorder, 3)
        recorder.evaluate("train", loss=math.nan)
    frame = recorder.table("evaluations")
    assert frame["step"].tolist() == [0, 3]
    assert frame["split"].tolist() == ["test", "train"]
    assert frame["loss"].isna().tolist() == [False, False]
    assert math.isnan(frame["loss"].tolist()[1])
    assert frame["accuracy"].isna().tolist() == [False, True]


def test_its_own_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still except where a table is made, in the flush inside of a step."""
    made, now = schema.table, [0]

    def slow(*arguments: Any) -> Any:
        now[0] += 1
        return made(*arguments)

    monkeypatch.setattr(schema, "table", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: float(now[0]))
    monkeypatch.setattr(buffers, "FLUSH_STEPS", 1)
    with Recorder(nn.Linear(4, 4), schedule=ALWAYS) as recorder:
        loop(recorder, 5)
    assert recorder.seconds == now[0] == 5 * 3  # weights, outputs, steps


def test_unknown_tables_are_named() -> None:
    with pytest.raises(ValueError, match="table 'weight': there are modules, weights"):
        Recorder(nn.Linear(2, 2)).table("weight")


def test_plot_is_the_profile_of_the_first_and_last_step() -> None:
    network = build_network("cifar", depth=8, width=2)
    with Recorder(network) as recorder:
        for _ in range(3):
            network(torch.randn(2, 3, 8, 8)).sum().backward()
            recorder.step()
    figure = recorder.plot()
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] != []
    lines = figure.axes[0].get_lines()
    found = column(recorder, "weights", "weight_grad_norm")
    layers = [n for n in found if "conv" in n or n == "fc"]
    assert any(list(line.get_ydata()) == near([found[n] for n in layers]) for line in lines)
    assert isinstance(recorder.plot(step=1), Figure)


def test_plot_shows_skip_and_branch_apart_along_the_layers() -> None:
    """Half the gradient through each skip, all of it to each branch; blocks of two layers."""
    network = build_network("cifar", depth=14, width=2, skip_forward=1.0, skip_backward=0.5)
    with Recorder(network) as recorder:
        for _ in range(3):
            network(torch.randn(2, 3, 8, 8)).sum().backward()
            recorder.step()
    figure = recorder.plot()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["initialisation", "after 2 updates", "", ""]
    skip, branch = (line for line in figure.axes[2].get_lines() if len(line.get_xdata()) > 1)
    assert list(skip.get_xdata()) == [3.5, 5.5, 7.5, 9.5, 11.5, 13.5]
    found = column(recorder, "blocks", "skip_grad_norm")
    assert list(skip.get_ydata()) == near(list(found.values()))
    halves = [2 * value for value in skip.get_ydata()]
    assert list(branch.get_ydata()) == near(halves)
    assert len(recorder.plot(step=1).axes) == 2
    with Recorder(build_network("cifar", depth=8, width=2, skip=False)) as plain:
        plain.model(torch.randn(2, 3, 8, 8)).sum().backward()
        plain.step()
    assert len(plain.plot().axes) == 1
