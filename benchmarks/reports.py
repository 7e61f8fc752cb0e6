"""What a report over a large store costs: the first, and the next after one more run.

`python -m benchmarks.reports [DIRECTORY]`. Two stores that `benchmarks.stores` writes: 200 runs of
152 layers over 1,000 steps, and 500 of 20 layers over 100. Each report is `python -m
gradflow.report` as a whole: starting Python, reading, drawing, writing. Memory is the peak of the
resident sizes of all its processes together, looked at twenty times a second. Beside it the least
that anyone must do who has pandas alone: read two tables of each run and take the mean of each
layer, run by run. With DIRECTORY, the stores are left there and used again.

Meant for a machine that does nothing else: the limits are 30 s, 5 s, 2 GB and 15 MB for the first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import stores

LOOKS = 0.05  # seconds between two looks at the processes
READ = """
import sys, pandas as pd
from pathlib import Path
for run in sorted(Path(sys.argv[1]).iterdir()):
    for name, value in (("weights", "weight_grad_norm"), ("outputs", "output_rms")):
        pd.read_parquet(run / f"{name}.parquet").groupby("layer", observed=True)[value].mean()
"""


@dataclass(frozen=True)
class Shape:
    """A store: so many runs of so many layers over so many steps."""

    runs: int
    layers: int
    steps: int

    @property
    def words(self) -> str:
        return f"{self.runs} runs × {self.layers} layers × {self.steps:,} steps"


SHAPES = (Shape(200, 152, 1000), Shape(500, 20, 100))


@dataclass(frozen=True)
class Cost:
    """Of one command: seconds, and the peak memory of all its processes in MB."""

    seconds: float
    memory: float


def measured(command: Sequence[str]) -> Cost:
    """Run a command to its end. Raises CalledProcessError where it fails."""
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(LOOKS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(seconds, peak / 2**20)


def _memory(root: int) -> int:
    """Bytes that a process and all that it has started hold: shared ones count once each."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _field(entry / "stat", after=")", place=1)
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    pages = sum(_field(Path(f"/proc/{process}/statm"), place=1) for process in found)
    return pages * os.sysconf("SC_PAGE_SIZE")


def _field(path: Path, *, place: int, after: str = "") -> int:
    """A number of a line of /proc; 0 of a process that has just ended."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    return int((text.rpartition(after)[2] if after else text).split()[place])


def compare(shape: Shape, directory: Path) -> list[tuple[str, Cost, str]]:
    """A row a command: its name, its cost, what it left."""
    wanted = stores.specs(shape.runs + 1, shape.layers, shape.steps)
    store = directory / f"{shape.runs}-{shape.layers}-{shape.steps}"
    new, out = store / wanted[-1].name, directory / "report"
    stores.fill(store, wanted[:-1])
    for path in (new, out):
        shutil.rmtree(path, ignore_errors=True)
    time.sleep(3)  # a run is kept once its last change is a while ago
    report = [sys.executable, "-m", "gradflow.report", str(store), "--out", str(out)]
    rows = [("pandas, run by run", measured([sys.executable, "-c", READ, str(store)]), "")]
    rows.append(("first report", measured(report), _left(out)))
    stores.write(store, wanted[-1])
    rows.append(("second, one new run", measured(report), _left(out)))
    rows.append(("third, nothing new", measured(report), _left(out)))
    for path in (new, out):
        shutil.rmtree(path)
    return rows


def _left(out: Path) -> str:
    def size(path: Path) -> str:
        files = [path] if path.is_file() else list(path.rglob("*"))
        return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"

    return f"page {size(out / 'index.html')}, tables {size(out / 'tables')}"


def main(directory: Path, shapes: Sequence[Shape] = SHAPES) -> None:
    """Print a table for each store."""
    for shape in shapes:
        print(f"{shape.words}\n\n|  | seconds | peak MB |  |\n| --- | --- | --- | --- |")
        for name, cost, left in compare(shape, directory):
            print(f"| {name} | {cost.seconds:.1f} | {cost.memory:.0f} | {left} |", flush=True)
        print()


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
