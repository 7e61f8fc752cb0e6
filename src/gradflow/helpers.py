"""Other processes that share this one's work: `python -m gradflow.helpers [MODULE …]` is one.

A task is a function of a module and what it is given, pickled, on the helper's stdin; what comes of
it is pickled on its stdout. The helper imports MODULES while it waits. A process of its own, and no
fork: threads and their locks stay here; and no `multiprocessing`, which would run the caller's main
module again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

MOST = 4
"""Processes that share the work, at most: more are no faster, and take memory."""
WORTH = 24
"""Tasks that are worth the second that a helper takes to start."""


class Helpers:
    """Up to `count` processes, this one included; a context manager that ends the others.

    Args:
        count: by default one for each core that this process may use.
        modules: what a helper imports before it is asked.
    """

    def __init__(self, count: int | None = None, modules: Sequence[str] = ()):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.count = min(cores or 1, MOST) if count is None else count
        self._modules = list(modules)
        self._children: list[subprocess.Popen[bytes]] = []
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self._children:
            child.kill()  # it has nothing that anyone waits for
        for child in self._children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._children = []

    def start(self) -> None:
        """Start the helpers, unless that is done: work for them is about to come."""
        if not self._started:
            self._started = True
            # Found where this process has found it, and not in the working directory.
            places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
            command = [sys.executable, "-P", "-m", "gradflow.helpers", *self._modules]
            for _ in range(self.count - 1):
                with contextlib.suppress(OSError):  # no more processes: this one does it all
                    self._children.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL,
                        )
                    )

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`[function(item) for item in items]`, where the function is one of a module's.

        What a helper dies of, this process does itself. An exception is raised here, once all
        tasks have ended.
        """
        tasks = list(items)
        if len(tasks) >= WORTH:
            self.start()
        work = self.work(function)
        for task in tasks:
            work.add(task)
        return work.results()

    def work(self, function: Callable[[Any], Any]) -> Work:
        """A list of tasks that is yet to be written: the helpers that run begin with the first."""
        return Work(function, [child for child in self._children if child.poll() is None])


class Work:
    """Tasks that helpers do as they come, and this process once there are no more to come."""

    def __init__(self, function: Callable[[Any], Any], children: Sequence[subprocess.Popen[bytes]]):
        self._function = function
        self._tasks: list[Any] = []
        self._found: dict[int, Any] = {}
        self._errors: list[BaseException] = []
        self._waiting: SimpleQueue[int | None] = SimpleQueue()
        self._drivers = [
            threading.Thread(target=self._drive, args=(child,), daemon=True) for child in children
        ]

    def add(self, task: Any) -> None:
        if not self._tasks:
            for driver in self._drivers:
                driver.start()
        self._tasks.append(task)
        self._waiting.put(len(self._tasks) - 1)

    def results(self) -> list[Any]:
        """What came of the tasks, in their order; raises what a helper's task has raised."""
        if not self._tasks:
            return []
        self._do()
        for _ in self._drivers:
            self._waiting.put(None)
        for driver in self._drivers:
            driver.join()
        self._do()  # what a helper that died has left
        for error in self._errors:
            raise error
        return [self._found[place] for place in range(len(self._tasks))]

    def _do(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                place = self._waiting.get_nowait()
                if place is not None:
                    self._found[place] = self._function(self._tasks[place])

    def _drive(self, child: subprocess.Popen[bytes]) -> None:
        """Have a helper do what waits, until nothing more comes or it has died."""
        while (place := self._waiting.get()) is not None:
            try:
                _say(child.stdin, (self._function, self._tasks[place]))
                error, result = pickle.load(child.stdout)  # type: ignore[arg-type]
            except Exception:  # it is gone, or has said half of it
                self._waiting.put(place)
                child.kill()
                return
            self._found[place] = result
            if error is not None:
                self._errors.append(error)


def _say(pipe: Any, value: Any) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def main(modules: Sequence[str]) -> int:
    """Do the tasks on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    tasks, said = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else writes to stdout
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # what was imported stays: no more is it looked through for what may go
    while True:
        try:
            function, task = pickle.load(tasks)
        except EOFError:
            return 0
        done: tuple[Exception | None, Any]
        try:
            done = (None, function(task))
        except Exception as error:
            done = (error, None)
        try:
            _say(said, done)
        except BrokenPipeError:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
