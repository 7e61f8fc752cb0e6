"""The conversation with one worker process, whose runs are those of `fake_worker`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_worker as fake
import pytest

from gradflow.spec import RunSpec
from gradflow.store import Run

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
COMMAND = [sys.executable, "-P", fake.__file__]


def job(seed, runs_dir):
    spec = RunSpec(depth=8, seed=seed)
    return json.dumps({"spec": spec.to_dict(), "settings": {"runs_dir": str(runs_dir)}}) + "\n"


def strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def converse(runs_dir, *seeds):
    """Exit code, events and stderr of a worker that is given these jobs."""
    text = "".join(job(seed, runs_dir) for seed in seeds)
    done = subprocess.run(
        COMMAND, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    return done.returncode, [strict(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def start(tmp_path):
    """Starts a worker at one endless job and waits until it is in the midst of it."""
    started = []

    def begin(seed):
        worker = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        started.append(worker)
        worker.stdin.write(job(seed, tmp_path))
        worker.stdin.flush()
        begun = strict(worker.stdout.readline())
        assert begun["event"] == "begin"
        return worker, Path(begun["path"])

    yield begin
    for worker in started:
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()


def test_each_job_ends_once_and_a_failure_does_not_end_the_worker(tmp_path):
    seeds = (0, fake.RAISES, fake.QUITS, fake.REFUSED, fake.DIVERGES)
    code, events, _ = converse(tmp_path, *seeds)
    ends = [event for event in events if event["event"] == "end"]
    assert code == 0
    assert [end["run"] for end in ends] == [RunSpec(depth=8, seed=seed).name for seed in seeds]
    assert [end["status"] for end in ends] == ["done", *["failed"] * 3, "diverged"]
    raised, quit_, refused = (end["error"] for end in ends[1:4])
    assert raised.splitlines()[-1] == "ValueError: of the user's making"
    assert "in act" in raised
    assert quit_.splitlines()[-1] == "SystemExit: no longer"
    assert refused == "device=nowhere: this machine has no such device"
    assert len({Run(end["path"]).record["pid"] for end in ends if end["path"]}) == 1


def test_numbers_that_are_not_finite_are_words(tmp_path):
    _, events, _ = converse(tmp_path, 0)
    step, end = (next(e for e in events if e["event"] == kind) for kind in ("step", "end"))
    assert (step["loss"], step["accuracy"], step["ratio"]) == ("NaN", 0.5, "Infinity")
    assert end["metrics"] == {"train_loss": "NaN", "train_accuracy": 0.5}


def test_what_a_run_prints_is_not_taken_for_what_the_worker_says(tmp_path):
    code, events, noise = converse(tmp_path, fake.NOISY, 0)
    assert code == 0
    assert [event["event"] for event in events] == ["begin", "step", "end"] * 2
    assert "a liar" in noise
    assert "a child's noise" in noise
    assert "a half line" in noise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_as_interrupted(start, number):
    worker, path = start(fake.WAITS)
    worker.send_signal(number)
    assert worker.wait(30) == 130
    assert strict(worker.stdout.readline())["status"] == "interrupted"
    assert Run(path).status == "interrupted"


def test_a_second_signal_does_not_disturb_the_first(start):
    worker, path = start(fake.WAITS)
    while worker.poll() is None and not (path / "tidy").exists():
        worker.send_signal(signal.SIGINT)
        time.sleep(0.02)
    worker.wait(30)  # with 130, or killed by a signal that came after all was done
    assert Run(path).status == "interrupted"
    assert (path / "tidy").exists()


def test_nothing_is_computed_for_a_parent_that_died_meanwhile(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    command = [*COMMAND, str(parent.pid)]
    text = job(fake.WAITS, tmp_path)
    done = subprocess.run(command, input=text, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 130


def test_a_run_does_not_outlive_the_reader_of_what_it_says(start):
    worker, path = start(fake.PAIR[0])
    worker.stdout.close()
    (path.parent / f"{fake.PAIR[1]}.here").touch()  # now it goes on, and speaks
    assert worker.wait(30) == 130
    assert Run(path).status == "interrupted"


def test_the_end_of_stdin_lets_the_job_finish(start):
    worker, path = start(fake.PAIR[0])
    worker.stdin.close()
    (path.parent / f"{fake.PAIR[1]}.here").touch()
    assert worker.wait(30) == 0
    assert Run(path).status == "done"
