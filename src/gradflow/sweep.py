"""Many runs: specs -> what is missing -> worker processes that compute it.

The parent never loads torch. It hands each worker one job at a time, the longest first, and keeps
no state but that of the processes: what is done stands in the store, so that the same sweep started
again goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradflow.errors import StoreError
from gradflow.progress import guarded
from gradflow.spec import Execution, RunSpec
from gradflow.store import STATUSES, Run, find, mark_dead, prepare
from gradflow.worker import GRACE, LAST_LINES

Say = Callable[[dict[str, Any]], None]

COMMAND = (sys.executable, "-P", "-m", "gradflow.worker")
_TURN = 0.2  # seconds between looks at the processes while nothing is said
_PIPE = 1 << 20  # bytes: at least what a pipe holds, so that one read empties it


@dataclass(frozen=True)
class SweepResult:
    """What became of a sweep.

    Attributes:
        runs: the run of each spec, in the order of the specs; None where it left no record.
        failures: each spec without a result, with the last lines of its error.
        reused: how many different runs were in the store already.
        counts: how many different runs have which status, reused ones included.
    """

    runs: list[Run | None]
    failures: list[tuple[RunSpec, str]]
    reused: int
    counts: dict[str, int]

    def summary(self) -> str:
        """One line, and the failures with their errors below it."""
        total = sum(self.counts.values())
        parts = [f"{count} {status}" for status, count in self.counts.items()]
        reused = f"; {self.reused} of them from before" if self.reused else ""
        lines = [f"{total} run{'s' * (total != 1)}: {', '.join(parts) or 'none'}{reused}."]
        for spec, error in self.failures:
            lines += [f"{spec.name}:", *(f"    {line}" for line in error.splitlines())]
        return "\n".join(lines)


def sweep(specs: Iterable[RunSpec], *, display: Say | None = None, **settings: Any) -> SweepResult:
    """Compute what the store lacks of these runs, several side by side, each in a worker process.

    A run that fails or whose process dies does not stop the others. One that is in the store
    already, or twice in the list, is not computed again.

    Args:
        specs: what to run, in any order; the longest is computed first.
        display: is told what happens, one dict of plain JSON data at a time, such as
            `progress.Display()`. What it raises is not allowed to stop the sweep.
        settings: fields of `Execution`. `threads=auto` is one a run, `jobs=auto` as many
            workers as the usable cores have room for.

    Raises:
        SpecError: a setting that is not allowed.
        StoreError: `runs_dir` cannot be written.
        KeyboardInterrupt: on Ctrl-C, after the runs at work have ended as `interrupted` and no
            worker is left.
    """
    execution = Execution(**settings)
    store = prepare(execution.runs_dir)
    say = guarded(display)
    specs = list(specs)
    unique = {spec.run_id: spec for spec in specs}
    # A worker reads a user's files, and finds out whether they are what they were.
    missing = [s for s in unique.values() if s.data.name == "files" or find(store, s) is None]
    missing.sort(key=cost, reverse=True)
    threads = 1 if execution.threads == "auto" else int(execution.threads)
    jobs = max(1, _cores() // threads) if execution.jobs == "auto" else int(execution.jobs)
    pool = _Pool(
        min(jobs, len(missing)),
        {
            "runs_dir": execution.runs_dir,
            "device": execution.device,
            "threads": threads,
            "logger": execution.logger,
        },
        say,
    )
    say(
        {"event": "sweep", "reused": len(unique) - len(missing), "workers": pool.size}
        | {"runs": [{"run": spec.name, "cost": cost(spec)} for spec in missing]}
    )
    pool.compute(missing)
    return _result(store, specs, len(unique) - len(missing), pool.ends)


def cost(spec: RunSpec) -> float:
    """Roughly how long a run takes, in a unit of no meaning: for order and for the time left.

    Images that pass × depth × width²: the convolutions of a network grow so, and the
    resolution of the images is taken as given. The 2,000 images stand for starting and evaluating,
    and for data whose size is not known without reading it 50,000 are assumed.
    """
    updates = spec.updates(spec.data.train_size or 50_000)
    images = updates * spec.batch_size * spec.accumulate + 2000
    return float(images * (spec.depth or 1) * (spec.width or 1) ** 2)


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _result(
    store: Path, specs: list[RunSpec], reused: int, ends: dict[str, tuple[str, str]]
) -> SweepResult:
    unique = {spec.run_id: spec for spec in specs}
    runs = {run_id: _load(store / spec.name) for run_id, spec in unique.items()}
    statuses: Counter[str] = Counter()
    for run_id, run in runs.items():
        status, _ = ends.get(run_id, (run.status if run is not None else "failed", ""))
        statuses[status] += 1
    failures = [
        (unique[run_id], error or "interrupted: its worker was told to stop")
        for run_id, (status, error) in ends.items()
        if status in ("failed", "interrupted")
    ]
    counts = {status: statuses[status] for status in STATUSES if statuses[status]}
    return SweepResult([runs[spec.run_id] for spec in specs], failures, reused, counts)


def _load(path: Path) -> Run | None:
    try:
        return Run(path)
    except StoreError:
        return None


class _Worker:
    """A worker process, the job it is at, and what it has said but not yet finished saying.

    It leads a session of its own, so that the terminal's Ctrl-C reaches the parent alone.
    """

    def __init__(self) -> None:
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self.process = subprocess.Popen(
            [*COMMAND, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths},  # a user's modules are found as in the parent
        )
        self.job: RunSpec | None = None
        self.deadline: float | None = None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        stdin, stdout, stderr = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.heard = {stdout, stderr}
        self._rests = {stdout: b"", stderr: b""}
        for stream in self.heard:
            os.set_blocking(stream.fileno(), False)

    def begin(self, job: RunSpec, settings: dict[str, Any]) -> None:
        self.job = job
        self.last_lines.clear()
        line = json.dumps({"spec": job.to_dict(), "settings": settings}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has died, which is noticed in its turn
            self.stdin.write(line.encode())

    def lines(self, stream: Any, *, all_of_it: bool = False) -> tuple[list[str], bool]:
        """Whole lines that have arrived, or with the begun one, and whether more may come."""
        try:
            data = os.read(stream.fileno(), _PIPE)
            more = bool(data)
        except BlockingIOError:
            data, more = b"", True
        *whole, self._rests[stream] = (self._rests[stream] + data).split(b"\n")
        if self._rests[stream] and (all_of_it or not more):
            whole.append(self._rests[stream])
            self._rests[stream] = b""
        return [line.decode(errors="replace") for line in whole], more

    def dismiss(self, *, interrupt: bool = False) -> None:
        """Let it end after its job, or at once; within the time of grace."""
        self.deadline = time.monotonic() + GRACE
        self.stdin.close()
        if interrupt and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it together with whatever processes it has started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class _Pool:
    """The workers of one sweep.

    Attributes:
        ends: run_id -> status and error (empty if none) of each job that has ended.
    """

    def __init__(self, size: int, settings: dict[str, Any], say: Say) -> None:
        self.size = size
        self.ends: dict[str, tuple[str, str]] = {}
        self._settings = settings
        self._say = say
        self._waiting: deque[RunSpec] = deque()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def compute(self, specs: Iterable[RunSpec]) -> None:
        """Compute them all. On any exception, first end the workers in good order."""
        self._waiting.extend(specs)
        try:
            for _ in range(self.size):
                self._hire()
            while self._workers:
                self._turn()
        except BaseException:
            self._stop()
            raise
        finally:
            self._selector.close()

    def _hire(self) -> None:
        worker = _Worker()
        self._workers.append(worker)
        for stream in worker.heard:
            self._selector.register(stream, selectors.EVENT_READ, worker)
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        worker.job = None
        if self._waiting and worker.process.returncode is None:
            job = self._waiting.popleft()
            self._say({"event": "start", "run": job.name})
            worker.begin(job, self._settings)
        elif worker.deadline is None:
            worker.dismiss()

    def _stop(self) -> None:
        """Interrupt the runs at work and wait for them; a second Ctrl-C kills them."""
        self._stopping = True
        self._waiting.clear()
        try:
            self._say({"event": "stopping"})
            for worker in self._workers:
                worker.dismiss(interrupt=True)
            while self._workers:
                self._turn()
        except BaseException:
            for worker in self._workers:
                worker.kill()
            while self._workers:
                self._turn()
            raise

    def _turn(self) -> None:
        """Hear what the workers say, and look after those that have ended or are overdue."""
        for key, _ in self._selector.select(_TURN):
            self._hear(key.data, key.fileobj)
        for worker in list(self._workers):
            if worker.process.poll() is not None:
                self._bury(worker)
            elif worker.deadline is not None and time.monotonic() > worker.deadline:
                worker.kill()

    def _hear(self, worker: _Worker, stream: Any, *, all_of_it: bool = False) -> None:
        lines, more = worker.lines(stream, all_of_it=all_of_it)
        if not more:
            self._leave(worker, stream)
        for line in lines:
            event = _event(line) if stream is worker.stdout else None
            if event is None:
                self._noise(worker, line)
            elif event["event"] == "end":
                # What was written to stderr was written before, and is this job's.
                self._hear(worker, worker.stderr, all_of_it=True)
                self._end(worker, event)
            else:
                self._say(event)

    def _leave(self, worker: _Worker, stream: Any) -> None:
        if stream in worker.heard:
            worker.heard.remove(stream)
            self._selector.unregister(stream)

    def _noise(self, worker: _Worker, line: str) -> None:
        worker.last_lines.append(line)
        name = None if worker.job is None else worker.job.name
        if not self._stopping:  # what comes then are traces of the interrupt
            self._say({"event": "output", "run": name, "line": line})

    def _end(self, worker: _Worker, event: dict[str, Any]) -> None:
        if worker.job is not None:
            self.ends[worker.job.run_id] = (event["status"], event["error"] or "")
            self._say(event)
        if event["status"] == "interrupted":  # it leaves, and another takes its place
            worker.job = None
            if worker.deadline is None:
                worker.dismiss()
        else:
            self._next(worker)

    def _bury(self, worker: _Worker) -> None:
        for stream in (worker.stderr, worker.stdout):
            self._hear(worker, stream, all_of_it=True)
            self._leave(worker, stream)
        for stream in (worker.stdin, worker.stdout, worker.stderr):
            stream.close()
        self._workers.remove(worker)
        if worker.job is not None:
            self._bury_job(worker, worker.job)
        if self._waiting:
            self._hire()

    def _bury_job(self, worker: _Worker, job: RunSpec) -> None:
        status, cause = "failed", _cause(worker.process.returncode)
        if self._stopping:
            status, cause = "interrupted", f"interrupted, {cause}"
        path = Path(self._settings["runs_dir"]) / job.name
        with contextlib.suppress(StoreError):  # the others go on, and this sweep still reports it
            mark_dead(path, status, cause)
        error = "\n".join([*worker.last_lines, cause])
        self.ends[job.run_id] = (status, error)
        self._say(
            {"event": "end", "run": job.name, "status": status, "path": str(path), "metrics": {}}
            | {"error": error, "reused": False}
        )


def _event(line: str) -> dict[str, Any] | None:
    """What a worker said; None if it is not an event, as when a start-up file of Python prints."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _cause(code: int) -> str:
    if code >= 0:
        return f"its process exited with code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed by signal {-code}"
