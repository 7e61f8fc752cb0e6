"""Mirrors of a run's progress, chosen by `logger`: none, a CSV file, or Weights & Biases.

A mirror is never a source: nothing is read back from it. wandb is imported when asked for, offline
unless the environment says otherwise (WANDB_MODE=online is the user's own choice).
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gradflow.errors import GradflowError
from gradflow.spec import RunSpec


class Tracker(Protocol):
    """What a mirror can do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one epoch, at the given number of updates."""

    def finish(self, status: str, metrics: Mapping[str, float], figures: Mapping[str, Any]) -> None:
        """The run's end: its status, final metrics, and matplotlib figures by name."""


class NoTracker:
    """`logger=none`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return None

    def finish(self, status: str, metrics: Mapping[str, float], figures: Mapping[str, Any]) -> None:
        return None


class CsvTracker:
    """`logger=csv`: metrics.csv in the run's directory, one row an epoch."""

    def __init__(self, directory: Path, start: int):
        self._path = directory / "metrics.csv"
        if self._path.exists():
            with self._path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
            self._path.unlink()
            for row in rows:
                self.log(int(row.pop("step")), row)  # type: ignore[arg-type]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, **metrics}
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def finish(self, status: str, metrics: Mapping[str, float], figures: Mapping[str, Any]) -> None:
        return None


class WandbTracker:
    """`logger=wandb`: a run of the group of its matched pair, in the run's directory if offline.

    Project and mode come from WANDB_PROJECT (default gradflow) and WANDB_MODE (default offline).
    """

    def __init__(self, directory: Path, spec: RunSpec):
        # Without this, even an offline run looks up a host name once.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        tags = [spec.network.name, spec.data.name, f"depth-{spec.depth}", f"skip-{spec.skip}"]
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gradflow"),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=str(directory),
            name=spec.name,
            group=f"{spec.network.name}-{spec.depth}-{spec.data.name}",
            tags=tags,
            config=spec.columns() | {"run_id": spec.run_id},
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, x_disable_meta=True
            ),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: str, metrics: Mapping[str, float], figures: Mapping[str, Any]) -> None:
        images = {name: self._wandb.Image(figure) for name, figure in figures.items()}
        self._run.log(images)
        self._run.summary.update({"status": status, **metrics})
        self._run.finish()


def check_logger(logger: str) -> None:
    """Raise GradflowError, without importing anything, where a logger's package is missing."""
    if logger == "wandb" and importlib.util.find_spec("wandb") is None:
        raise GradflowError(
            "logger=wandb: wandb is not installed; pip install 'gradflow-harness[wandb]'"
        )


def make_tracker(logger: str, directory: Path, spec: RunSpec, start: int = 0) -> Tracker:
    """The mirror that `logger` names, of a run that goes on after `start` updates."""
    check_logger(logger)
    if logger == "wandb":
        return WandbTracker(directory, spec)
    return CsvTracker(directory, start) if logger == "csv" else NoTracker()
