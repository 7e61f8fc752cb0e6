"""The first step that is not finite is noticed, and the module at which it began is named."""

import math

import pytest
import torch
from recorded import ALWAYS
from torch import Tensor, nn

from gradflow import Recorder, Skip
from gradflow.recording import Divergence, buffers

NEVER = dict.fromkeys(("weights", "outputs", "blocks"), lambda step: False)


class BreakBackward(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: object, x: Tensor, value: float) -> Tensor:
        ctx.value = value  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.value, None  # type: ignore[attr-defined]


class Break(nn.Module):
    """Lets x through; its gradient is multiplied by `backward`, its value by `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.backward_by, self.forward_by = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return BreakBackward.apply(x * self.forward_by, self.backward_by)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), Break(), nn.Linear(4, 4), nn.Linear(4, 4)
    )


def step(recorder: Recorder, loss: Tensor | float | None = None) -> bool:
    recorder.model.zero_grad()
    value = recorder.model(torch.ones(3, 4)).square().mean()
    value.backward()
    return recorder.step(value if loss is None else loss)


BOTH = [math.nan, math.inf]


@pytest.mark.parametrize("value", BOTH)
def test_forward_first_names_the_module_nearest_the_input(value: float) -> None:
    model = network()
    with Recorder(model, schedule=ALWAYS) as recorder:
        assert step(recorder)
        assert step(recorder)
        model[2].forward_by = value
        assert recorder.divergence is None
        assert not step(recorder)
        assert recorder.divergence == Divergence(2, "3", "output_rms")


@pytest.mark.parametrize("value", BOTH)
def test_gradient_only_names_the_module_farthest_from_the_input(value: float) -> None:
    """It goes wrong between 1 and 3: the gradient of the output of 1 is the first to show it."""
    model = network()
    with Recorder(model, schedule=ALWAYS) as recorder:
        assert step(recorder)
        model[2].backward_by = value
        assert not step(recorder)
        found = recorder.divergence
    assert found is not None
    assert (found.step, found.layer) == (1, "1")
    assert found.quantity in ("output_grad_norm", "weight_grad_norm")


def test_without_outputs_the_weights_tell() -> None:
    model = network()
    with Recorder(model, schedule=NEVER | {"weights": ALWAYS}) as recorder:
        model[2].backward_by = math.nan
        assert not step(recorder)
    assert recorder.divergence == Divergence(0, "1", "weight_grad_norm")


def test_loss_only() -> None:
    with Recorder(network(), schedule=ALWAYS) as recorder:
        assert step(recorder, 1.0)
        assert not step(recorder, math.inf)
    assert recorder.divergence == Divergence(1, None, "loss")


def test_where_nothing_was_measured_the_step_alone_is_known() -> None:
    model = network()
    with Recorder(model, schedule=NEVER) as recorder:
        model[2].backward_by = math.nan
        assert not step(recorder, 1.0)
    assert recorder.divergence == Divergence(0, None, "grad_norm")
    with Recorder(model, ()) as recorder:
        assert not step(recorder, torch.tensor(math.nan))
    assert recorder.divergence == Divergence(0, None, "loss")


def test_a_block_may_be_first() -> None:
    """Its branch's term overflows, before any module's output does."""
    model = nn.Sequential(nn.Linear(4, 4), _Residual(), nn.Linear(4, 4))
    with Recorder(model, schedule=ALWAYS) as recorder:
        assert not step(recorder)
    assert recorder.divergence == Divergence(0, "1.skip", "branch_rms")


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.skip = nn.Linear(4, 4), Skip(branch_scale=math.ldexp(1, 127))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, 1e3 * self.inner(x))


def test_the_first_stays_the_first() -> None:
    """Each step says whether it was finite; what diverged first is kept."""
    model = network()
    with Recorder(model, schedule=ALWAYS) as recorder:
        found = []
        for value in (1.0, math.nan, 1.0, math.nan):
            model[2].forward_by = value
            found.append(step(recorder))
    assert found == [True, False, True, False]
    assert recorder.divergence == Divergence(1, "3", "output_rms")
    assert recorder.table("steps")["step"].tolist() == [0, 1, 2, 3]
    losses = recorder.table("steps")["loss"]
    assert losses.isna().tolist() == [False] * 4  # measured, if not a number
    assert [math.isnan(loss) for loss in losses] == [False, True, False, True]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_module_is_named_whenever_buffers_are_emptied(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "FLUSH_STEPS", count)
    for broken in range(4):
        model = network()
        with Recorder(model, schedule=ALWAYS) as recorder:
            for _ in range(broken):
                assert step(recorder)
            model[2].forward_by = math.nan
            assert not step(recorder)
        assert recorder.divergence == Divergence(broken, "3", "output_rms")
        assert recorder.table("outputs")["step"].tolist()[-1] == broken


def scaled_steps(scaler: torch.amp.GradScaler, told: bool, count: int = 4) -> Recorder:
    """A loop with a GradScaler whose scale is too large at first: it skips, and halves it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Recorder(
        model, schedule=ALWAYS, optimizer=optimizer, scaler=scaler if told else None
    ) as recorder:
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(torch.full((3, 4), 10.0)).square().sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            recorder.step(loss)
            scaler.step(optimizer)
            scaler.update()
    return recorder


def test_an_overflow_that_the_scaler_skips_is_no_divergence() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    recorder = scaled_steps(scaler, told=True)
    assert recorder.divergence is None
    finite = [math.isfinite(value) for value in recorder.table("steps")["grad_norm"]]
    assert finite == [False, True, True, True]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    unaware = scaled_steps(scaler, told=False)
    assert unaware.divergence is not None
    assert unaware.divergence.step == 0


def test_under_a_scaler_the_loss_still_tells() -> None:
    model = network()
    with Recorder(model, schedule=ALWAYS, scaler=torch.amp.GradScaler("cpu")) as recorder:
        assert not step(recorder, math.nan)
    assert recorder.divergence is not None


def test_a_scaler_that_is_switched_off_skips_nothing() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Recorder(model, schedule=ALWAYS, scaler=scaler) as recorder:
        model[2].backward_by = math.nan
        assert not step(recorder)
    assert recorder.divergence is not None


def test_repeating_the_forward_pass_passes_over_what_was_infinite_before() -> None:
    class Ones(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    model = nn.Sequential(nn.Linear(4, 4), Ones(), nn.Linear(4, 4))
    model[0].bias.data[0] = math.inf
    with Recorder(model, schedule=NEVER | {"outputs": lambda s: s == 0}) as recorder:
        step(recorder)
        recorder.flush()
        assert recorder.divergence is None
        assert recorder.locate_forward(lambda: model(torch.ones(3, 4))) == "0"  # there is no other
        model[2].bias.data[0] = math.nan
        assert recorder.locate_forward(lambda: model(torch.ones(3, 4))) == "2"


def test_repeating_the_forward_pass_finds_the_module_and_leaves_no_trace() -> None:
    model = network()
    with Recorder(model, schedule=NEVER | {"weights": ALWAYS}) as recorder:
        step(recorder)
        assert recorder.locate_forward(lambda: model(torch.ones(3, 4))) is None
        model[2].forward_by = math.inf
        hooks = [len(each._forward_hooks) for each in model.modules()]
        assert recorder.locate_forward(lambda: model(torch.ones(3, 4))) == "3"
        assert [len(each._forward_hooks) for each in model.modules()] == hooks
        with pytest.raises(ZeroDivisionError):
            recorder.locate_forward(lambda: 1 / 0)
        assert [len(each._forward_hooks) for each in model.modules()] == hooks
    assert recorder.table("modules")["calls"].tolist() == [1] * 4
    assert recorder.table("outputs").empty
