"""`python -m gradflow.worker [PARENT]`: computes runs for a sweep, one after another.

A job is a line of JSON on stdin, `{"spec": {…}, "settings": {…}}`. Each thing said is a line of
JSON on stdout: the events of `run`, and after each job exactly one `end`, whatever became of it, or
`elsewhere` where another process is at work on the run.
What else writes to stdout, a user's network say, goes to stderr. At the end of stdin the worker
exits.

SIGINT or SIGTERM end the run at work as `interrupted`, and the worker with it. So does the death of
the process PARENT (by default the one that started it): nothing computes on without a reader.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from gradflow.errors import Busy, GradflowError
from gradflow.interrupt import Interrupt, of_interrupt
from gradflow.spec import RunSpec
from gradflow.store import encode

GRACE = 20.0
"""Seconds that an interrupted run has to write down its end before its process is killed."""
LAST_LINES = 6
"""Lines of a traceback, or of a dead worker's stderr, that are handed on."""
_POLL = 0.5
_INTERRUPTED = 130  # the shell's exit code for a process ended by SIGINT

Say = Callable[[dict[str, Any]], None]


def main(parent: int) -> int:
    """Compute the jobs on stdin until it ends; the process's exit code."""
    jobs, said = _take_pipes()

    interrupt = Interrupt()

    def say(event: dict[str, Any]) -> None:
        try:
            said.write(json.dumps(encode(event), allow_nan=False) + "\n")
            said.flush()
        except BrokenPipeError:
            interrupt()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        for line in jobs:
            _compute(json.loads(line), say)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _take_pipes() -> tuple[TextIO, TextIO]:
    """The two ends of the conversation, under descriptors that nobody else writes to."""
    jobs, said = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return jobs, said


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(GRACE)
    os._exit(_INTERRUPTED)


def _compute(job: dict[str, Any], say: Say) -> None:
    spec = RunSpec.from_dict(job["spec"])
    end: dict[str, Any] = {"event": "end", "run": spec.name, "status": "failed", "path": None}
    end |= {"metrics": {}, "error": None, "reused": False}

    def pass_on(event: dict[str, Any]) -> None:
        if event["event"] != "end":
            say(event)
        else:
            end["reused"] = event["reused"]

    try:
        from gradflow.run import run  # loads torch, and Lightning where it is needed: once a worker

        done = run(spec, emit=pass_on, **job["settings"])
    except KeyboardInterrupt:
        say(end | {"status": "interrupted"})
        raise
    except Busy as error:
        say({"event": "elsewhere", "run": spec.name, "error": str(error)})
    except BaseException as error:  # a SystemExit in a user's network ends its run, not the worker
        if of_interrupt(error):
            say(end | {"status": "interrupted"})
            raise KeyboardInterrupt from error
        say(end | {"error": _last_lines(error)})
    else:
        record = {"status": done.status, "path": str(done.path), "metrics": done.metrics}
        say(end | record | {"error": done.record.get("error")})


def _last_lines(error: BaseException) -> str:
    if isinstance(error, GradflowError):
        return str(error)
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else os.getppid()))
