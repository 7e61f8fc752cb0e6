"""The flight recorder: what it keeps, when it is written, what is told of it."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gradflow import Recorder
from gradflow.errors import SpecError
from gradflow.flight import story
from gradflow.recording.schedules import every
from gradflow.store import Run

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
K = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(8, 1))


def train(recorder: Recorder, steps: int, break_at: int | None = None) -> None:
    """Plain descent; at `break_at` a weight of the second layer becomes infinite."""
    model = recorder.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if step == break_at:
            with torch.no_grad():
                model[2].weight[0, 0] = math.inf
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        if not recorder.step(loss, given=float(step)):
            return
        optimizer.step()


def values(frame: pd.DataFrame, quantity: str, layer: str | None) -> dict[int, float]:
    here = frame["layer"].isna() if layer is None else frame["layer"] == layer
    rows = frame[here & (frame["quantity"] == quantity)]
    return dict(zip(rows["step"].astype(int), rows["value"].astype(float), strict=True))


@pytest.mark.parametrize("break_at", [3, 20, 700])
def test_the_last_steps_are_written_whole_where_something_is_not_finite(break_at: int) -> None:
    """All norms of each, as a recorder that measures all has them; within a chunk and across."""
    with Recorder(network(), "default", every(1)) as whole:
        train(whole, 1000, break_at)
    with Recorder(network(), flight=K) as recorder:
        train(recorder, 1000, break_at)
    frame = recorder.table("flight")
    kept = list(range(max(0, break_at - K + 1), break_at + 1))
    assert sorted(set(frame["step"])) == kept
    assert not frame.duplicated(["step", "layer", "quantity"]).any()
    for table, names in {
        "weights": ("weight_grad_norm", "weight_norm"),
        "outputs": ("output_rms", "output_grad_norm"),
    }.items():
        expected = whole.table(table)
        for name in names:
            for layer in ("0", "2", "4", "6"):
                rows = expected[(expected["layer"] == layer) & expected["step"].isin(kept)]
                theirs = dict(zip(rows["step"], rows[name].astype(float), strict=True))
                mine = values(frame, name, layer)
                assert list(mine) == kept
                rounded = np.float32(list(mine.values()))  # as tables of float32 models hold it
                np.testing.assert_array_equal(rounded, np.float32(list(theirs.values())))
    assert values(frame, "given", None) == {step: float(step) for step in kept}


def test_tables_hold_what_the_schedule_asks_for_as_without_it() -> None:
    with Recorder(network()) as usual:
        train(usual, 300, 293)
    with Recorder(network(), flight=K) as recorder:
        train(recorder, 300, 293)
    for table in ("weights", "outputs", "steps"):
        pd.testing.assert_frame_equal(recorder.table(table), usual.table(table))
    assert recorder.divergence is not None
    assert recorder.divergence.layer == "2"
    assert usual.divergence.layer != "2"  # outputs were not measured there


def test_nothing_is_written_where_nothing_goes_wrong() -> None:
    with Recorder(network(), flight=K) as recorder:
        train(recorder, 40)
    assert recorder.table("flight").empty
    assert recorder.story() == ""
    assert recorder.alarm is None


def test_a_rule_is_asked_once_a_step_and_writes_once() -> None:
    asked = []

    def rule(row: dict[str, float]) -> bool:
        asked.append(row["given"])
        return row["given"] >= 11

    with Recorder(network(), flight=K, rule=rule) as recorder:
        train(recorder, 40)
    assert recorder.alarm == 11
    assert asked == [float(step) for step in range(12)]
    assert sorted(set(recorder.table("flight")["step"])) == list(range(6, 12))


def test_a_divergence_after_an_alarm_adds_the_steps_since() -> None:
    with Recorder(network(), flight=K, rule=lambda row: row["given"] == 11) as recorder:
        train(recorder, 40, break_at=14)
    frame = recorder.table("flight")
    assert sorted(set(frame["step"])) == list(range(6, 15))
    assert not frame.duplicated(["step", "layer", "quantity"]).any()


def test_details_keep_their_schedule() -> None:
    with Recorder(network(), ("default", "grad_max"), flight=K) as recorder:
        train(recorder, 40, break_at=33)
    assert list(values(recorder.table("flight"), "grad_max", "0")) == [30]


def test_training_is_bitwise_the_same() -> None:
    one, other = network(), network()
    with Recorder(one, flight=K) as recorder:
        train(recorder, 30)
    with Recorder(other) as recorder:
        train(recorder, 30)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_saved_run_has_it(tmp_path: Path) -> None:
    with Recorder(network(), flight=K, save=tmp_path / "run") as recorder:
        train(recorder, 40, break_at=20)
    run = Run(tmp_path / "run")
    assert len(run.frame("flight")) == len(recorder.table("flight"))
    assert story(run.with_modules("flight"))[0] == (
        "Step 20: weight_norm of 2 is the first that is not finite (inf), in the parameters, "
        "before the step."
    )


@pytest.mark.parametrize(
    ("options", "words"), [({"rule": bool}, "rule: give flight"), ({"flight": 0}, "flight=0")]
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(SpecError, match=f"^{words}"):
        Recorder(network(), **options)


# --- what is told ---------------------------------------------------------------------------------


def flight(series: dict[tuple[str | None, str], list[float]]) -> pd.DataFrame:
    """A table of made-up series, from step 100 on; layers a, b, … in order of position."""
    rows = [
        (100 + i, layer, name, value, None if layer is None else ord(layer) - ord("a"))
        for (layer, name), numbers in series.items()
        for i, value in enumerate(numbers)
    ]
    return pd.DataFrame(rows, columns=["step", "layer", "quantity", "value", "position"])


def test_the_first_layer_forward_that_is_not_finite() -> None:
    told = story(
        flight(
            {
                ("b", "output_rms"): [1, 1, math.nan],
                ("c", "output_rms"): [1, 1, math.inf],
                ("a", "weight_grad_norm"): [1, 1, math.nan],
                (None, "loss"): [2, 3, math.nan],
            }
        )
    )
    assert told == [
        "Step 102: output_rms of b is the first that is not finite (nan), in the forward pass.",
        "In the 2 steps up to it, loss went from 2 to 3.",
        "In the steps before, no number grew 10-fold.",
    ]


def test_the_first_layer_backward_where_outputs_are_finite() -> None:
    names = ("a", "b", "c")
    told = story(
        flight(
            {(n, "output_rms"): [1, 1] for n in names}
            | {(n, "output_grad_norm"): [1, math.inf if n != "c" else 1] for n in names}
        )
    )
    assert told[0] == (
        "Step 101: output_grad_norm of b is the first that is not finite (inf), in the backward "
        "pass, all outputs being finite."
    )


def test_what_grew_first_and_what_most() -> None:
    told = story(
        flight(
            {
                ("a", "weight_norm"): [1, 1, 1, 1, 1, 1, 1, 12],
                ("b", "output_rms"): [2, 2, 2, 2, 2, 30, 2, 2],  # came back
                ("b", "weight_norm"): [1, 1, 1, 1, 1, 11, 15, 20],
                ("c", "output_rms"): [1, 1, 1, 1, 1, 1, 1e3, 1e6],
                (None, "grad_norm"): [5, 5, 5, 5, 5, 6, 7, math.inf],
            }
        )
    )
    assert told == [
        "Step 107: grad_norm not finite; no layer's number was measured that is not.",
        "In the 8 steps up to it, grad_norm went from 5 to 7.",
        "First to grow more than 10-fold and stay there: weight_norm of b, from step 105 on "
        "(20-fold by the last step); most: output_rms of c (1e+06-fold).",
    ]


def test_a_single_step_has_no_past() -> None:
    told = story(flight({("a", "output_rms"): [math.inf], (None, "loss"): [math.inf]}))
    assert told[1:] == ["It is the first step that was kept: nothing led to it."]
    assert story(flight({})) == []


def test_the_factors_are_of_the_first_half_s_median() -> None:
    told = story(flight({("a", "output_rms"): [1, 3, 2, 50, 100, math.inf]}))
    assert "output_rms of a, from step 103 on (50-fold by the last step)" in told[-1]


def test_a_loss_that_is_infinite_behind_finite_outputs() -> None:
    """log(0) in the loss, say: the gradients that follow are no beginning."""
    told = story(
        flight(
            {
                ("a", "output_rms"): [1, 1],
                ("a", "output_grad_norm"): [1, math.nan],
                (None, "loss"): [1, math.inf],
            }
        )
    )
    assert told[0].startswith(
        "Step 101: the loss is the first that is not finite (inf), all outputs being finite"
    )


def test_outputs_that_were_not_measured_are_not_called_finite() -> None:
    told = story(flight({("a", "weight_grad_norm"): [1, math.nan], (None, "loss"): [1, math.nan]}))
    assert "outputs were not measured" in told[0]


def test_a_step_that_a_scaler_skipped_is_not_the_beginning() -> None:
    told = story(
        flight(
            {
                ("a", "weight_grad_norm"): [math.inf, 1, 1, math.nan],
                ("a", "output_rms"): [1, 1, 1, math.nan],
                (None, "loss"): [1, 1, 1, math.nan],
                (None, "grad_norm"): [math.inf, 1, 1, math.nan],
            }
        )
    )
    assert told[0].startswith("Step 103: output_rms of a")


def test_what_was_infinite_all_along_is_no_beginning() -> None:
    told = story(
        flight(
            {
                ("a", "output_rms"): [math.inf, math.inf],
                ("b", "output_rms"): [1, math.nan],
                (None, "loss"): [1, math.nan],
            }
        )
    )
    assert told[0].startswith("Step 101: output_rms of b")


def test_cosines_and_shares_are_not_said_to_grow() -> None:
    told = story(
        flight({("a", "grad_cosine"): [0.01, 0.02, 0.01, 0.9], (None, "loss"): [1, 1, 1, math.nan]})
    )
    assert told[-1] == "In the steps before, no number grew 10-fold."


class Around(nn.Module):
    """Has a parameter of its own, and is left after what it is around."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


def test_a_module_around_the_one_that_broke_is_not_named() -> None:
    model, inputs = Around(), X.clone()
    model.inner[2].register_forward_pre_hook(lambda module, args: (args[0] * scale[0],))
    scale = [1.0]
    with Recorder(model, flight=K) as recorder:
        for scale[0] in (1.0, 1.0, math.inf):
            model.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            recorder.step(loss)
    assert recorder.divergence is not None
    assert recorder.divergence.layer == "inner.2"
    assert recorder.story().startswith("Step 2: output_rms of inner.2")


def test_two_events_are_told_one_by_one() -> None:
    with Recorder(network(), flight=K, rule=lambda row: row["step"] == 8) as recorder:
        train(recorder, 60, break_at=40)
    told = recorder.story().splitlines()
    assert [line for line in told if line.startswith("Step")] == [
        "Step 8, the last that was kept: all its numbers are finite.",
        "Step 40: weight_norm of 2 is the first that is not finite (inf), in the parameters, "
        "before the step.",
    ]
    assert sum("In the 6 steps up to it" in line for line in told) == 2


def test_a_recorder_that_goes_on_keeps_what_was_kept() -> None:
    model = network()
    with Recorder(model, flight=K) as first:
        train(first, 10)
        first.flush()
        state = first.state_dict()
    after = Recorder(model, flight=K)
    after.load_state_dict(state)
    with after:
        train(after, 40, break_at=2)
    assert sorted(set(after.table("flight")["step"])) == list(range(7, 13))


def train_until(recorder: Recorder, error: type[BaseException]) -> None:
    with recorder:
        train(recorder, 9)
        raise error


def test_where_the_loop_raises_the_last_steps_are_written() -> None:
    """`if not isfinite(loss): raise` in front of `step` is the commonest guard of all."""
    recorder = Recorder(network(), flight=K)
    with pytest.raises(ZeroDivisionError):
        train_until(recorder, ZeroDivisionError)
    assert sorted(set(recorder.table("flight")["step"])) == list(range(3, 9))
    assert recorder.story().startswith("Step 8, the last that was kept: all its numbers are finite")
    stopped = Recorder(network(), flight=K)
    with pytest.raises(KeyboardInterrupt):
        train_until(stopped, KeyboardInterrupt)
    assert stopped.table("flight").empty
