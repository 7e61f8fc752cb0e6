"""A store as gradflow writes it, without training: for measuring what comes after.

`python -m benchmarks.stores DIR [--runs 200] [--layers 152] [--steps 1000]`. CIFAR-style networks
of that many weight layers, plain and residual, at ten learning rates, seed by seed: every run has
a partner. Each weight layer and each normalisation layer behind one has four numbers a step
(`weight_grad_norm`, `weight_norm`, `output_rms`, `output_grad_norm`), all of which are in the
files. The numbers are made up: profiles that are geometric with depth (plain) or a power of it
(residual), as batch normalisation gives them, with noise; accuracies that rise.

Runs that are there already stay. Two processes, some .2 s a run of 152 layers and 1,000 steps.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gradflow import RunSpec, schema
from gradflow.store import RunWriter

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES = 22
"""Updates an epoch, each of which ends with an evaluation."""
NOISE = 0.2
"""Of a norm from layer to layer and from step to step: natural log, root mean square."""

# --- which runs -----------------------------------------------------------------------------------


def specs(runs: int, layers: int, steps: int) -> list[RunSpec]:
    """The first so many of: seed by seed, at each rate, a plain and a residual network."""
    keys = product(range(runs), RATES, ("none", "identity"))
    return [
        RunSpec(depth=layers, skip=skip, lr=lr, seed=seed, max_steps=steps)
        for seed, lr, skip in islice(keys, runs)
    ]


def fill(store: Path, wanted: Sequence[RunSpec]) -> Path:
    """Writes those of the runs that are missing, in two processes."""
    missing = [spec for spec in wanted if not (store / spec.name).exists()]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(partial(write, store), missing))
    return store


# --- one run --------------------------------------------------------------------------------------


def write(store: Path, spec: RunSpec) -> Path:
    """One finished run, with every table that a training run has."""
    assert spec.depth is not None
    steps = int(spec.max_steps or 0)
    rng = np.random.default_rng([spec.seed, RATES.index(spec.lr), spec.skip == "none"])
    modules = _modules(spec.depth)
    with RunWriter(store / spec.name, spec.to_dict()) as writer:
        writer.write("modules", schema.table("modules", modules))
        measured = [name for name, kind in zip(modules["layer"], modules["kind"], strict=True)
                    if kind != "block"]  # fmt: skip
        blocks = [name for name in modules["layer"] if name not in set(measured)]
        for table, columns in _numbers(rng, spec, steps, len(measured)).items():
            writer.append(table, _layered(table, range(steps), measured, columns))
        tenth = range(0, steps, 10)
        writer.append("blocks", _layered("blocks", tenth, blocks, _joins(rng, spec, len(blocks))))
        metrics = _curves(rng, spec, steps, writer)
        writer.finish("done", steps=steps, metrics=metrics, recorder_seconds=0.02 * steps,
                      recorder_share=0.05, divergence=None, environment=_ENVIRONMENT,
                      certificate=_certificate(spec, measured, modules))  # fmt: skip
    return writer.path


_ENVIRONMENT = {
    "python": "3.11.7", "platform": "made up", "versions": {"torch": "2.13.0"}, "device": "cpu",
    "threads": 1, "devices": 1, "nodes": 1, "git": None,
}  # fmt: skip


def _modules(depth: int) -> dict[str, list[Any]]:
    """The columns of modules.parquet of a CIFAR-style network."""
    rows: list[tuple[str, str, int, str, int]] = []
    before = 16
    rows += [("conv1", "conv", 1, "16x1x3x3", 144), ("bn1", "norm", 1, "16", 32)]
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            for index in (1, 2):
                shape, count = f"{width}x{before}x3x3", 9 * width * before
                rows.append((f"{name}.conv{index}", "conv", stage, shape, count))
                rows.append((f"{name}.bn{index}", "norm", stage, str(width), 2 * width))
                before = width
            rows.append((f"{name}.skip", "block", stage, "", 0))
    rows.append(("fc", "linear", 4, "10x64", 650))
    names = ("layer", "kind", "stage", "shape", "parameters")
    columns: dict[str, list[Any]] = dict(
        zip(names, map(list, zip(*rows, strict=True)), strict=True)
    )
    return columns | {"position": list(range(len(rows))), "calls": [1] * len(rows)}


Numbers = dict[str, NDArray[np.float32]]


def _layered(table: str, steps: range, layers: list[str], columns: Numbers) -> pa.Table:
    """A table of layers: each column an array (steps, layers)."""
    count = len(layers)
    index = pa.array(np.tile(np.arange(count, dtype=np.int32), len(steps)))
    names = pa.DictionaryArray.from_arrays(index, pa.array(layers))
    step = np.repeat(np.asarray(steps, dtype=np.int32), count)
    values = {name: array[: len(steps)].reshape(-1) for name, array in columns.items()}
    return schema.table(table, {"step": step, "layer": names, **values})


def _numbers(rng: np.random.Generator, spec: RunSpec, steps: int, count: int) -> dict[str, Numbers]:
    place = np.arange(count, dtype=np.float32) / 2
    after = np.arange(steps, dtype=np.float32)[:, None]
    if spec.skip == "none":  # explodes toward the input at first, and relaxes within some steps
        slope = 0.05 * np.exp(-after / 50) + 0.005
        shape = slope * (place[-1] - place)
    else:
        shape = -0.5 * np.log1p(place)
    gradient = shape - 0.5 * np.log1p(after * spec.lr)

    def noisy(logarithm: Any, noise: float = NOISE) -> NDArray[np.float32]:
        drawn = rng.standard_normal((steps, count), dtype=np.float32)
        return np.exp(logarithm + noise * drawn)

    grown = np.log(5 + 0 * place) + 0.05 * np.log1p(after)
    return {
        "weights": {
            "weight_grad_norm": noisy(gradient), "weight_norm": noisy(grown, 0.001),
        },
        "outputs": {
            "output_rms": noisy(0 * grown, 0.05), "output_grad_norm": noisy(gradient - 1),
        },
    }  # fmt: skip


def _joins(rng: np.random.Generator, spec: RunSpec, count: int) -> Numbers:
    def noisy(level: Any) -> NDArray[np.float32]:
        drawn = rng.standard_normal((math.ceil((spec.max_steps or 0) / 10), count))
        return (level * np.exp(NOISE * drawn)).astype(np.float32)

    skip = np.sqrt(np.arange(count) + 1) if spec.skip != "none" else np.zeros(count)
    return {"branch_rms": noisy(1.0), "skip_rms": noisy(skip),
            "branch_grad_norm": noisy(0.1), "skip_grad_norm": noisy(0.2 * (skip > 0))}  # fmt: skip


def _curves(
    rng: np.random.Generator, spec: RunSpec, steps: int, writer: RunWriter
) -> dict[str, float]:
    """Writes steps and evaluations; the final metrics. Plain networks learn less."""
    after = np.arange(steps)
    reach = (0.6 if spec.skip == "none" else 0.95) - 0.1 * abs(math.log10(spec.lr / 0.05))

    def accuracy(step: Any) -> Any:
        return np.clip(reach * (1 - np.exp(-step / 200)) + 0.01 * rng.standard_normal(), 0.1, 1)

    loss = 2.3 * (1 - accuracy(after)) * np.exp(0.1 * rng.standard_normal(steps))
    writer.append("steps", schema.table("steps", {
        "step": after, "loss": loss, "lr": np.full(steps, spec.lr), "accuracy": accuracy(after),
        "grad_norm": np.exp(NOISE * rng.standard_normal(steps))}))  # fmt: skip
    rows = []
    for step in [*range(BATCHES, steps, BATCHES), steps]:
        for split, less in (("train_batches", 0.0), ("test", 0.03)):
            reached = float(accuracy(step)) - less
            rows.append((step, split, 2.3 * (1 - reached), reached))
    rows.append((steps, "train", 2.3 * (1 - reach), float(accuracy(steps))))
    names = ("step", "split", "loss", "accuracy")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    writer.append("evaluations", schema.table("evaluations", columns))
    return {"train_loss": rows[-1][2], "train_accuracy": rows[-1][3],
            "test_loss": rows[-2][2], "test_accuracy": rows[-2][3]}  # fmt: skip


def _certificate(
    spec: RunSpec, measured: list[str], modules: dict[str, list[Any]]
) -> dict[str, Any]:
    """Digests that depend on depth and seed alone: the pairs are matched."""

    def digest(*of: object) -> str:
        return hashlib.sha256(repr(of).encode()).hexdigest()[:16]

    names = [f"{name}.{what}" for name in measured for what in ("weight", "bias")]
    return {
        "parameter_count": sum(modules["parameters"]),
        "parameters": {name: digest(name, spec.depth, spec.seed) for name in names},
        "data": digest("data"),
        "batches": digest("batches", spec.seed, spec.max_steps),
    }


# --- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    summary = "Write a store as gradflow does, without training."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stores", description=summary)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--runs", type=int, default=200, help="how many (200)")
    parser.add_argument("--layers", type=int, default=152, help="weight layers, 6n + 2 (152)")
    parser.add_argument("--steps", type=int, default=1000, help="recorded steps a run (1000)")
    options = parser.parse_args(argv)
    if min(options.runs, options.steps) < 1 or options.layers < 8 or (options.layers - 2) % 6:
        parser.error("at least one run and one step, and 6n + 2 layers: 8, 14, 20, … 152")
    began = time.perf_counter()
    wanted = specs(options.runs, options.layers, options.steps)
    fill(options.directory, wanted)
    files = [path for spec in wanted for path in (options.directory / spec.name).iterdir()]
    size = sum(path.stat().st_size for path in files) / 2**20
    values = 4 * options.runs * (2 * options.layers - 1) * options.steps
    print(f"{options.directory}: {options.runs:,} runs, {values / 1e6:.0f} M values of layers, "
          f"{size:,.0f} MB, {time.perf_counter() - began:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
