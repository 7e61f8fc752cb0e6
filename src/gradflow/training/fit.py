"""Trains one run with Lightning and records it; everything a run's training needs in one place."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from gradflow.data import Batches, Data, consumed_digest
from gradflow.recording import Divergence, Recorder
from gradflow.recording.schedules import Schedule
from gradflow.spec import RunSpec
from gradflow.store import RunWriter
from gradflow.tracking import Tracker
from gradflow.training import checkpoint
from gradflow.training.callback import GradientFlow
from gradflow.training.evaluation import evaluate
from gradflow.training.module import Classifier

Emit = Callable[[dict[str, Any]], None]

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}
_PROGRESS_SECONDS = 0.25


@dataclass(frozen=True)
class Outcome:
    """How a training ended: updates made, final metrics, the recorder's time, any divergence."""

    steps: int
    metrics: dict[str, float]
    batches_digest: str
    recorder_seconds: float
    fit_seconds: float
    divergence: Divergence | None


def train(
    network: nn.Module,
    data: Data,
    spec: RunSpec,
    *,
    device: torch.device,
    schedule: dict[str, Schedule],
    quantities: str | tuple[str, ...],
    writer: RunWriter,
    tracker: Tracker,
    emit: Emit,
    state: dict[str, Any] | None = None,
) -> Outcome:
    """Train `network` in place as `spec` says; tables go to `writer`, progress to `emit`.

    With the `state` of a checkpoint, training goes on there, bit for bit as if never stopped (on
    the same device, with the same threads and versions).

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after what was recorded is written.
    """
    start = 0 if state is None else state["updates"]
    batches = Batches(
        data.train,
        batch_size=spec.batch_size,
        accumulate=spec.accumulate,
        seed=spec.seed,
        start=start * spec.accumulate,
    )
    total = spec.updates(len(data.train))
    module = Classifier(network, spec, total, start)
    flow = GradientFlow(
        quantities,
        schedule,
        writer,
        on_divergence=spec.on_divergence,
        model=network,
        values=lambda: {"accuracy": module.accuracy},
        repeat_forward=module.repeat_forward,
    )
    watch = _Watch(module, flow, data, writer, tracker, emit)
    if state is not None:
        network.load_state_dict(state["network"])
        module.state = state
        flow.load_state_dict(state["recorder"])
        watch.load(state)
    accelerator, devices = _placement(device)
    with _quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=_PRECISIONS[spec.precision],  # type: ignore[arg-type]
            max_epochs=-1,
            max_steps=total - start,
            accumulate_grad_batches=spec.accumulate,
            gradient_clip_val=spec.clip,
            callbacks=[watch, flow],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with _interruptible():
            trainer.fit(module, train_dataloaders=batches)
        metrics = watch.final(trainer)
    flow.recorder.flush()
    return Outcome(
        steps=watch.updates,
        metrics=metrics,
        batches_digest=watch.digest,
        recorder_seconds=flow.recorder.seconds,
        fit_seconds=watch.fit_seconds + time.monotonic() - watch.began,
        divergence=flow.recorder.divergence,
    )


class _Watch(pl.Callback):
    """Progress, evaluations, checkpoints and the digest of consumed batches."""

    def __init__(
        self,
        module: Classifier,
        flow: GradientFlow,
        data: Data,
        writer: RunWriter,
        tracker: Tracker,
        emit: Emit,
    ):
        self._module, self._flow, self._data = module, flow, data
        self._spec, self._writer = module.spec, writer
        self._tracker, self._emit = tracker, emit
        self._per_epoch = module.spec.but(max_steps=None, epochs=1).updates(len(data.train))
        self._seen = module.start
        self.digest = ""  # of the batches trained on, see `consumed_digest`
        self.fit_seconds = 0.0
        self._epoch: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._test: tuple[int, dict[str, float]] | None = None  # updates made, metrics
        self._told = self._saved = self.began = time.monotonic()

    @property
    def updates(self) -> int:
        """Updates that were applied: not that of the step at which the run diverged and ended."""
        found, made = self.recorder.divergence, self._module.updates
        if found is None or self._spec.on_divergence != "stop":
            return made
        return found.step if found.step == made - 1 else made

    @property
    def recorder(self) -> Recorder:
        return self._flow.recorder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        for indices in self._module.consumed:
            self.digest = consumed_digest(self.digest, indices)
        self._module.consumed.clear()
        if self._module.updates == self._seen:
            return  # more batches of the same update follow
        self._seen = self._module.updates
        self._epoch.append((self._module.loss, self._module.accuracy))
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            self._tell_step()
        ends = self._module.updates % self._per_epoch == 0
        if ends:
            self._end_epoch(trainer)
        # Not at the last update: what goes on from a checkpoint has something left to train.
        more = self._module.updates < self._module.total and not trainer.should_stop
        if more and now - self._saved > checkpoint.SECONDS[0 if ends else 1]:
            self._save()

    def _tell_step(self) -> None:
        self._say(
            "step",
            step=self._module.updates,
            loss=float(self._module.loss),
            accuracy=float(self._module.accuracy),
            ratio=self.recorder.first_to_last(),
        )

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        losses, accuracies = (torch.stack(values) for values in zip(*self._epoch, strict=True))
        self._epoch.clear()
        seen = {"loss": float(losses.mean()), "accuracy": float(accuracies.mean())}
        self.recorder.evaluate("train_batches", step=self.updates, **seen)
        test = self._evaluate(trainer, "test")
        self._test = (self.updates, test)
        self._tracker.log(
            self.updates,
            {"epoch": -(-self.updates // self._per_epoch)}
            | {f"train_batches_{name}": value for name, value in seen.items()}
            | {f"test_{name}": value for name, value in test.items()},
        )

    def _evaluate(self, trainer: pl.Trainer, split: str) -> dict[str, float]:
        context = trainer.precision_plugin.forward_context()
        found = evaluate(self._module.network, getattr(self._data, split), context)
        self.recorder.evaluate(split, step=self.updates, **found)
        self._say("evaluation", step=self.updates, split=split, **found)
        return found

    def final(self, trainer: pl.Trainer) -> dict[str, float]:
        """Metrics of both splits at the final parameters; an epoch's end may have seen the test."""
        if self._epoch:
            self._end_epoch(trainer)
        if self._test is None or self._test[0] != self.updates:
            self._test = (self.updates, self._evaluate(trainer, "test"))
        both = {"train": self._evaluate(trainer, "train"), "test": self._test[1]}
        return {f"{s}_{name}": value for s, found in both.items() for name, value in found.items()}

    # --- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        self.recorder.flush()
        scaler = getattr(self._module.trainer.precision_plugin, "scaler", None)
        self._saved = time.monotonic()
        state = {
            "network": self._module.network.state_dict(),
            "optimizer": self._module.optimizer.state_dict(),
            "scheduler": self._module.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "recorder": self.recorder.state_dict(),
            "updates": self._module.updates,
            "part": self._writer.part,
            "seconds": self._writer.seconds,
            "fit_seconds": self.fit_seconds + self._saved - self.began,
            "data": self._data.digest,
            "digest": self.digest,
            "epoch": self._epoch,
        }
        checkpoint.write_checkpoint(self._writer.path, self._spec, state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, before the fit."""
        self.digest, self._epoch = state["digest"], state["epoch"]
        self.fit_seconds = state["fit_seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self._module.state.get("scaler"):
            scaler.load_state_dict(self._module.state["scaler"])

    def _say(self, event: str, **fields: Any) -> None:
        self._emit({"event": event, "run": self._spec.name, **fields})


def _placement(device: torch.device) -> tuple[str, Any]:
    if device.type == "cuda":
        return "gpu", [device.index or 0]
    return device.type, 1


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C into SystemExit and leaves SIGINT ignored; undo both."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        interrupted = isinstance(error, SIGTERMException)
        if interrupted or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise  # a network of the user's has called sys.exit
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's device lines, tips, and the two warnings that are about itself."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*srun.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
