"""Many runs: specs -> what is missing -> worker processes that compute it.

The parent never loads torch. It hands each worker one job at a time, the longest first, and keeps
no state but that of the processes: what is done stands in the store, so that the same sweep started
again goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gradflow.claim import LEASE, alive, lock
from gradflow.environment import cores
from gradflow.errors import StoreError
from gradflow.progress import guarded
from gradflow.spec import OWN, Execution, RunSpec
from gradflow.store import (
    FINISHED,
    LASTING,
    STATUSES,
    SWEEPS,
    Run,
    encode,
    find,
    mark_dead,
    prepare,
)
from gradflow.worker import GRACE, LAST_LINES

Say = Callable[[dict[str, Any]], None]

COMMAND = (sys.executable, "-P", "-m", "gradflow.worker")
_TURN = 0.2  # seconds between looks at the processes while nothing is said
_LOOK = 1.0  # seconds between looks at runs that other processes are at work on
_OUTCOME = ("status", "path", "metrics", "error", "reused")
_PIPE = 1 << 20  # bytes: at least what a pipe holds, so that one read empties it


@dataclass(frozen=True)
class SweepResult:
    """What became of a sweep.

    Attributes:
        runs: the run of each spec, in the order of the specs; None where it left no record.
        failures: each spec without a result, with the last lines of its error.
        reused: how many different runs other sweeps have computed, before or meanwhile.
        counts: how many different runs have which status, reused ones included; those that were
            not begun are `left`.
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


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do, by run_id.

    Attributes:
        specs: all different runs.
        missing: those to compute, the longest first.
        failed: those that failed before and would again, with their errors.
    """

    specs: dict[str, RunSpec]
    missing: list[RunSpec]
    failed: dict[str, str]

    @property
    def sweep_id(self) -> str:
        """A sweep is known by the set of its runs: ten hexadecimal digits."""
        return hashlib.sha256(" ".join(sorted(self.specs)).encode()).hexdigest()[:10]


def sweep(specs: Iterable[RunSpec], *, display: Say | None = None, **settings: Any) -> SweepResult:
    """Compute what the store lacks of these runs, several side by side, each in a worker process.

    A run that fails, hangs, or whose process dies does not stop the others. One that is in the
    store already, or twice in the list, is not computed again; one that another process is at work
    on is waited for.

    Args:
        specs: what to run, in any order; the longest is computed first.
        display: is told what happens, one dict of plain JSON data at a time, such as
            `progress.Display()`. What it raises is not allowed to stop the sweep.
        settings: fields of `Execution`. `threads=auto` is one a run, `jobs=auto` as many
            workers as the usable cores, or GPUs, have room for.

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
    todo = plan(store, specs, retry_failed=execution.retry_failed)
    fetch(todo.missing)
    if execution.launcher == "slurm":
        from gradflow.slurm import Slurm

        launcher: _Launcher = Slurm(execution, say, most=len(todo.missing))
    else:
        launcher = Pool(execution, say, most=len(todo.missing))
    reused = len(todo.specs) - len(todo.missing) - len(todo.failed)
    say(
        {"event": "sweep", "reused": reused, "workers": launcher.size}
        | {"runs": [{"run": spec.name, "cost": cost(spec)} for spec in todo.missing]}
    )
    with _announced(store, todo, launcher.size):
        ends = launcher.compute(todo.missing)
    failed = {run_id: End("failed", error) for run_id, error in todo.failed.items()}
    return _result(store, specs, todo, ends | failed, reused)


def plan(store: Path, specs: Iterable[RunSpec], *, retry_failed: bool = False) -> Plan:
    """What of these runs the store lacks. Reads two small files of each run that is there."""
    unique = {spec.run_id: spec for spec in specs}
    there = {entry.name for entry in os.scandir(store)} if store.is_dir() else set()
    missing, failed = [], {}
    for run_id, spec in unique.items():
        # A worker reads a user's files, and finds out whether they are what they were.
        if spec.name not in there or spec.data.name in OWN:
            missing.append(spec)
        elif find(store, spec) is None:
            error = None if retry_failed else _lasting_failure(store / spec.name)
            if error is None:
                missing.append(spec)
            else:
                failed[run_id] = error
    return Plan(unique, sorted(missing, key=cost, reverse=True), failed)


def fetch(specs: list[RunSpec]) -> None:
    """Download what the user's word is given for: once, before several look for it."""
    for data in dict.fromkeys(spec.data for spec in specs if spec.data.download):
        from gradflow import vision  # loads torch

        vision.download(data)


def _lasting_failure(path: Path) -> str | None:
    """The error of a run that failed and would again; None of any other."""
    run = _load(path)
    if run is None or not _would_again(run):
        return None
    return f"{run.record.get('error')}\nfailed before; retry_failed=true tries it again"


def _would_again(run: Run) -> bool:
    return run.status == "failed" and run.record.get("failure") in LASTING


@contextlib.contextmanager
def _announced(store: Path, todo: Plan, workers: int) -> Iterator[None]:
    """Says in the store, for others to read, what this sweep is of, as long as it is under way.

    The file is locked while this process lives, so that one left by a kill is known as such.
    """
    path = store / SWEEPS / f"{todo.sweep_id}.json"
    handle = None
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        handle = lock(path, patience=0.5)
        path.write_text(json.dumps(_about(todo, workers)))
    except OSError:  # it is for show; the same sweep may be under way in another process
        pass
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _about(todo: Plan, workers: int) -> dict[str, Any]:
    missing = {spec.run_id for spec in todo.missing}
    runs = [
        {"run": spec.name, "cost": cost(spec), "steps": _steps(spec), "missing": run_id in missing}
        for run_id, spec in todo.specs.items()
    ]
    about = {"started": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
    return {**about, "workers": workers, "runs": runs}


def _steps(spec: RunSpec) -> int | None:
    """Updates of a run, where they are known without reading its data."""
    size = spec.data.train_size
    return spec.updates(size or 1) if size is not None or spec.max_steps is not None else None


def cost(spec: RunSpec) -> float:
    """Roughly how long a run takes, in a unit of no meaning: for order and for the time left.

    Images that pass × depth × width², the multiplications of linear layers, and for convolutions of
    3×3 those at the 64 places of an image of 8×8, whatever its resolution. The 2,000 images stand
    for starting and evaluating, and for data whose size is not known without reading it 50,000 are
    assumed. A network of the user's that says no depth or width is taken for one of 20 and 64.
    """
    updates = spec.updates(spec.data.train_size or 50_000)
    images = updates * spec.batch_size * spec.accumulate + 2000
    places = 9 * 64 if spec.network.name in ("cifar", "imagenet") else 1
    return float(images * places * (spec.depth or 20) * (spec.width or 64) ** 2)


def _gpus() -> int:
    """CUDA devices this process may use, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _places(execution: Execution, threads: int) -> list[str]:
    """The device of each worker: as many as there is room for, or as were asked for."""
    device, gpus = execution.device, _gpus()
    if device == "cpu" or (device == "auto" and not gpus):
        room = [device] * max(1, cores() // (threads * execution.devices))
    elif device in ("auto", "cuda") and gpus > 1 and execution.devices == 1:
        room = [f"cuda:{i}" for i in range(gpus)] * execution.jobs_per_device
    else:
        room = [device] * execution.jobs_per_device
    jobs = len(room) if execution.jobs == "auto" else int(execution.jobs)
    return list(itertools.islice(itertools.cycle(room), jobs))


@dataclass(frozen=True)
class End:
    """How a run of a sweep ended."""

    status: str
    error: str = ""
    reused: bool = False


class _Launcher(Protocol):
    """What computes the missing runs; `size` is how many at once."""

    size: int

    def compute(self, specs: list[RunSpec]) -> dict[str, End]: ...


def _result(
    store: Path, specs: list[RunSpec], todo: Plan, ends: dict[str, End], reused: int
) -> SweepResult:
    runs = {run_id: _load(store / spec.name) for run_id, spec in todo.specs.items()}
    missing = {spec.run_id for spec in todo.missing}
    statuses: Counter[str] = Counter()
    for run_id, run in runs.items():
        if run_id in ends:
            statuses[ends[run_id].status] += 1
        else:
            statuses["left" if run_id in missing else run.status if run else "failed"] += 1
    failures = [
        (todo.specs[run_id], end.error or "interrupted: its worker was told to stop")
        for run_id, end in ends.items()
        if end.status in ("failed", "interrupted")
    ]
    counts = {status: statuses[status] for status in (*STATUSES, "left") if statuses[status]}
    reused += sum(end.reused for end in ends.values())
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

    def __init__(self, device: str) -> None:
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
        self.device = device
        self.job: RunSpec | None = None
        self.begun = 0.0
        self.claimed = self.overdue = False
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
        self.job, self.begun, self.claimed = job, time.monotonic(), False
        self.last_lines.clear()
        settings = {**settings, "device": self.device}
        line = json.dumps({"spec": job.to_job(), "settings": settings}) + "\n"
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
        """End it, if need be, and whatever processes it has started: they would hold its locks."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Pool:
    """The workers of one sweep.

    Attributes:
        size: how many work side by side.
        ends: run_id -> how it ended, of each job that has.
    """

    def __init__(self, execution: Execution, say: Say, most: int) -> None:
        threads = 1 if execution.threads == "auto" else int(execution.threads)
        self._free = deque(_places(execution, threads)[:most])
        self.size = len(self._free)
        self.ends: dict[str, End] = {}
        self._execution = execution
        self._store = Path(execution.runs_dir)
        self._settings = {
            "runs_dir": execution.runs_dir,
            "threads": threads,
            "devices": execution.devices,
            "nodes": execution.nodes,
            "launcher": execution.launcher,
            "logger": execution.logger,
        }
        self._say = say
        self._waiting: deque[RunSpec] = deque()
        self._elsewhere: list[RunSpec] = []
        self._began, self._looked = time.time(), 0.0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def compute(self, specs: list[RunSpec]) -> dict[str, End]:
        """Compute them all. On any exception, first end the workers in good order."""
        self._waiting.extend(specs)
        try:
            for _ in range(self.size):
                self._hire()
            while self._workers or self._elsewhere:
                self._turn()
        except BaseException:
            self._stop()
            raise
        finally:
            self._selector.close()
        return self.ends

    def _hire(self) -> None:
        worker = _Worker(self._free.popleft())
        self._workers.append(worker)
        for stream in worker.heard:
            self._selector.register(stream, selectors.EVENT_READ, worker)
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        """Give it something to do; let it wait where only other processes are at work."""
        worker.job = None
        if worker.process.returncode is not None or worker.deadline is not None:
            return
        while self._waiting:
            job = self._waiting.popleft()
            run = _load(self._store / job.name)
            if run is not None and self._failed_meanwhile(run) and _would_again(run):
                self._conclude(job, run)
                continue
            self._say({"event": "start", "run": job.name})
            worker.begin(job, self._settings)
            return
        if not self._elsewhere and worker.deadline is None:
            worker.dismiss()

    def _stop(self) -> None:
        """Interrupt the runs at work and wait for them; a second KeyboardInterrupt kills."""
        try:
            self._give_up()
            while self._workers:
                self._turn()
        except BaseException:
            for worker in self._workers:
                worker.kill()
            while self._workers:
                self._turn()
            raise

    def _give_up(self) -> None:
        """Begin nothing more, and interrupt what is at work."""
        self._stopping = True
        self._waiting.clear()
        self._elsewhere.clear()
        self._say({"event": "stopping"})
        for worker in self._workers:
            worker.dismiss(interrupt=True)

    def _turn(self) -> None:
        """Hear what the workers say, and look after those that have ended or are overdue."""
        for key, _ in self._selector.select(_TURN):
            self._hear(key.data, key.fileobj)
        for worker in list(self._workers):
            if worker.process.poll() is not None:
                self._bury(worker)
            elif worker.deadline is not None:
                if time.monotonic() > worker.deadline:
                    worker.kill()
            elif self._hangs(worker):
                worker.overdue = True
                worker.dismiss(interrupt=True)
        if self._elsewhere and time.monotonic() - self._looked > _LOOK:
            self._look_elsewhere()

    def _hangs(self, worker: _Worker) -> bool:
        """Its time counts from when the run is its own: it may first watch another's lease."""
        limit = self._execution.timeout
        if limit is None or worker.job is None:
            return False
        patience = 0.0 if worker.claimed else LEASE
        return time.monotonic() - worker.begun > limit + patience

    def _look_elsewhere(self) -> None:
        """Take back what other processes are at work on no longer, done or not.

        Whether they are is the claim's to say: what run.json says may be of an attempt before.
        """
        for spec in list(self._elsewhere):
            path = self._store / spec.name
            if path.is_dir() and alive(path):
                continue
            self._elsewhere.remove(spec)
            done, run = find(self._store, spec), _load(path)
            if done is not None:
                self._conclude(spec, done)
            elif run is not None and self._failed_meanwhile(run):
                self._conclude(spec, run)
            else:
                self._waiting.append(spec)
            if self._stopping:  # the failure of this one ends the sweep
                return
        self._looked = time.monotonic()
        for worker in self._workers:
            if worker.job is None:
                self._next(worker)
        for _ in range(min(len(self._waiting), len(self._free))):
            self._hire()

    def _failed_meanwhile(self, run: Run) -> bool:
        """Whether another process has tried it since this sweep began."""
        ended = run.record.get("ended") or 0.0
        return run.status == "failed" and ended >= self._began

    def _conclude(self, spec: RunSpec, run: Run) -> None:
        """Another process has ended the run: so has this sweep."""
        error = str(run.record.get("error") or "")
        self._note(
            spec,
            {"status": run.status, "path": str(run.path), "metrics": run.metrics}
            | {"error": error or None, "reused": True},
        )

    def _note(self, spec: RunSpec, outcome: dict[str, Any]) -> None:
        status, error = outcome["status"], outcome["error"] or ""
        self.ends[spec.run_id] = End(status, error, outcome["reused"] and status in FINISHED)
        self._say({"event": "end", "run": spec.name} | encode(outcome))
        if status == "failed" and self._execution.fail_fast and not self._stopping:
            self._give_up()

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
            elif event["event"] == "elsewhere":
                self._put_aside(worker, event)
            else:
                if not worker.claimed:
                    worker.begun, worker.claimed = time.monotonic(), True
                self._say(event)

    def _leave(self, worker: _Worker, stream: Any) -> None:
        if stream in worker.heard:
            worker.heard.remove(stream)
            with contextlib.suppress(KeyError):  # Ctrl-C came before it was registered
                self._selector.unregister(stream)

    def _noise(self, worker: _Worker, line: str) -> None:
        worker.last_lines.append(line)
        name = None if worker.job is None else worker.job.name
        if not self._stopping:  # what comes then are traces of the interrupt
            self._say({"event": "output", "run": name, "line": line})

    def _put_aside(self, worker: _Worker, event: dict[str, Any]) -> None:
        if worker.job is not None and not self._stopping:
            self._elsewhere.append(worker.job)
            self._say(event)
        self._next(worker)

    def _end(self, worker: _Worker, event: dict[str, Any]) -> None:
        job, worker.job = worker.job, None
        if job is not None:
            if event["status"] == "interrupted" and worker.overdue:
                event |= {"status": "failed", "error": self._overdue()}
                self._mark(job, "failed", self._overdue(), "timeout")
            self._note(job, {name: event[name] for name in _OUTCOME})
        if event["status"] == "interrupted" and worker.deadline is None:
            worker.dismiss()  # it leaves, and another takes its place
        self._next(worker)

    def _overdue(self) -> str:
        return f"timeout: it took longer than {self._execution.timeout:g} s"

    def _mark(self, job: RunSpec, status: str, error: str, failure: str = "killed") -> None:
        with contextlib.suppress(StoreError):  # the others go on, and this sweep still reports it
            mark_dead(self._store / job.name, status, error, failure=failure)

    def _bury(self, worker: _Worker) -> None:
        if worker.process.returncode:
            worker.kill()  # its children alone are left
        for stream in (worker.stderr, worker.stdout):
            self._hear(worker, stream, all_of_it=True)
            self._leave(worker, stream)
        for stream in (worker.stdin, worker.stdout, worker.stderr):
            stream.close()
        self._workers.remove(worker)
        self._free.append(worker.device)
        if worker.job is not None:
            self._bury_job(worker, worker.job)
        if self._waiting:
            self._hire()

    def _bury_job(self, worker: _Worker, job: RunSpec) -> None:
        status, cause, failure = "failed", _cause(worker.process.returncode), "killed"
        if worker.overdue:
            cause, failure = self._overdue(), "timeout"
        elif self._stopping:
            status, cause = "interrupted", f"interrupted, {cause}"
        self._mark(job, status, cause, failure)
        self._note(
            job,
            {"status": status, "path": str(self._store / job.name), "metrics": {}}
            | {"error": "\n".join([*worker.last_lines, cause]), "reused": False},
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
