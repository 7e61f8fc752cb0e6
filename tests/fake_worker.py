"""A worker like `python -m gradflow.worker` whose runs cost nothing: what they do is in their seed.

The store, the pipes and the processes are real; only `gradflow.run` is replaced.
"""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

from gradflow.errors import GradflowError, StoreError
from gradflow.store import Run, RunWriter, find
from gradflow.worker import main

RAISES, KILLED, EXITS, REFUSED, WAITS, STUBBORN, NOISY, DIVERGES, QUITS, SLOW, FORKS = range(
    900, 911
)
PAIR = (920, 921)


def run(spec, *, emit, runs_dir, **settings):
    if spec.seed == REFUSED:
        raise GradflowError("device=nowhere: this machine has no such device")
    if spec.seed == STUBBORN:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    path = Path(runs_dir) / spec.name

    def keep(attempt):
        if find(runs_dir, spec) is not None:
            raise FileExistsError
        return 0

    try:
        writer = RunWriter(path, spec.to_dict(), keep=keep)
    except StoreError:
        if find(runs_dir, spec) is None:
            raise
        emit({"event": "end", "run": spec.name, "reused": True})
        return Run(path)
    with writer:
        writer.update(pid=os.getpid(), settings=settings)
        try:
            emit({"event": "begin", "run": spec.name, "steps": 10, "path": str(path)})
            act(spec.seed, path)
        except KeyboardInterrupt:
            time.sleep(0.3)  # as long as a large record takes to be written
            (path / "tidy").touch()
            raise
        step = {"event": "step", "run": spec.name, "step": 10}
        emit(step | {"loss": math.nan, "accuracy": 0.5, "ratio": math.inf})
        emit({"event": "end", "run": spec.name, "reused": False})
        metrics = {"train_loss": math.nan, "train_accuracy": 0.5}
        writer.finish("diverged" if spec.seed == DIVERGES else "done", metrics=metrics)
    return Run(path)


def act(seed, path):
    if seed == RAISES:
        raise ValueError("of the user's making")
    if seed == KILLED:
        print("the last words")
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == SLOW:
        time.sleep(1.0)  # some looks of the sweep at what others are at work on
    if seed == FORKS:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        (path / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == EXITS:
        os._exit(3)
    if seed == QUITS:
        sys.exit("no longer")
    if seed == NOISY:
        print('{"event": "end", "run": "a liar"}')
        subprocess.run(["echo", "a child's noise"], check=True)
        os.write(1, b"a half line")
    if seed in PAIR:
        (path.parent / f"{seed}.here").touch()
        wait_for(path.parent / f"{sum(PAIR) - seed}.here")
    while seed in (WAITS, STUBBORN):
        time.sleep(0.05)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)


if __name__ == "__main__":
    sys.modules["gradflow.run"] = ModuleType("gradflow.run")
    sys.modules["gradflow.run"].run = run
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else os.getppid()))
