"""One's own questions over many runs: `gradflow.load_runs` beside pandas, run by run.

`python -m benchmarks.queries [DIRECTORY] [--runs 200] [--layers 152] [--steps 1000]`. Writes a
store of made-up runs (plain and residual, five rates; four quantities of each layer at every step),
then lets the two ways to ask the same question take turns in one process, and prints the median of
each and of their ratio in the same round. With DIRECTORY, the store is left there and used again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradflow import RunSpec, load_runs, schema
from gradflow.store import RunWriter

RATES, SKIPS = (0.01, 0.02, 0.05, 0.1, 0.2), ("none", "identity")
TABLES = {"weights": ("weight_grad_norm", "weight_norm"),
          "outputs": ("output_rms", "output_grad_norm")}  # fmt: skip


def fill(store: Path, runs: int, layers: int, steps: int) -> Path:
    """A store of finished runs of that size; values are log-normal. What is there stays."""
    names = [f"layer{place}" for place in range(layers)]
    modules = {"layer": names, "position": range(layers), "kind": ["conv"] * layers,
               "stage": [1 + 3 * place // layers for place in range(layers)],
               "shape": ["16x16x3x3"] * layers, "parameters": [2304] * layers,
               "calls": [1] * layers}  # fmt: skip
    keys = {"step": np.repeat(np.arange(steps, dtype=np.int32), layers), "layer": names * steps}
    random = np.random.default_rng(0)
    for number in range(runs):
        spec = RunSpec(
            depth=152,
            seed=number // 10,
            lr=RATES[number % 10 // 2],
            skip=SKIPS[number % 2],
            max_steps=steps,
        )
        if (store / spec.name / "weights.parquet").exists():
            continue
        with RunWriter(store / spec.name, spec.to_dict()) as writer:
            listed = {label: list(values) for label, values in modules.items()}
            writer.write("modules", schema.table("modules", listed))
            for name, quantities in TABLES.items():
                drawn = random.lognormal(size=(len(quantities), steps * layers)).astype(np.float32)
                columns = keys | dict(zip(quantities, drawn, strict=True))
                writer.append(name, schema.table(name, columns))
            writer.finish("done", steps=steps, metrics={"train_accuracy": float(random.random())})
    return store


# --- the same questions, asked in two ways --------------------------------------------------------

FIELDS = ("depth", "skip", "seed", "lr")
Question = Callable[[Path], pd.DataFrame | pd.Series]


def by_pandas(store: Path, steps: slice = slice(None), lr: float | None = None) -> pd.DataFrame:
    """What one writes without gradflow: run by run, a file whole, its spec beside it, a concat."""
    parts = []
    for path in sorted(store.glob("*/weights.parquet")):
        spec = json.loads((path.parent / "spec.json").read_text())
        if lr is None or (spec["lr"], spec["skip"]) == (lr, "none"):
            frame = pd.read_parquet(path)
            frame = frame[frame["step"] < (steps.stop or math.inf)].drop(columns="weight_norm")
            parts.append(frame.assign(**{name: spec[name] for name in FIELDS}))
    return pd.concat(parts, ignore_index=True)


def _mean(frame: pd.DataFrame) -> pd.Series:
    return frame.groupby(["skip", "layer"], observed=True)["weight_grad_norm"].mean()


def _mean_of_dataset(store: Path) -> pd.Series:
    data = load_runs(store).dataset("weights", fields=("skip",))
    table = data.to_table(columns=["skip", "layer", "weight_grad_norm"])
    found = table.group_by(["skip", "layer"]).aggregate([("weight_grad_norm", "mean")]).to_pandas()
    return found.set_index(["skip", "layer"])["weight_grad_norm_mean"]


def _asked(store: Path, lr: float | None = None, **selection: Any) -> pd.DataFrame:
    runs = load_runs(store)
    runs = runs if lr is None else runs.where(lr=lr, skip="none")
    return runs.weights("weight_grad_norm", fields=FIELDS, modules=(), **selection)


QUESTIONS: dict[str, tuple[Question, Question]] = {
    "step 0 of every run": (lambda s: by_pandas(s, slice(1)), lambda s: _asked(s, steps=0)),
    "every step, plain at one rate": (lambda s: by_pandas(s, lr=0.1), lambda s: _asked(s, lr=0.1)),
    "every step of every run": (by_pandas, _asked),
    "mean by skip and layer, `dataset`": (lambda s: _mean(by_pandas(s)), _mean_of_dataset),
}


def main(store: Path, runs: int, layers: int, steps: int, rounds: int) -> pd.DataFrame:
    """Print a row a question: seconds of either way, their ratio, and the frames' sizes."""
    fill(store, runs, layers, steps)
    began = time.perf_counter()
    found = len(load_runs(store))
    print(f"{found} runs, {found * layers * steps / 1e6:.1f} M rows of weights; ", end="")
    print(f"load_runs {time.perf_counter() - began:.2f} s")
    rows = []
    for question, ways in QUESTIONS.items():
        seconds: list[list[float]] = []
        for _ in range(rounds):
            seconds.append([])
            answers = []
            for way in ways:
                began = time.perf_counter()
                answers.append(way(store))
                seconds[-1].append(time.perf_counter() - began)
            _check_equal(*answers)
        sizes = [answer.memory_usage(deep=True) for answer in answers]
        rows.append({
            "question": question,
            "pandas, s": statistics.median(s[0] for s in seconds),
            "gradflow, s": statistics.median(s[1] for s in seconds),
            "ratio": statistics.median(s[1] / s[0] for s in seconds),
            "pandas, MB": float(np.sum(sizes[0])) / 1e6,
            "gradflow, MB": float(np.sum(sizes[1])) / 1e6,
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False, float_format="{:.3f}".format))
    return frame


def _check_equal(one: pd.DataFrame | pd.Series, two: pd.DataFrame | pd.Series) -> None:
    assert len(one) == len(two)
    totals = [
        float((x["weight_grad_norm"] if isinstance(x, pd.DataFrame) else x).astype(float).sum())
        for x in (one, two)
    ]
    assert math.isclose(*totals, rel_tol=1e-6), totals


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    for name, value in (("runs", 200), ("layers", 152), ("steps", 1000), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sizes = (options.runs, options.layers, options.steps, options.rounds)
    if options.directory is not None:
        main(options.directory, *sizes)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch), *sizes)
