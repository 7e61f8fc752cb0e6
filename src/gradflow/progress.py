"""Draws what runs say while they are computed: one live line a run, and one for them all.

On a terminal the lines move in place; elsewhere they are plain, a few a minute and run.
"""

from __future__ import annotations

import heapq
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradflow.store import decode

Say = Callable[[dict[str, Any]], None]

_PLAIN_SECONDS = 10.0  # between plain lines of one run
_REFRESH_SECONDS = 0.1
_ENOUGH_SECONDS = 2.0  # of computing, before the time left is told
_BAR = 10
_STYLES = {"done": "green", "diverged": "yellow", "interrupted": "yellow", "failed": "red"}


@dataclass
class Job:
    """A run as far as it has been heard of. Times are in seconds of the display's clock."""

    name: str
    label: str
    cost: float = 1.0
    status: str = "waiting"
    step: int = 0
    steps: int = 0
    begun: float | None = None
    ended: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    ratio: float | None = None
    first: tuple[float, float] | None = None  # time and fraction when its first step was heard of
    told: float = -math.inf

    @property
    def fraction(self) -> float:
        """The share of its steps that is computed, 0 to 1."""
        if self.status == "done":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    def seconds(self, now: float) -> float:
        """Since it began; 0 before."""
        if self.begun is None:
            return 0.0
        return (now if self.ended is None else self.ended) - self.begun

    def observed(self, now: float) -> tuple[float, float]:
        """Seconds watched and the fraction computed in them, without the start where possible."""
        if self.first is None:
            return self.seconds(now), self.fraction
        began, fraction = self.first
        return (now if self.ended is None else self.ended) - began, self.fraction - fraction


def time_left(jobs: Iterable[Job], workers: int, now: float) -> float | None:
    """Seconds until all jobs have ended; None before there is anything to tell it from.

    Seconds per cost are taken over all that is computed so far, of a running job over what
    that job itself has computed. What waits is dealt out, in its order, to whichever worker is free
    first.
    """
    jobs = list(jobs)
    paces = {}
    total, computed = 0.0, 0.0
    for job in jobs:
        seconds, fraction = job.observed(now)
        if fraction > 0:
            paces[job.name] = seconds / fraction
            total, computed = total + seconds, computed + job.cost * fraction
    if total < _ENOUGH_SECONDS:
        return None
    ends = []
    for job in jobs:
        if job.status in ("starting", "running"):
            whole = paces.get(job.name, job.cost * total / computed)
            ends.append(whole * (1 - job.fraction))
    ends += [0.0] * (workers - len(ends))
    heapq.heapify(ends)
    for job in jobs:
        if job.status == "waiting":
            heapq.heapreplace(ends, ends[0] + job.cost * total / computed)
    return max(ends)


class Display:
    """Draws the events of `run` and of `sweep` on stderr; a context manager around either.

        with Display() as display:
            sweep(specs, display=display)

    Args:
        console: where to draw.
        clock: seconds, from anywhere.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._sweep = False
        self._workers = 1
        self._drawn = -math.inf
        self._live: Live | None = None
        self._moving = self._console.is_terminal and not self._console.is_dumb_terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Take note of an event and draw it. Events of a kind it does not know change nothing."""
        said = decode(event)
        note = getattr(self, f"_on_{said['event']}", None)
        if note is not None:
            note(said)
            self._draw(at_once=said["event"] != "step")

    # --- what the events mean -------------------------------------------------------------------

    def _on_sweep(self, event: dict[str, Any]) -> None:
        names = [member["run"] for member in event["runs"]]
        self._jobs = {
            member["run"]: Job(member["run"], label, member["cost"])
            for member, label in zip(event["runs"], labels(names), strict=True)
        }
        self._sweep, self._workers = True, event["workers"]
        if reused := event["reused"]:
            total = _runs(len(names) + reused)
            self._print(f"{reused} of {total} in the store already, not run again.")
        if names and not self._moving:
            self._print(f"{_runs(len(names))} to compute, {self._workers} side by side.")

    def _on_start(self, event: dict[str, Any]) -> None:
        self._job(event).status = "starting"

    def _on_elsewhere(self, event: dict[str, Any]) -> None:
        job = self._job(event)
        job.status = "waiting"
        self._print(f"{job.label}: another process is at work on it; waiting for it")

    def _on_begin(self, event: dict[str, Any]) -> None:
        job = self._job(event)
        job.status, job.steps, job.begun = "running", event["steps"], self._clock()
        job.told = self._clock()
        if not self._moving and not self._sweep:
            steps = f"{job.steps} step{'s' * (job.steps != 1)}"
            start = event.get("start", 0)
            goes_on = f"goes on from step {start} of {steps}"
            self._print(f"{job.label}: {goes_on if start else f'begins, {steps}'}")

    def _on_step(self, event: dict[str, Any]) -> None:
        job = self._job(event)
        job.step, job.loss = event["step"], event["loss"]
        job.accuracy, job.ratio = event["accuracy"], event["ratio"]
        job.first = job.first or (self._clock(), job.fraction)
        if not self._moving and self._clock() - job.told >= _PLAIN_SECONDS:
            job.told = self._clock()
            left = "" if self._sweep else self._left()
            self._print(f"{job.label}: {_progress(job)}, {_numbers(job)}{left}")

    def _on_output(self, event: dict[str, Any]) -> None:
        label = self._jobs[event["run"]].label if event["run"] in self._jobs else "worker"
        self._print(f"{label} | {event['line']}")

    def _on_stopping(self, event: dict[str, Any]) -> None:
        busy = sum(job.status in ("starting", "running") for job in self._jobs.values())
        if busy:
            self._print(f"Stopping: {_runs(busy)} at work, ending as interrupted …")

    def _on_end(self, event: dict[str, Any]) -> None:
        job = self._job(event)
        job.status, job.ended = event["status"], self._clock()
        if self._sweep:
            seconds = None if job.begun is None else job.seconds(job.ended)
            line = outcome(job.status, seconds, event["metrics"], event["error"])
            totals = "" if self._moving else f" [{self._totals()}]"
            self._print(f"{job.label}: {line}{totals}", _STYLES.get(job.status))

    def _job(self, event: dict[str, Any]) -> Job:
        """The event's run; one that no sweep has named is a run by itself."""
        name = event["run"]
        if name not in self._jobs:
            self._jobs[name] = Job(name, labels([name])[0])
        return self._jobs[name]

    # --- drawing --------------------------------------------------------------------------------

    def _print(self, line: str, style: str | None = None) -> None:
        # A line that is cut to the terminal's width would lose its numbers, so it may wrap.
        self._console.print(Text(line, style=style or ""), soft_wrap=not self._moving)

    def _draw(self, *, at_once: bool) -> None:
        now = self._clock()
        if not self._moving or (not at_once and now - self._drawn < _REFRESH_SECONDS):
            return
        self._drawn = now
        if self._live is None:
            # Where stdout is no terminal it belongs to results, not to the display.
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        self._live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """The live lines as they are now."""
        running = [job for job in self._jobs.values() if job.status in ("starting", "running")]
        shown = running[: max(1, self._console.height - 4)]  # what is taller cannot be redrawn
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("run")  # alone gives way where the terminal is narrow
        table.add_column("", no_wrap=True, width=_BAR)
        table.add_column("", justify="right", no_wrap=True, width=4)
        for title in ("loss", "accuracy", "grad first/last"):
            table.add_column(title, justify="right", no_wrap=True)
        for job in shown:
            bar = ProgressBar(total=1.0, completed=job.fraction, width=_BAR)
            starts = job.status == "starting"
            done = (Text("starting"), "") if starts else (bar, f"{100 * job.fraction:.0f}%")
            row = (loss(job.loss), percent(job.accuracy), _ratio(job.ratio))
            table.add_row(Text(job.label, no_wrap=True, overflow="ellipsis"), *done, *row)
        hidden = len(running) - len(shown)
        parts: list[Any] = [table] if shown else []
        parts += [Text(f"and {_runs(hidden)} more")] if hidden else []
        if self._sweep:
            return Group(*parts, Text(self._totals()))
        return Group(*parts, *(Text(_progress(job) + self._left()) for job in running))

    def _totals(self) -> str:
        return totals(job.status for job in self._jobs.values()) + self._left()

    def _left(self) -> str:
        if all(job.ended is not None for job in self._jobs.values()):
            return ""
        seconds = time_left(self._jobs.values(), self._workers, self._clock())
        return "" if seconds is None else f"; {duration(seconds)} left"


def guarded(display: Say | None) -> Say:
    """The same, but what goes wrong in drawing ends the drawing alone, with one line on stderr."""
    alive = display is not None

    def say(event: dict[str, Any]) -> None:
        nonlocal alive
        if alive and display is not None:
            try:
                display(event)
            except Exception as error:
                alive = False
                print(f"progress is no longer shown ({type(error).__name__}: {error})",
                      file=sys.stderr)  # fmt: skip

    return say


# --- words ----------------------------------------------------------------------------------------


def labels(names: list[str]) -> list[str]:
    """Short names of runs: `cifar-152-none s0`, and the head of the id where two were alike."""
    parts = [name.rsplit("-", 2) for name in names]
    short = [f"{head} {seed}" for head, seed, _ in parts]
    twice = Counter(short)
    return [
        f"{label} {run_id[:4]}" if twice[label] > 1 else label
        for label, (_, _, run_id) in zip(short, parts, strict=True)
    ]


def outcome(
    status: str, seconds: float | None, metrics: dict[str, float], error: str | None = None
) -> str:
    """How a run ended, in a line: `done in 1 min 20 s, train accuracy 99.8%, …`."""
    words = status
    if seconds is not None:
        words += f" {'in' if status == 'done' else 'after'} {duration(seconds)}"
    for name, said in {"train_accuracy": "train accuracy", "test_accuracy": "test"}.items():
        if name in metrics:
            words += f", {said} {percent(metrics[name])}"
    return f"{words}: {error.splitlines()[-1]}" if error else words


def duration(seconds: float) -> str:
    """`1 s` or less, `45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def totals(statuses: Iterable[str]) -> str:
    """How many runs are how far: `12 runs: 5 done, 2 running, 0 failed, 1 diverged, 4 left`."""
    counts = Counter(statuses)
    running = counts["running"] + counts["starting"]
    shown = {"done": counts["done"], "running": running, "failed": counts["failed"]}
    shown |= {"diverged": counts["diverged"]}
    shown |= {"interrupted": counts["interrupted"]} if counts["interrupted"] else {}
    shown |= {"left": counts["waiting"]}
    line = ", ".join(f"{count} {status}" for status, count in shown.items())
    return f"{_runs(counts.total())}: {line}"


def _progress(job: Job) -> str:
    return f"step {job.step} of {job.steps}"


def _numbers(job: Job) -> str:
    numbers = f"loss {loss(job.loss)}, accuracy {percent(job.accuracy)}"
    return numbers + ("" if job.ratio is None else f", grad first/last {_ratio(job.ratio)}")


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def loss(value: float | None) -> str:
    """`0.123`, `1.23e-05`; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"


def percent(value: float | None) -> str:
    """`99.8%`; `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if 0.01 <= value < 1000 else f"{value:.1e}"
