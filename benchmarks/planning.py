"""What a large store costs: planning a sweep of 10,000 runs, and telling how 1,000 stand.

`python -m benchmarks.planning [DIRECTORY]`. Half of the 10,000 are in the store: one run of two
updates of a network of 152 layers is computed, and the others are written from it, each with files
of its own. Every measurement is a process of its own, and memory is its peak. With DIRECTORY, the
stores are left there and used again.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

from gradflow import RunSpec, load_runs, schema, sweep
from gradflow.store import Run, RunWriter
from gradflow.sweep import plan

SPECS, STORED, LISTED = 10_000, 5_000, 1_000
REPEATS = 5


def specs(count: int) -> list[RunSpec]:
    """Different runs: plain and residual networks, seed by seed, at five learning rates."""
    keys = product(range(count), (0.01, 0.02, 0.05, 0.1, 0.2), ("none", "identity"))
    return [
        RunSpec(depth=152, skip=skip, lr=lr, seed=seed, max_steps=2)
        for seed, lr, skip in islice(keys, count)
    ]


def fill(store: Path, count: int) -> Path:
    """A store of finished runs, the first of `specs`; what is there already stays."""
    wanted = specs(count)
    result = sweep(
        wanted[:1], runs_dir=str(store), jobs=1
    )  # in a process of its own: no torch here
    model = result.runs[0]
    assert model is not None, result.summary()
    tables = {name: model.table(name) for name in schema.KEYS}
    for spec in wanted:
        if not (store / spec.name).exists():
            _copy(model, tables, store, spec)
    return store


def _copy(
    model: Run, tables: dict[str, schema.pa.Table | None], store: Path, spec: RunSpec
) -> None:
    fields = {"steps", "metrics", "certificate", "environment", "recorder_share", "divergence"}
    with RunWriter(store / spec.name, spec.to_dict()) as writer:
        for name, table in tables.items():
            if table is not None:
                writer.write(name, table)
        writer.finish("done", **{name: model.record[name] for name in fields})


def measure(what: str, store: Path) -> None:
    """One measurement, in this process: prints seconds, peak memory in MB, and what was found."""
    wanted = specs(SPECS) if what == "plan" else []
    began = time.perf_counter()
    if what == "plan":
        missing = len(plan(store, wanted).missing)
        assert missing == SPECS - STORED
        found = f"{missing:,} of {SPECS:,} runs are missing"
    else:
        found = f"{len(load_runs(store)):,} runs"
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.2f} s, {peak:.0f} MB: {found}")


def main(directory: Path) -> None:
    """Print a line a measurement; of the text also how long the whole process took."""
    large, small = fill(directory / "large", STORED), fill(directory / "small", LISTED)
    for what, store in (("plan", large), ("load_runs", small)):
        command = [sys.executable, "-m", "benchmarks.planning", f"--{what}", str(store)]
        for _ in range(REPEATS):
            print(f"{what}: {subprocess.check_output(command, text=True).strip()}")
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        command = [sys.executable, "-m", "gradflow.report", str(small), "--text"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    shown = ", ".join(f"{value:.2f}" for value in seconds)
    print(f"report --text: {shown} s; median {statistics.median(seconds):.2f} s, whole process")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--"):
        measure(sys.argv[1].removeprefix("--"), Path(sys.argv[2]))
    elif sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
