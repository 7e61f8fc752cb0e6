"""What running side by side gains: two one-thread workers against one run after another in two.

`python -m benchmarks.packing [ROUNDS]`. Twelve runs through `gradflow.sweep`, with jobs=2 threads=1
and with jobs=1 threads=2, in turn, each time into a new store; the ratio of the whole sweeps'
times, worker start and imports included. For a machine of two cores that does nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

from gradflow import RunSpec, sweep

SPECS = [
    RunSpec(depth=depth, skip=skip, seed=seed, max_steps=steps)
    for depth, steps in ((20, 150), (56, 60))
    for skip in ("identity", "none")
    for seed in (0, 1, 2)
]
PACKED, SERIAL = {"jobs": 2, "threads": 1}, {"jobs": 1, "threads": 2}


def seconds(settings: dict[str, Any]) -> float:
    """How long the sweep takes."""
    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        result = sweep(SPECS, runs_dir=store, **settings)
        taken = time.perf_counter() - began
    assert result.counts == {"done": len(SPECS)}, result.summary()
    return taken


def main(rounds: int) -> None:
    ratios = []
    for number in range(rounds):
        order = [PACKED, SERIAL] if number % 2 == 0 else [SERIAL, PACKED]
        taken = {settings["jobs"]: seconds(settings) for settings in order}
        ratios.append(taken[2] / taken[1])
        print(
            f"side by side {taken[2]:.1f} s, one after another {taken[1]:.1f} s: "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f} over {rounds} rounds")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
