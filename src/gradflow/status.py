"""How sweeps stand, for a shell that did not start them; it heads `gradflow.report RUNS --text`.

A sweep names its runs in the store while it is under way, see `sweep`; how far each is stands in
the run's own record.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradflow.errors import StoreError
from gradflow.progress import Job, duration, loss, percent, time_left, totals
from gradflow.store import FINISHED, SWEEPS, Run, Runs


@dataclass(frozen=True)
class Sweep:
    """A sweep that is under way, or whose process was killed.

    Attributes:
        name: its id.
        started: unix seconds.
        alive: whether its process is there; a guess where it is another machine's.
        workers: how many runs it computes side by side.
        members: its runs: `run`, `cost`, `steps`, and whether it found them `missing`.
    """

    name: str
    started: float
    alive: bool
    workers: int
    members: list[dict[str, Any]]


def sweeps(stores: Iterable[str | Path]) -> Iterator[Sweep]:
    """The sweeps that the stores name; what cannot be read is passed over."""
    for path in (path for store in stores for path in sorted(Path(store).glob(f"{SWEEPS}/*.json"))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(path.read_text())
            alive = about["host"] != socket.gethostname() or _is_alive(path)
            yield Sweep(path.stem, about["started"], alive, about["workers"], about["runs"])


def _is_alive(path: Path) -> bool:
    with path.open() as file, contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two that look do not see each other
        except BlockingIOError:
            return True
    return False


def text(runs: Runs, stores: Iterable[str | Path]) -> str:
    """A block of lines for each sweep, and one for runs begun outside of any; may be empty."""
    there = {run.path.name: run for run in runs}
    found = list(sweeps(stores))
    told = [sweep for sweep in found if sweep.alive or _is_open(sweep, there)]
    blocks = [_sweep_text(sweep, there) for sweep in told]
    named = {member["run"] for sweep in found for member in sweep.members}
    others = [run for run in runs if run.path.name not in named and run.status == "running"]
    lines = [_run_line(run, None) for run in others]
    if lines:
        blocks.append("\n".join(["outside of these:" if found else "under way:", *lines]))
    return "\n\n".join(blocks)


def _is_open(sweep: Sweep, there: dict[str, Run]) -> bool:
    """Whether a sweep has left anything to do that no other one has done since."""
    runs = [there.get(member["run"]) for member in sweep.members]
    return any(run is None or run.status not in FINISHED for run in runs)


def _sweep_text(sweep: Sweep, there: dict[str, Run]) -> str:
    now, jobs, lines = time.time(), [], []
    for member in sweep.members:
        run = there.get(member["run"])
        job = _job(sweep, member, run, now)
        jobs.append(job)
        if run is not None and job.status == "running":
            lines.append(_run_line(run, job.steps))
        elif run is not None and job.status == "failed":
            lines.append(f"  {run.path.name}: failed: {_last_line(run)}")
    own = [job for job, member in zip(jobs, sweep.members, strict=True) if member["missing"]]
    left = time_left(own, sweep.workers, now) if sweep.alive else None
    head = f"sweep {sweep.name}: {totals(job.status for job in jobs)}"
    head += "" if left is None else f"; {duration(left)} left"
    head += "" if sweep.alive else "; not under way: the same command goes on"
    return "\n".join([head, *lines])


def _job(sweep: Sweep, member: dict[str, Any], run: Run | None, now: float) -> Job:
    """A run as the sweep's own display has it: what nobody is at work on is left to do."""
    job = Job(member["run"], member["run"], member["cost"], steps=member["steps"] or 0)
    if run is None:
        return job
    if run.status in FINISHED or (run.status == "failed" and _has_failed(sweep, member, run)):
        job.status, job.step = run.status, run.record.get("steps") or 0
        job.begun, job.ended = now - (run.record.get("seconds") or 0.0), now
    elif run.alive:
        job.status, job.step = "running", len(_steps(run) or ())
        job.begun, updates = _begun(run)
        job.first = (job.begun, updates / job.steps if job.steps else 0.0)
    return job


def _begun(run: Run) -> tuple[float, int]:
    """When the attempt that is under way began, and how many updates had been made by then."""
    first = {"started": run.record.get("started"), "updates": 0}
    last = [first, *run.record.get("resumed", [])][-1]
    return last.get("started") or time.time(), last.get("updates") or 0


def _has_failed(sweep: Sweep, member: dict[str, Any], run: Run) -> bool:
    """In this sweep, or before and not to be tried again."""
    return not member["missing"] or run.record.get("ended", 0.0) >= sweep.started


def _steps(run: Run) -> pa.Table | None:
    """What is recorded of its steps: up to a flush behind what is computed."""
    with contextlib.suppress(StoreError):
        return run.table("steps")
    return None


def _run_line(run: Run, steps: int | None) -> str:
    data = _steps(run)
    line = f"  {run.path.name}: step {len(data or ())}" + (f" of {steps}" if steps else "")
    if data is not None:
        last = {name: data[name][-1].as_py() for name in data.column_names}
        line += f", loss {loss(last.get('loss'))}, accuracy {percent(last.get('accuracy'))}"
    if not run.alive:
        return f"{line}; stopped: the same command goes on"
    return f"{line}, for {duration(time.time() - _begun(run)[0])}"


def _last_line(run: Run) -> str:
    return (str(run.record.get("error") or "").splitlines() or ["no error recorded"])[-1]
