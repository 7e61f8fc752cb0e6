"""How near recording is to what it must cost, and what a whole run costs beside its training.

`python -m benchmarks.limits [least] [buffers] [run] [start] [--steps N]`, by default all four:

- `least`: the time it takes to read all gradients once, which their norms need at least, and what
  gradflow adds to a step for them.
- `buffers`: what a recorder of a network of 152 layers holds.
- `run`: a training step of gradflow's own runs (Lightning, recorder, store, evaluations) over one
  of a bare loop on the same network and batches: in turn in one process, and each in a process of
  its own, where the bare loop has not what a run sets for its process.
- `start`: from the start of `python -m gradflow` to its first training step, over a process that
  does no more than import torch, Lightning and Hydra.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD

from benchmarks import recording
from benchmarks.recording import TASKS, machine, median_interval
from gradflow import Recorder, RunSpec, run
from gradflow.data import Split, load_data
from gradflow.networks import build
from gradflow.run import set_up_process
from gradflow.spec import RecordSpec

REPEATS = 7


def _median_seconds(call: Callable[[], Any], repeats: int = 200) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[repeats // 10 :])


# --- the least that recording can cost ------------------------------------------------------------


def read_seconds(size: int) -> float:
    """Seconds to read a buffer of that many bytes once; again and again, so in cache if it fits."""
    values = torch.ones(size // 4)
    return min(_median_seconds(values.sum), _median_seconds(lambda: torch.dot(values, values)))


def least(task: str, steps: int) -> str:
    """A line: what reading costs at least, what one call of torch's costs, and gradflow."""
    network = TASKS[task].network()
    tensors = [torch.rand_like(parameter) for parameter in network.parameters()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    reading = read_seconds(size)
    # In float32, without a total, a table or a number in Python.
    fused = _median_seconds(lambda: torch._foreach_norm(tensors))
    taken = recording.seconds(TASKS[task], ["none", "gradients"], steps)
    bare, recorded = taken["none"][:, :-1], taken["gradients"][:, :-1]
    step = float(np.median(bare))
    added, low, high = median_interval(np.median(recorded - bare, axis=1))
    return (
        f"{TASKS[task].title}: {size / 1e6:.2f} MB in {len(tensors)} tensors; step "
        f"{step * 1e3:.1f} ms; reading at {size / reading / 1e9:.0f} GB/s {reading / step:.2%}, "
        f"one call of _foreach_norm {fused / step:.2%}, gradflow's norms "
        f"{added / step:.2%} [{low / step:.2%}, {high / step:.2%}] of it: {added / reading:.0f}× "
        f"the reading, {added / fused:.1f}× the call"
    )


# --- what a recorder holds ------------------------------------------------------------------------


def held_bytes(value: Any) -> int:
    """Bytes of all tensors and arrays in an object: in its fields, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(held_bytes, value))
    return held_bytes(vars(value)) if type(value).__module__.startswith("gradflow") else 0


def buffers(quantities: str, task: str = "152") -> str:
    """A line: what the recorder's buffers hold, and what the network's parameters do."""
    network = TASKS[task].network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recorder = Recorder(network, quantities, optimizer=optimizer)
    held = {table: held_bytes(buffer) / 1e6 for table, buffer in recorder._buffers.items()}
    parameters = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e6
    parts = ", ".join(f"{table} {size:.2f}" for table, size in held.items())
    return (
        f"{TASKS[task].title}, quantities={quantities}: buffers {sum(held.values()):.2f} MB "
        f"({parts}); the parameters {parameters:.2f} MB"
    )


# --- a whole run ----------------------------------------------------------------------------------


def _bare_steps(spec: RunSpec) -> Iterator[float]:
    """Seconds of each step of a plain loop: the run's network, batch size, data and optimizer, this
    as PyTorch makes it unless told otherwise."""
    data = load_data(spec.data)
    assert isinstance(data.train, Split)
    images = data.train.images.to(memory_format=torch.channels_last)
    network = build(spec, in_channels=data.inputs(spec.network.name), num_classes=data.num_classes)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    momentum, decay = spec.momentum or 0.0, spec.weight_decay
    optimizer = SGD(network.parameters(), lr=spec.lr, momentum=momentum, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    while True:
        for indices in torch.randperm(len(images), generator=generator).split(spec.batch_size):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images[indices]), data.train.labels[indices])
            loss.backward()
            optimizer.step()
            yield time.perf_counter() - began


def run_steps(spec: RunSpec, between: Callable[[], object]) -> list[float]:
    """Seconds of each step of a run, from one's start to the next one's, less what `between` takes,
    which is called before each. What a run does at an epoch's end, evaluations and checkpoints, is
    in the step before."""
    from gradflow.training.module import Classifier

    original = Classifier.training_step
    taken: list[float] = []
    mark = 0.0

    def training_step(self: Classifier, *arguments: Any) -> Tensor:
        nonlocal mark
        taken.append(time.perf_counter() - mark)
        between()
        mark = time.perf_counter()
        return original(self, *arguments)

    Classifier.training_step = training_step  # type: ignore[assignment, method-assign]
    try:
        with tempfile.TemporaryDirectory() as store:
            run(spec, runs_dir=store, threads=1)
    finally:
        Classifier.training_step = original  # type: ignore[method-assign]
    return taken


def _spec(steps: int, record: str, depth: int) -> RunSpec:
    return RunSpec(depth=depth, record=RecordSpec(record), max_steps=steps + recording.WARM_UP)


def whole_run(steps: int, record: str = "default", depth: int = 56) -> str:
    """A line: the run's step over the bare one, in turn in this process."""
    spec = _spec(steps, record, depth)
    bare_step, bare_taken = _bare_steps(spec), list[float]()
    taken = run_steps(spec, lambda: bare_taken.append(next(bare_step)))
    whole, bare = (np.array(seconds[recording.WARM_UP :]) for seconds in (taken, bare_taken))
    median, low, high = median_interval(whole / bare)
    return (
        f"gradflow's run, depth {depth}, record={record}: a step over a bare one "
        f"({np.median(bare) * 1e3:.1f} ms): median {median:.3f} [{low:.3f}, {high:.3f}], "
        f"mean, with the evaluations, {whole.sum() / bare.sum():.3f}"
    )


def median_step(what: str, steps: int, record: str, depth: int) -> float:
    """Median seconds of a step of this process's `bare` loop or `run`."""
    spec = _spec(steps, record, depth)
    if what == "run":
        taken = run_steps(spec, lambda: None)
    else:
        taken = list(itertools.islice(_bare_steps(spec), spec.max_steps))
    return statistics.median(taken[recording.WARM_UP :])


_ALONE = """
import sys, torch
from benchmarks.limits import median_step
torch.set_num_threads(1)
print(median_step(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
"""


def alone(steps: int, record: str = "default", depth: int = 56) -> str:
    """A line: the run's step over the bare one, each in a process of its own, in turn."""
    given = [str(steps), record, str(depth)]

    def seconds(what: str) -> float:
        command = [sys.executable, "-c", _ALONE, what, *given]
        return float(subprocess.check_output(command, text=True))

    pairs = [(seconds("bare"), seconds("run")) for _ in range(REPEATS)]
    ratios = [whole / bare for bare, whole in pairs]
    told = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    return (
        f"the same, each in a process of its own: median {statistics.median(ratios):.3f} of {told}"
    )


# --- the start ------------------------------------------------------------------------------------

_IMPORTS = "import os, torch, pytorch_lightning, hydra; os._exit(0)"
_FIRST_STEP = """
import os, runpy, sys
from gradflow.training import module
module.Classifier.training_step = lambda self, *arguments: os._exit(0)
sys.argv = ["gradflow", "depth=20", "max_steps=1", "threads=1", "runs_dir=" + sys.argv[1]]
runpy.run_module("gradflow", run_name="__main__")
"""


def _process_seconds(code: str) -> float:
    """How long a Python process takes for `code`, up to its `os._exit`."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-c", code, store]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def start() -> str:
    """A line: seconds to the first step, and of the imports alone."""
    for code in (_IMPORTS, _FIRST_STEP):  # once for the files' cache
        _process_seconds(code)
    pairs = [(_process_seconds(_IMPORTS), _process_seconds(_FIRST_STEP)) for _ in range(REPEATS)]
    imports, first = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(step / alone for alone, step in pairs)
    return (
        f"python -m gradflow: first step after {first:.2f} s; importing torch, Lightning and Hydra "
        f"alone {imports:.2f} s; ratio {ratio:.2f}, median of {REPEATS} pairs"
    )


PARTS = ("least", "buffers", "run", "start")


def main(arguments: list[str] | None = None) -> None:
    """Print a line a measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=recording.STEPS)
    given = parser.parse_args(arguments)
    if set(given.parts) - set(PARTS):
        parser.error(f"PART: choose from {', '.join(PARTS)}")
    parts = given.parts or PARTS
    set_up_process(threads=1)
    print(machine())
    if "least" in parts:
        for task in TASKS:
            print(least(task, given.steps), flush=True)
    if "buffers" in parts:
        print(buffers("default"), buffers("all"), sep="\n", flush=True)
    if "run" in parts:
        for record in ("none", "default", "all"):
            print(whole_run(given.steps, record), alone(given.steps, record), sep="\n", flush=True)
    if "start" in parts:
        print(start(), flush=True)


if __name__ == "__main__":
    main()
