"""Mirrors of a run, chosen by `logger`: a CSV file, TensorBoard's event files, Weights & Biases.

A mirror is a copy of the record and never a source: nothing is read back from it. A run that goes
on from a checkpoint writes its mirror anew from the record, so that no epoch is there twice; where
it lies on W&B's server already, it is gone on with. A mirror that fails costs its run one line.

Each gets one call an epoch and one at the end, never one a step or a layer.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from gradflow.errors import GradflowError
from gradflow.spec import RunSpec
from gradflow.store import FINISHED, Run, RunWriter, encode

if TYPE_CHECKING:
    import pandas as pd

_QUANTITY = "weight_grad_norm"
_SPLITS = ("train_batches", "test")  # evaluated at each epoch's end
_PACKAGES = ("tensorboard", "wandb")  # each an extra of the same name
_TABLE_ROWS = 10_000  # as many as W&B shows of a table
_EXIT_CODES = {"done": 0, "diverged": 0, "failed": 1, "interrupted": 255}
"""0 is finished for W&B, all else is not; 255 is its own code for Ctrl-C."""


class Tracker(Protocol):
    """What a kind of mirror can do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one epoch, at the given number of updates."""

    def finish(self, run: Run, status: str) -> None:
        """The run's end, as its record tells it."""


class Mirror:
    """A run's mirror, as the run sees it: a context manager around the run's `RunWriter`.

    It is closed after the record, with the status that the record has then. Whatever goes wrong in
    the mirror ends the mirror alone, with one line on stderr.
    """

    def __init__(self, logger: str):
        self._logger = logger
        self._tracker: Tracker | None = None
        self._writer: RunWriter | None = None

    def begin(self, writer: RunWriter, spec: RunSpec) -> None:
        """Begin to mirror a run, or go on, with what the record has already."""
        if self._logger == "none":
            return
        self._writer = writer
        with self._surviving():
            self._tracker = _KINDS[self._logger](writer, spec)
            for step, metrics in epochs(Run(writer.path)):
                self._tracker.log(step, metrics)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one epoch, at the given number of updates."""
        with self._surviving():
            if self._tracker is not None:
                self._tracker.log(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._surviving():
            if self._tracker is not None and self._writer is not None:
                # Still running: taken over by another process, or nothing could be written.
                status = self._writer.record["status"]
                self._tracker.finish(
                    Run(self._writer.path), "interrupted" if status == "running" else status
                )

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"logger={self._logger}: {reason}; the run goes on without", file=sys.stderr)


def check_logger(logger: str) -> None:
    """Raise GradflowError, without importing anything, where a logger's package is missing."""
    if logger in _PACKAGES and importlib.util.find_spec(logger) is None:
        raise GradflowError(
            f"logger={logger}: {logger} is not installed; pip install 'gradflow-harness[{logger}]'"
        )


# --- what is shown --------------------------------------------------------------------------------


def epochs(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """The step and the metrics of each epoch that the record has: what `Mirror.log` was given."""
    frame = run.frame("evaluations")
    if frame.empty:
        return
    ends = frame[frame["split"].isin(_SPLITS)].groupby("step")
    for epoch, (step, rows) in enumerate(ends, 1):
        metrics: dict[str, float] = {"epoch": epoch}
        for row in rows.to_dict("records"):
            values = {name: float(row[name]) for name in ("loss", "accuracy")}
            metrics |= {f"{row['split']}_{name}": value for name, value in values.items()}
        yield int(str(step)), metrics


def summary(run: Run, status: str) -> dict[str, Any]:
    """What became of a run, by name: final metrics, diagnoses, divergence, costs; plain JSON."""
    record = run.record
    values = {"status": status, **run.metrics}
    for name in ("steps", "seconds", "recorder_share", "error"):
        values[name] = record.get(name)
    values["parameter_count"] = record.get("certificate", {}).get("parameter_count")
    for name, value in (record.get("divergence") or {}).items():
        values[f"divergence_{name}"] = value
    if status in FINISHED and run.steps_of("weights").size:
        from gradflow.diagnosis import diagnose_run

        for moment, found in zip(("first", "last"), diagnose_run(run), strict=False):
            values[f"diagnosis_{moment}"] = ", ".join(found.names)
    return encode({name: value for name, value in values.items() if value is not None})


def profile_frame(run: Run) -> pd.DataFrame:
    """The gradient norm of each module at the first, a middle and the last step: `tables.profile`.

    Empty, like `heat_frame`, where no gradient of weights was recorded.
    """
    from gradflow import tables

    return _profile(run, tables.moments(run.steps_of("weights")))


def heat_frame(run: Run) -> pd.DataFrame:
    """The gradient norm of each weight layer at some 60 steps, logarithmically spaced."""
    from gradflow import tables

    frame = _profile(run, tables.spread(run.steps_of("weights")))
    return frame if frame.empty else frame[frame["family"] == tables.WEIGHT]


def _profile(run: Run, steps: Any) -> pd.DataFrame:
    from gradflow import tables

    frame = run.with_modules("weights", steps)
    return tables.profile(frame, _QUANTITY) if _QUANTITY in frame else frame.iloc[:0]


def figures(run: Run) -> dict[str, Any]:
    """Profile and heatmap of a run's gradient as matplotlib figures, by name."""
    from gradflow import plots

    profile, heat = profile_frame(run), heat_frame(run)
    drawn = {}
    if len(profile):
        drawn["gradient_profile"] = plots.profile(profile, title=run.path.name)
    if len(heat) and heat["step"].nunique() > 1:
        drawn["gradient_heatmap"] = plots.heatmap(heat, title=run.path.name)
    return drawn


# --- the kinds of mirrors -------------------------------------------------------------------------


class CsvTracker:
    """`logger=csv`: metrics.csv in the run's directory, one row an epoch.

    Not Lightning's CSVLogger: that would load Lightning where nothing is trained, and empties its
    file at a restart like this one.
    """

    def __init__(self, writer: RunWriter, spec: RunSpec):
        self._path = writer.path / "metrics.csv"
        self._path.unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, **metrics}
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def finish(self, run: Run, status: str) -> None:
        return None


class TensorBoardTracker:
    """`logger=tensorboard`: event files in `tensorboard/` of the run's directory.

    Scalars `loss/test`, `accuracy/train_batches`, … by number of updates; at the end those of the
    whole training split, the two figures, the words of the run, and its keys as hyperparameters.
    Lightning's TensorBoardLogger is a cover of the same SummaryWriter, and would load Lightning.
    """

    def __init__(self, writer: RunWriter, spec: RunSpec):
        from torch.utils.tensorboard import SummaryWriter

        directory = writer.path / "tensorboard"
        for stale in directory.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = SummaryWriter(str(directory))
        self._logged: set[tuple[str, int]] = set()
        self._spec = spec

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            split, _, quantity = name.rpartition("_")
            self._scalar(f"{quantity}/{split}" if split else name, value, step)
        self._writer.flush()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if (tag, step) not in self._logged:
            self._logged.add((tag, step))
            self._writer.add_scalar(tag, value, step, new_style=False)

    def finish(self, run: Run, status: str) -> None:
        try:
            if status in FINISHED:
                self._close(run)
        finally:
            self._writer.close()

    def _close(self, run: Run) -> None:
        from torch.utils.tensorboard.summary import hparams

        from gradflow.captions import summary as words

        step = int(run.record.get("steps") or 0)
        finals = {}
        for name, value in run.metrics.items():
            split, _, quantity = name.rpartition("_")
            finals[f"{quantity}/{split}"] = value
            self._scalar(f"{quantity}/{split}", value, step)
        for name, figure in figures(run).items():
            self._writer.add_figure(name, figure, step, close=False)
        self._writer.add_text("summary", "\n\n".join(words(run)), step)
        keys = {name: v for name, v in self._spec.columns().items() if v is not None}
        for part in hparams(keys, finals):
            self._writer._get_file_writer().add_summary(part)


class WandbTracker:
    """`logger=wandb`: a W&B run, below `wandb/` in the run's directory, offline unless WANDB_MODE
    says otherwise; the project is WANDB_PROJECT or gradflow.

    Its group is the comparison that the run belongs to: all runs of a depth that differ in seed and
    skip alone. Its job type is what the run does, in W&B's sense: `train`, or `probe` where nothing
    is trained. Plain and residual, which are compared, are told apart by tags and config. Its id is
    made of the run's and of the time at which the run began, which one that goes on keeps: so it
    goes on in the same W&B run, and one that begins anew, here or in another store, has another.
    """

    def __init__(self, writer: RunWriter, spec: RunSpec):
        # Without this, even an offline run looks up a host name once.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # By default what cannot be uploaded at the end is waited for without end.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
        import wandb

        self._wandb = wandb
        self._directory = writer.path.resolve()
        uploaded = _clear_offline(self._directory)
        began = int(1000 * writer.record["started"])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gradflow"),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=str(self._directory),
            id=f"{spec.run_id}-{began:x}",
            resume="allow" if "resumed" in writer.record else None,
            reinit="create_new",
            name=spec.name,
            group=comparison(spec),
            job_type="probe" if spec.max_steps == 0 else "train",
            tags=_tags(spec),
            config=spec.columns() | {"run_id": spec.run_id, "run": spec.name},
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, x_disable_meta=True
            ),
        )
        self._there = self._run.starting_step - 1
        """The last step that the server has of a run that is gone on with."""
        if uploaded:
            done = [step for step, _ in epochs(Run(writer.path))]
            self._there = max([self._there, *done])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._there:
            self._run.log(dict(metrics), step=step)

    def finish(self, run: Run, status: str) -> None:
        try:
            self._run.summary.update(summary(run, status))
            if status in FINISHED:
                with _staged_in(self._directory / "wandb"):
                    self._run.log(self._media(run))
        finally:
            self._run.finish(exit_code=_EXIT_CODES[status])

    def _media(self, run: Run) -> dict[str, Any]:
        """The two figures as images and as tables, and the profile as a chart of W&B's own."""
        from gradflow import tables

        shown: dict[str, Any] = {
            name: self._wandb.Image(figure) for name, figure in figures(run).items()
        }
        profile, heat = profile_frame(run), heat_frame(run)
        if len(profile):
            shown["gradient_profile_table"] = self._wandb.Table(dataframe=_rows(profile))
            shown["gradient_profile_chart"] = self._chart(profile)
        if len(heat):
            fitting = tables.spread(
                heat["step"], max(12, 60 * _TABLE_ROWS // max(len(heat), _TABLE_ROWS))
            )
            heat = heat[heat["step"].isin(fitting)]
            shown["gradient_heatmap_table"] = self._wandb.Table(dataframe=_rows(heat))
        return shown

    def _chart(self, profile: pd.DataFrame) -> Any:
        """W&B's line chart, which has no logarithmic axis; it keeps its table beside it."""
        import numpy as np

        from gradflow import tables

        layers = profile[profile["family"] == tables.WEIGHT]
        with np.errstate(divide="ignore"):
            values = np.log10(layers[_QUANTITY].to_numpy())
        drawn = layers[["step", "ordinal"]].assign(log10_norm=values)
        title = "log10 of the weight gradient's norm, by layer from the input on"
        table = self._wandb.Table(dataframe=drawn)
        return self._wandb.plot.line(table, "ordinal", "log10_norm", stroke="step", title=title)


_KINDS: dict[str, Callable[[RunWriter, RunSpec], Tracker]] = {
    "csv": CsvTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def comparison(spec: RunSpec) -> str:
    """W&B's group: network, depth, data, and a hash of all else in which two arms must agree."""
    from gradflow import tables

    text = json.dumps(tables.alike(spec.columns()), sort_keys=True)
    head = "-".join(str(v) for v in (spec.network.name, spec.depth, spec.data.name) if v)
    return f"{head}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _tags(spec: RunSpec) -> list[str]:
    named = {"depth": spec.depth, "skip": spec.skip, "probe": spec.probe.name}
    tags = [f"{name}-{value}" for name, value in named.items() if value is not None]
    return [spec.network.name, spec.data.name, *tags]


def _clear_offline(directory: Path) -> bool:
    """Remove what W&B holds of earlier attempts; whether some of it has been uploaded, and stays.

    What is mirrored anew would be there twice: `wandb sync` appends directories of one id to each
    other; older versions let the last replace the others (wandb#3841, #5865).
    """
    uploaded = False
    for earlier in directory.glob("wandb/offline-run-*"):
        if list(earlier.glob("*.wandb.synced")):
            uploaded = True
        else:
            shutil.rmtree(earlier)
    return uploaded


@contextlib.contextmanager
def _staged_in(directory: Path) -> Iterator[None]:
    """W&B keeps a table until it is uploaded; not in the home directory, unless that is wanted."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _rows(profile: pd.DataFrame) -> pd.DataFrame:
    """The rows for a table of W&B's: values that are not finite stay, and are marked."""
    import numpy as np

    kept = profile[["step", "layer", "position", "kind", _QUANTITY]]
    return kept.assign(finite=np.isfinite(kept[_QUANTITY]))
