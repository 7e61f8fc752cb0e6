"""A store made by hand for the tests of tables, figures and report: every kind of run in it.

Values are exact: a plain network's gradient grows by `GROWTH` a layer toward the input, a residual
one's follows a power law, both shrink as 1/(step + 1), and each seed scales them by (1 + seed).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from crash import die

from gradflow import schema
from gradflow.measures import Imagined, imagined_layers
from gradflow.spec import RunSpec
from gradflow.store import RunWriter

GROWTH, STEPS = 1.21, 12
ERRORS = {  # (depth, skip) -> final training error by seed
    (20, "none"): (0.0, 0.0, 0.0),
    (20, "identity"): (0.0, 0.0, 0.0),
    (56, "none"): (0.5, 0.4, 0.6),
    (56, "identity"): (0.0, 0.01, 0.02),
}


def cifar_modules(depth: int) -> list[dict[str, Any]]:
    """Rows of modules.parquet: as the recorder finds them in a CIFAR-style network."""
    rows: list[dict[str, Any]] = []

    def add(layer: str, kind: str, stage: int, shape: str = "", parameters: int = 0) -> None:
        rows.append({"layer": layer, "position": len(rows), "kind": kind, "stage": stage,
                     "shape": shape, "parameters": parameters, "calls": 1})  # fmt: skip

    add("conv1", "conv", 1, "16x1x3x3", 144)
    add("bn1", "norm", 1, "16", 32)
    before = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            for index in (1, 2):
                shape = f"{width}x{before}x3x3"
                add(f"{name}.conv{index}", "conv", stage, shape, 9 * width * before)
                add(f"{name}.bn{index}", "norm", stage, str(width), 2 * width)
                before = width
            add(f"{name}.skip", "block", stage)
    add("fc", "linear", 4, "10x64", 650)
    return rows


def gradient(depth: int, skip: str, ordinal: int, step: int, seed: int) -> float:
    """The weight-gradient norm of the `ordinal`-th weight layer (1 nearest the input)."""
    shape = GROWTH ** (depth - ordinal) if skip == "none" else float(ordinal) ** -0.7
    return shape * (1 + seed) / (1 + step)


def weight_columns(
    modules: list[dict[str, Any]], steps: range, depth: int, skip: str, seed: int
) -> dict[str, list[Any]]:
    """Columns of weights.parquet; normalisation layers have a tenth of their layer's gradient."""
    columns: dict[str, list[Any]] = {"step": [], "layer": [], "weight_grad_norm": []}
    for step in steps:
        ordinal = 0
        for row in modules:
            if row["kind"] == "block":
                continue
            ordinal += row["kind"] != "norm"
            value = gradient(depth, skip, ordinal, step, seed)
            columns["step"].append(step)
            columns["layer"].append(row["layer"])
            columns["weight_grad_norm"].append(value / 10 if row["kind"] == "norm" else value)
    columns["weight_norm"] = [1.0] * len(columns["step"])
    return columns


def _blocks(modules: list[dict[str, Any]], steps: tuple[int, ...], skip: str) -> dict[str, Any]:
    layers = [row["layer"] for row in modules if row["kind"] == "block"]
    columns: dict[str, list[Any]] = {"step": [], "layer": []}
    for name in ("branch_rms", "skip_rms", "branch_grad_norm", "skip_grad_norm"):
        columns[name] = []
    for step in steps:
        for place, layer in enumerate(layers):
            columns["step"].append(step)
            columns["layer"].append(layer)
            columns["branch_rms"].append(1.0)
            columns["skip_rms"].append(0.0 if skip == "none" else math.sqrt(place + 1))
            columns["branch_grad_norm"].append(0.1 / (place + 1))
            columns["skip_grad_norm"].append(0.0 if skip == "none" else 0.2 / (place + 1))
    return columns


def certificate(
    depth: int, seed: int, extra: tuple[str, ...] = (), batches: str = "b"
) -> dict[str, Any]:
    """A match certificate: digests that depend on depth and seed alone."""
    names = [row["layer"] for row in cifar_modules(depth) if row["kind"] != "block"]
    digests = {f"{name}.weight": f"{depth}-{seed}-{name}" for name in names}
    digests |= dict.fromkeys(extra, "own")
    count = 1000 * depth + len(extra)
    return {"parameter_count": count, "parameters": digests, "batches": f"{batches}{seed}",
            "data": "d"}  # fmt: skip


def write_run(
    store: Path,
    error: float | None = 0.1,
    *,
    status: str = "done",
    steps: int = STEPS,
    extra: tuple[str, ...] = (),
    batches: str = "b",
    change: Any = None,
    **keys: Any,
) -> Path:
    """One cifar run of the given spec keys; `change` may edit the columns of weights.parquet."""
    spec = RunSpec(**keys)
    assert spec.depth is not None
    assert spec.skip is not None
    modules = cifar_modules(spec.depth)
    writer = RunWriter(store / spec.name, spec.to_dict())
    writer.write("modules", table_of("modules", modules))
    weights = weight_columns(modules, range(max(1, steps)), spec.depth, spec.skip, spec.seed)
    if change is not None:
        change(weights)
    writer.append("weights", schema.table("weights", weights))
    measured = tuple(s for s in (0, 1, 2, 10) if s < max(1, steps))
    writer.append("blocks", schema.table("blocks", _blocks(modules, measured, spec.skip)))
    rate = np.arange(max(1, steps), dtype=np.float64)
    writer.append("steps", schema.table("steps", {
        "step": rate.astype(np.int32), "loss": 2.3 / (1 + rate), "accuracy": rate / 20,
        "lr": np.full_like(rate, 0.02), "grad_norm": 1 / (1 + rate)}))  # fmt: skip
    if status == "parts":  # a process that was killed: nothing merged, the lock gone with it
        die(writer)
        return writer.path
    metrics = {}
    if error is not None:
        rows = {"step": [6, 6, 12, 12, 12],
                "split": ["train_batches", "test", "train_batches", "test", "train"],
                "loss": [1.0, 1.1, 0.5, 0.6, 0.55],
                "accuracy": [0.4, 0.35, 1 - error, 0.9 - error / 2, 1 - error]}  # fmt: skip
        writer.append("evaluations", schema.table("evaluations", rows))
        metrics = {"train_loss": 0.55, "train_accuracy": 1 - error,
                   "test_loss": 0.6, "test_accuracy": 0.9 - error / 2}  # fmt: skip
    fields: dict[str, Any] = {
        "steps": steps, "metrics": metrics, "recorder_seconds": 0.1, "recorder_share": 0.0125,
        "certificate": certificate(spec.depth, spec.seed, extra, batches),
        "environment": {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "device": "cpu",
                        "threads": 1, "git": {"commit": "0123456789abcdef", "dirty": False}},
    }  # fmt: skip
    if status == "diverged":
        fields["divergence"] = {"step": steps - 1, "layer": "conv1", "quantity": "output_rms"}
    writer.finish(status, **fields)
    return writer.path


def table_of(name: str, rows: list[dict[str, Any]]) -> Any:
    return schema.table(name, {label: [row[label] for row in rows] for label in rows[0]})


def write_pairs(store: Path, **keys: Any) -> None:
    """Plain and residual networks of depth 20 and 56, three seeds each, with `ERRORS`."""
    for (depth, skip), errors in ERRORS.items():
        for seed, error in enumerate(errors):
            write_run(store, error, depth=depth, skip=skip, seed=seed, **keys)


def _diverge(columns: dict[str, list[Any]]) -> None:
    last = columns["step"][-1]
    columns["weight_grad_norm"] = [
        value if step < last else (math.nan if place % 2 else math.inf)
        for place, (step, value) in enumerate(
            zip(columns["step"], columns["weight_grad_norm"], strict=True)
        )
    ]


def write_vanishing(store: Path, zeros: int = 5) -> Path:
    """An MLP's step 0 whose gradient shrinks to .24 a layer, and is exactly zero at the input."""
    spec = RunSpec(network="mlp", norm="none", activation="sigmoid", init="xavier", depth=30,
                   skip=False, max_steps=0)  # fmt: skip
    writer = RunWriter(store / spec.name, spec.to_dict())
    rows = [{"layer": f"layers.{i}", "position": i, "kind": "linear", "stage": 1 + (i == 29),
             "shape": "256x64" if i == 0 else "10x256" if i == 29 else "256x256",
             "parameters": 65792, "calls": 1} for i in range(30)]  # fmt: skip
    writer.write("modules", table_of("modules", rows))
    norms = [0.0 if i < zeros else 0.24 ** (29 - i) for i in range(30)]
    columns = {"step": [0] * 30, "layer": [row["layer"] for row in rows], "weight_grad_norm": norms}
    writer.append("weights", schema.table("weights", columns))
    writer.finish("done", steps=0, metrics={}, certificate=certificate(20, 0))
    return writer.path


def write_probe(store: Path, *, status: str = "done", **keys: Any) -> Path:
    """A probe task of a finding: a few tables of an MLP at initialisation."""
    spec = RunSpec(**{"network": "mlp", "depth": 10, "norm": "none", "skip": False,
                      "data": {"name": "gaussian", "channels": 16, "size": 1},
                      "probe": "propagation"} | keys)  # fmt: skip
    return write_record(store, spec, imagined_layers("output_grad_norm", np.geomspace(1, 2, 10)),
                        status=status)  # fmt: skip


def write_record(store: Path, spec: RunSpec, record: Imagined, *, status: str = "done") -> Path:
    """A run of this spec that has the tables and metrics of a made-up record."""
    writer = RunWriter(store / spec.name, spec.to_dict())
    for name, data in record.tables.items():
        if name == "modules":
            writer.write(name, data)
        else:
            writer.append(name, data)
    writer.finish(status, steps=0, metrics=dict(record.metrics), certificate=certificate(8, 0))
    return writer.path


def write_external(store: Path, name: str, meta: dict[str, Any]) -> Path:
    """A record of a user's own loop: only what `meta` says is known of it."""
    writer = RunWriter(store / name, meta, origin="external")
    modules = cifar_modules(20)
    writer.write("modules", table_of("modules", modules))
    columns = weight_columns(modules, range(3), 20, "none", 0)
    writer.append("weights", schema.table("weights", columns))
    writer.append("steps", schema.table("steps", {"step": [0, 1, 2], "loss": [2.3, 2.2, 2.1]}))
    metrics = {"train_accuracy": 0.75} if "depth" in meta else {}
    writer.finish("done", steps=3, metrics=metrics)
    return writer.path


def write_corrupted(store: Path) -> Path:
    """A run whose run.json is cut off in the middle."""
    path = store / "cifar-20-none-s9-0000000000"
    path.mkdir(parents=True)
    (path / "spec.json").write_text("{}")
    (path / "run.json").write_text('{"origin": "gradflow", "status": "do')
    return path


def write_store(store: Path) -> Path:
    """Every kind of run: pairs, diverged, killed, external, step 0 only, a corrupted directory."""
    write_pairs(store)
    write_run(store, None, depth=56, skip="none", seed=3, status="diverged", steps=6,
              batches="other", change=_diverge)  # fmt: skip
    write_run(store, 0.0, depth=56, skip="identity", seed=3)
    write_run(store, None, depth=20, skip="none", seed=4, status="parts", steps=4)
    write_vanishing(store)
    write_external(store, "mine <b>&", {"depth": 20, "skip": "none", "seed": 0})
    write_external(store, "nameless", {})
    write_corrupted(store)
    return store
