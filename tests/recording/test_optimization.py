"""What a value means under scalers, several optimizers, closures and torch.compile."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from recorded import ALWAYS, cells, column, near, norm, rms
from torch import Tensor, nn

from gradflow import Recorder, Skip
from gradflow.errors import SpecError


class Joined(nn.Module):
    """A block that keeps nothing, so that it is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.skip = nn.Linear(4, 4), Skip()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, self.inner(torch.tanh(x)))


def chain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4), Joined(), nn.Linear(4, 2))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x).square().mean()


# --- a scaled loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [True, False])
def test_gradients_are_those_of_the_loss_itself(unscaled: bool) -> None:
    """Of outputs and of branch and skip too, which no scaler unscales; parameters' either way."""

    def run(scaler: torch.amp.GradScaler | None) -> Recorder:
        model = chain()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Recorder(model, "all", ALWAYS, optimizer, scaler=scaler) as recorder:
            for _ in range(3):
                optimizer.zero_grad()
                loss = loss_of(model)
                if scaler is None:
                    loss.backward()
                    recorder.step(loss)
                    optimizer.step()
                    continue
                scaler.scale(loss).backward()
                if unscaled:
                    scaler.unscale_(optimizer)
                recorder.step(loss)
                scaler.step(optimizer)
                scaler.update()
        return recorder

    plain = run(None)
    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=2))
    for table in ("weights", "outputs", "blocks", "steps"):
        pd.testing.assert_frame_equal(plain.table(table), scaled.table(table), rtol=2e-6)


def test_a_scaler_that_has_scaled_nothing_yet_is_left_alone() -> None:
    scaler = torch.amp.GradScaler("cpu")
    model = chain()
    with Recorder(model, scaler=scaler) as recorder:
        loss_of(model).backward()
        recorder.step()
    assert scaler._scale is None
    assert model[2].weight.grad is not None
    found = column(recorder, "weights", "weight_grad_norm")["2"]
    assert found == near(math.hypot(norm(model[2].weight.grad), norm(model[2].bias.grad)), rel=1e-6)


def test_bf16_autocast_is_read_as_it_runs() -> None:
    """Outputs in bf16, the parameters' gradients in float32."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *a: outputs.append(a[2])) for layer in model]
    with Recorder(model) as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(torch.randn(32, 64))
        for output in outputs:
            output.retain_grad()
        result.float().square().mean().backward()
        recorder.step()
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 2
    found = column(recorder, "outputs", "output_rms")
    assert list(found.values()) == near([rms(output) for output in outputs], rel=1e-6)
    gradients = column(recorder, "outputs", "output_grad_norm")
    assert list(gradients.values()) == near([norm(output.grad) for output in outputs], rel=1e-6)
    assert handles


# --- several optimizers ---------------------------------------------------------------------------


def adversaries() -> tuple[nn.ModuleDict, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"maker": nn.Linear(4, 4), "judge": nn.Linear(4, 1)})
    return model, [
        torch.optim.SGD(model["maker"].parameters(), lr=0.1),
        torch.optim.Adam(model["judge"].parameters(), lr=0.02),
    ]


def test_each_of_two_optimizers_has_steps_of_its_own() -> None:
    """Gradients that the other one's loss left behind are not this step's."""
    model, (maker, judge) = adversaries()
    norms: list[float] = []
    updates: list[float] = []
    with Recorder(model, "all", ALWAYS, [maker, judge]) as recorder:
        for step in range(4):
            mine, part = (judge, "judge") if step % 2 else (maker, "maker")
            mine.zero_grad()
            model["judge"](model["maker"](X)).square().mean().backward()
            gradients = [norm(p.grad) for p in model[part].parameters() if p.grad is not None]
            norms.append(math.hypot(*gradients))
            recorder.step(optimizer=mine)
            before = [p.detach().clone() for p in model[part].parameters()]
            mine.step()
            pairs = zip(model[part].parameters(), before, strict=True)
            updates.append(math.hypot(*(norm(after - then) for after, then in pairs)))
    names = ["maker", "judge", "maker", "judge"]
    for quantity, known in (("weight_grad_norm", norms), ("update_norm", updates)):
        found = cells(recorder.table("weights"), quantity)
        for step, (name, value) in enumerate(zip(names, known, strict=True)):
            assert found[step, name] == near(value, rel=1e-5)
            assert found[step, "judge" if name == "maker" else "maker"] is None
    assert all(v is not None for v in cells(recorder.table("weights"), "weight_norm").values())
    steps = recorder.table("steps")
    assert steps["grad_norm"].tolist() == near(norms, rel=1e-6)
    assert steps["lr"].tolist() == [0.1, 0.02, 0.1, 0.02]


def test_two_optimizers_may_share_a_step() -> None:
    """Recorded once before both: each update is of what that optimizer moved."""
    model, optimizers = adversaries()
    with Recorder(model, ["update_norm", "weight_grad_norm"], optimizer=optimizers) as recorder:
        model["judge"](model["maker"](X)).square().mean().backward()
        recorder.step()
        before = [p.detach().clone() for p in model.parameters()]
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(model.parameters(), before, strict=True)
    moved = [norm(after - then) for after, then in pairs]
    found = column(recorder, "weights", "update_norm")
    assert found == {
        "maker": near(math.hypot(*moved[:2]), rel=1e-5),
        "judge": near(math.hypot(*moved[2:]), rel=1e-5),
    }
    assert min(column(recorder, "weights", "weight_grad_norm").values()) > 0


def test_a_closure_that_is_evaluated_repeatedly_is_one_update() -> None:
    """L-BFGS: the gradient at the parameters after s updates, and what the update added."""
    model = chain()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    known: list[float] = []
    evaluations: list[int] = []
    moved: list[float] = []

    with Recorder(model, "all", ALWAYS, optimizer) as recorder:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            gradients = [norm(p.grad) for p in model.parameters() if p.grad is not None]
            known.append(math.hypot(*gradients))
            recorder.step(loss)
            return loss

        for _ in range(3):
            evaluations.append(len(known))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(closure)
            pairs = zip(model.parameters(), before, strict=True)
            moved.append(math.hypot(*(norm(after - then) for after, then in pairs)))
    assert len(known) > 2 * len(evaluations)
    steps = recorder.table("steps")
    assert steps["step"].tolist() == [0, 1, 2]
    assert steps["grad_norm"].tolist() == near([known[i] for i in evaluations], rel=1e-6)
    updates = cells(recorder.table("weights"), "update_norm")
    for step, value in enumerate(moved):
        assert math.hypot(*(v for (at, _), v in updates.items() if at == step and v)) == near(
            value, rel=1e-4
        )
    assert len(recorder.table("outputs")) == 3 * 3  # one pass a step


def test_what_an_optimizer_does_not_update_has_no_update() -> None:
    """One that is known of two, and named at the step; a second update of several counts whole."""
    model, (maker, judge) = adversaries()
    with Recorder(model, "all", ALWAYS, maker) as recorder:
        model["judge"](model["maker"](X)).square().mean().backward()
        recorder.step(optimizer=maker)
        maker.step()
        judge.step()
    assert column(recorder, "weights", "update_norm")["judge"] is None
    assert column(recorder, "weights", "weight_grad_norm")["judge"] is None
    model, (maker, judge) = adversaries()
    before = [p.detach().clone() for p in model["maker"].parameters()]
    with Recorder(model, "all", ALWAYS, [maker, judge]) as recorder:
        model["judge"](model["maker"](X)).square().mean().backward()
        recorder.step()
        for optimizer in (maker, maker, judge):
            optimizer.step()
    pairs = zip(model["maker"].parameters(), before, strict=True)
    moved = math.hypot(*(norm(after - then) for after, then in pairs))
    assert column(recorder, "weights", "update_norm")["maker"] == near(moved, rel=1e-5)


def test_a_closure_that_raised_does_not_hide_later_steps() -> None:
    model = chain()
    optimizer = torch.optim.LBFGS(model.parameters())
    recorder = Recorder(model, optimizer=optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        recorder.step(loss)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recorder:
        optimizer.step(closure)
    with recorder:
        for _ in range(3):
            loss_of(model).backward()
            recorder.step()
    assert recorder.table("steps")["step"].tolist() == [0, 1, 2, 3]


def test_an_evaluation_after_a_divergence_is_judged_by_itself() -> None:
    model = chain()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    said: list[bool] = []
    with Recorder(model, optimizer=optimizer) as recorder:
        recorder.step(math.nan)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            said.append(recorder.step(loss if len(said) != 2 else loss * math.nan))
            return loss

        optimizer.step(closure)
    assert said == [True, True, False, *[True] * (len(said) - 3)]


def test_what_a_step_refuses_leaves_no_half_of_it() -> None:
    model = chain()
    with Recorder(model, schedule=ALWAYS) as recorder:
        loss_of(model).backward()
        with pytest.raises((RuntimeError, ValueError)):
            recorder.step(torch.ones(2))
        with pytest.raises(SpecError, match="grad_norm are the recorder's own columns"):
            recorder.step(1.0, grad_norm=2.0)
        recorder.step(1.0)
    assert cells(recorder.table("weights"), "weight_norm").keys() == {
        (0, "0"), (0, "1.inner"), (0, "2")
    }  # fmt: skip


# --- what is stamped ------------------------------------------------------------------------------


def conditions(recorder: Recorder, table: str, quantity: str) -> str:
    (part, *_) = recorder._tables[table]
    meaning = part.schema.field(quantity).metadata[b"meaning"].decode()
    return meaning.partition("; ")[2]


def test_files_say_under_which_conditions_values_were_measured() -> None:
    def run(passes: tuple[int, ...], **options: Any) -> Recorder:
        model = chain()
        with Recorder(model, schedule=ALWAYS, **options) as recorder:
            for count in passes:
                for _ in range(count):
                    loss_of(model).backward()
                recorder.step()
        return recorder

    plain, accumulated, varying = run((1, 1)), run((4, 4)), run((1, 3))
    assert conditions(plain, "weights", "weight_grad_norm") == "before clipping, eager"
    assert conditions(plain, "weights", "weight_norm") == ""
    assert conditions(plain, "outputs", "output_rms") == "eager"
    four = "accumulated over 4 forward passes, before clipping, eager"
    assert conditions(accumulated, "outputs", "output_grad_norm") == four
    assert "over 1 to 3 forward passes" in conditions(varying, "steps", "grad_norm")
    scaled = run((1,), scaler=torch.amp.GradScaler("cpu"))
    text = "after unscaling, before clipping, eager"
    assert conditions(scaled, "blocks", "skip_grad_norm") == text


# --- torch.compile --------------------------------------------------------------------------------


@torch.no_grad()
def descend(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter -= 0.1 * parameter.grad


def beside(plain: nn.Module, recorded: nn.Module, recorder: Recorder) -> list[float]:
    """Twelve steps of both; the norms of the plain one's gradient."""
    expected = []
    for _ in range(12):
        for model in (plain, recorded):
            model.zero_grad()
            loss_of(model).backward()
        gradients = [p.grad for p in plain.parameters()]
        expected.append(math.hypot(*(norm(g) for g in gradients if g is not None)))
        recorder.step()
        descend(plain)
        descend(recorded)
    return expected


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_block(model: nn.Module) -> nn.Module:
    model[1].compile(backend="eager")  # type: ignore[operator, index]
    return model


def replaced_block(model: nn.Module) -> nn.Module:
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[index, operator]
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("after", [False, True], ids=["compiled before", "compiled after"])
@pytest.mark.parametrize("wrap", [compiled_whole, compiled_block, replaced_block])
def test_under_torch_compile_weights_are_right_and_the_rest_is_said(
    wrap: Callable[[nn.Module], nn.Module], after: bool
) -> None:
    """Compiled once; what it runs is named once and null; training stays bitwise the same."""
    torch._dynamo.reset()
    plain = chain()
    model = copy.deepcopy(plain)
    runs = model if after else wrap(model)
    counts = torch._dynamo.utils.counters
    counts.clear()
    unread = "0, 1.inner, 2$" if wrap is compiled_whole else "1.inner$"
    recorder = Recorder(runs, schedule=ALWAYS)
    with recorder, pytest.warns(UserWarning, match=f"torch.compile runs.*: {unread}") as said:
        expected = beside(plain, wrap(model) if after else runs, recorder)
    assert len(said) == 1
    assert counts["stats"]["unique_graphs"] == 1
    assert not counts["graph_break"]
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert recorder.table("steps")["grad_norm"].tolist() == near(expected, rel=1e-6)
    modules = recorder.table("modules")
    assert [name for name in modules["layer"] if "skip" not in name] == ["0", "1.inner", "2"]
    outputs = recorder.table("outputs")
    read = set() if wrap is compiled_whole else {"0", "2"}
    assert set(outputs["layer"] if len(outputs) else ()) == read
    if not (after and wrap is compiled_whole):  # which leaves no mark on the model itself
        assert conditions(recorder, "weights", "weight_grad_norm") == "before clipping, compiled"
