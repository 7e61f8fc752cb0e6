import io

import pytest
from rich.console import Console

from gradflow.progress import Display, Job, duration, guarded, labels, outcome, time_left

PLAIN, SKIP = "cifar-152-none-s0-0123456789", "cifar-152-identity-s0-abcdef0123"
LONG = "imagenet-152-stochastic_depth-s0-0123456789"


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def plain_display():
    clock, out = Clock(), io.StringIO()
    return Display(Console(file=out, width=80), clock), clock, out


def terminal_display(height=24):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=80, height=height, force_terminal=True, color_system=None)
    return Display(console, clock), clock, out


def picture(display):
    console = Console(file=io.StringIO(), width=80, color_system=None, record=True)
    console.print(display.picture())
    return [line.rstrip() for line in console.export_text().splitlines()]


def plan(*names, reused=0, workers=2):
    runs = [{"run": name, "cost": 10.0} for name in names]
    return {"event": "sweep", "runs": runs, "reused": reused, "workers": workers}


def start(name):
    return {"event": "start", "run": name}


def begin(name, steps=264):
    return {"event": "begin", "run": name, "steps": steps, "path": f"runs/{name}"}


def step(name, at, loss=2.3034, accuracy=0.1042, ratio=12345.0):
    values = {"loss": loss, "accuracy": accuracy, "ratio": ratio}
    return {"event": "step", "run": name, "step": at, **values}


def end(name, status="done", error=None, **metrics):
    values = {"status": status, "metrics": metrics, "error": error, "reused": False}
    return {"event": "end", "run": name, "path": f"runs/{name}", **values}


# --- time left ------------------------------------------------------------------------------------


def job(cost, status, *, step=0, begun=None, ended=None, first=None):
    fields = {"step": step, "steps": 100, "begun": begun, "ended": ended, "first": first}
    return Job(f"{cost} {status} {step}", "", cost, status, **fields)


def test_there_is_no_time_left_to_tell_before_anything_is_computed():
    assert time_left([job(10, "starting"), job(10, "waiting")], 2, 100) is None
    assert time_left([job(10, "running", begun=0)], 1, 100) is None
    assert time_left([job(10, "running", begun=99, step=1)], 1, 100) is None  # 1 s of it


def test_a_run_alone_goes_on_at_its_pace():
    assert time_left([job(1, "running", begun=60, step=80)], 1, 100) == pytest.approx(10)
    # 30 s of loading came before the first step was heard of, in which a tenth was done already.
    loaded = job(1, "running", begun=60, step=60, first=(90.0, 0.1))
    assert time_left([loaded], 1, 100) == pytest.approx(10 / 0.5 * 0.4)


def test_what_waits_goes_to_the_worker_that_is_free_first():
    ended = job(30, "done", begun=0, ended=60)  # 2 s a unit of cost
    running = job(10, "running", begun=90, step=50)  # its own pace: 10 s are left
    jobs = [ended, running, job(5, "starting")]  # not begun: 5 × the pace of all
    pace = (60 + 10) / (30 + 5)
    assert time_left(jobs, 2, 100) == pytest.approx(5 * pace)
    jobs += [job(8, "waiting"), job(1, "waiting")]
    assert time_left(jobs, 2, 100) == pytest.approx(10 + 8 * pace)
    assert time_left(jobs, 3, 100) == pytest.approx(8 * pace)


def test_a_run_that_ended_early_counts_for_what_it_did():
    diverged = job(40, "diverged", begun=0, ended=10, step=25)
    assert time_left([diverged, job(40, "waiting")], 1, 100) == pytest.approx(40)


# --- plain lines ----------------------------------------------------------------------------------


def test_plain_lines_of_a_sweep():
    display, clock, out = plain_display()
    with display:
        display(plan(PLAIN, SKIP, reused=3, workers=1))
        display(start(PLAIN))
        display(begin(PLAIN))
        display({"event": "output", "run": PLAIN, "line": "a [user] prints"})
        for seconds in range(1, 22):
            clock.now = 100.0 + seconds
            display(step(PLAIN, seconds))
        display({"event": "evaluation", "run": PLAIN, "step": 22, "split": "test"})
        clock.now = 160.0
        display(end(PLAIN, train_accuracy=0.112, test_accuracy="NaN"))
        display(start(SKIP))
        display(end(SKIP, "failed", error="Traceback …\nValueError: [no] such thing"))
    assert out.getvalue().splitlines() == [
        "3 of 5 runs in the store already, not run again.",
        "2 runs to compute, 1 side by side.",
        "cifar-152-none s0 | a [user] prints",
        "cifar-152-none s0: step 10 of 264, loss 2.303, accuracy 10.4%, grad first/last 1.2e+04",
        "cifar-152-none s0: step 20 of 264, loss 2.303, accuracy 10.4%, grad first/last 1.2e+04",
        "cifar-152-none s0: done in 1 min 00 s, train accuracy 11.2%, test nan%"
        " [2 runs: 1 done, 0 running, 0 failed, 0 diverged, 1 left; 59 s left]",
        "cifar-152-identity s0: failed: ValueError: [no] such thing"
        " [2 runs: 1 done, 0 running, 1 failed, 0 diverged, 0 left]",
    ]


@pytest.mark.parametrize(
    ("steps", "start", "words"),
    [(1, 0, "begins, 1 step"), (880, 352, "goes on from step 352 of 880 steps")],
)
def test_a_run_that_goes_on_says_from_where(steps, start, words):
    display, _, out = plain_display()
    with display:
        display(begin(SKIP, steps=steps) | {"start": start})
    assert out.getvalue() == f"cifar-152-identity s0: {words}\n"


def test_plain_lines_of_one_run():
    display, clock, out = plain_display()
    with display:
        display(begin(SKIP, steps=100))
        display(step(SKIP, 10))
        clock.now += 10
        display(step(SKIP, 30, loss="Infinity", accuracy=1.0, ratio=None))
        display(end(SKIP))
    assert out.getvalue().splitlines() == [
        "cifar-152-identity s0: begins, 100 steps",
        "cifar-152-identity s0: step 30 of 100, loss inf, accuracy 100.0%; 35 s left",
    ]


# --- a terminal -----------------------------------------------------------------------------------


def test_the_live_lines_of_a_sweep_fit_into_80_columns():
    display, clock, out = terminal_display()
    with display:
        display(plan(LONG, PLAIN, SKIP))
        display(start(LONG))
        display(start(PLAIN))
        display(begin(PLAIN))
        display(step(PLAIN, 2))
        clock.now += 4
        display(step(PLAIN, 134))
        lines = picture(display)
    assert lines[0].split() == ["run", "loss", "accuracy", "grad", "first/last"]
    assert lines[1].startswith("imagenet-152-stochastic_depth s0 starting")
    words = lines[2].split()
    assert words[:2] == ["cifar-152-none", "s0"]
    assert words[-4:] == ["51%", "2.303", "10.4%", "1.2e+04"]
    assert lines[3] == "3 runs: 0 done, 2 running, 0 failed, 0 diverged, 1 left; 12 s left"
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    drawn = out.getvalue()
    assert "1.2e+04" in drawn
    hidden, shown = drawn.rindex("\x1b[?25l"), drawn.rindex("\x1b[?25h")
    assert shown > hidden  # the cursor is back


def test_the_live_lines_of_one_run():
    display, clock, _ = terminal_display()
    with display:
        display(begin(SKIP, steps=100))
        assert picture(display)[-1] == "step 0 of 100"
        display(step(SKIP, 0, ratio=None))
        clock.now += 10
        display(step(SKIP, 20, ratio=0.52))
        assert picture(display)[1].split()[-3:] == ["2.303", "10.4%", "0.52"]
        assert picture(display)[-1] == "step 20 of 100; 40 s left"
        display(end(SKIP))
        assert picture(display) == []


def test_ended_runs_stand_above_the_live_lines():
    display, _, out = terminal_display()
    with display:
        display(plan(PLAIN, SKIP))
        for name in (PLAIN, SKIP):
            display(start(name))
            display(begin(name))
        display(end(PLAIN, "diverged"))
        assert "cifar-152-none s0: diverged after 1 s" in out.getvalue()
        assert not any("cifar-152-none s0" in line for line in picture(display))
        display({"event": "stopping"})
        assert "Stopping: 1 run at work, ending as interrupted …" in out.getvalue()
        display(end(SKIP, "interrupted"))
        assert picture(display) == [
            "2 runs: 0 done, 0 running, 0 failed, 1 diverged, 1 interrupted, 0 left"
        ]


def test_more_runs_than_the_terminal_has_lines():
    display, _, _ = terminal_display(height=10)
    members = [PLAIN.replace("s0", f"s{seed}") for seed in range(20)]
    with display:
        display(plan(*members, workers=20))
        for name in members:
            display(start(name))
        lines = picture(display)
    assert len(lines) <= 10
    assert lines[-2:] == [
        "and 14 runs more",
        "20 runs: 0 done, 20 running, 0 failed, 0 diverged, 0 left",
    ]


# --- words ----------------------------------------------------------------------------------------


def test_labels_tell_runs_apart():
    assert labels([PLAIN, SKIP]) == ["cifar-152-none s0", "cifar-152-identity s0"]
    other = "cifar-152-none-s0-fedcba9876"
    assert labels([PLAIN, other]) == ["cifar-152-none s0 0123", "cifar-152-none s0 fedc"]


def test_durations_and_outcomes():
    texts = {0.4: "1 s", 59.4: "59 s", 59.6: "1 min 00 s", 3599: "59 min 59 s"}
    texts |= {3600 * 2 + 301: "2 h 05 min"}
    assert {seconds: duration(seconds) for seconds in texts} == texts
    assert (
        outcome("done", 80, {"train_accuracy": 0.998}) == "done in 1 min 20 s, train accuracy 99.8%"
    )
    assert outcome("failed", None, {}, "a\nb") == "failed: b"


def test_a_guarded_display_gives_up_once(capsys):
    calls = []

    def broken(event):
        calls.append(event)
        raise KeyError("loss")

    say = guarded(broken)
    say({"event": "step"})
    say({"event": "step"})
    assert len(calls) == 1
    assert capsys.readouterr().err == "progress is no longer shown (KeyError: 'loss')\n"
    guarded(None)({"event": "step"})
