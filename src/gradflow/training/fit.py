"""Trains one run with Lightning and records it; everything a run's training needs in one place."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from gradflow.data import Batches, Data, consumed_digest
from gradflow.recording import Divergence, Recorder
from gradflow.recording.schedules import Schedule
from gradflow.spec import RunSpec
from gradflow.store import RunWriter
from gradflow.tracking import Tracker
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
) -> Outcome:
    """Train `network` in place as `spec` says; tables go to `writer`, progress to `emit`.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after what was recorded is written.
    """
    batches = Batches(
        data.train, batch_size=spec.batch_size, accumulate=spec.accumulate, seed=spec.seed
    )
    total = spec.updates(len(data.train))
    module = Classifier(network, spec, total)
    flow = GradientFlow(
        quantities,
        schedule,
        writer,
        on_divergence=spec.on_divergence,
        model=network,
        values=lambda: {"accuracy": module.accuracy},
        repeat_forward=module.repeat_forward,
    )
    watch = _Watch(module, flow, data, spec, tracker, emit)
    accelerator, devices = _placement(device)
    began = time.monotonic()
    with _quiet():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=_PRECISIONS[spec.precision],  # type: ignore[arg-type]
            max_epochs=-1,
            max_steps=total,
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
        steps=trainer.global_step,
        metrics=metrics,
        batches_digest=watch.digest,
        recorder_seconds=flow.recorder.seconds,
        fit_seconds=time.monotonic() - began,
        divergence=flow.recorder.divergence,
    )


class _Watch(pl.Callback):
    """Progress, evaluations and the digest of consumed batches; stands before the recorder."""

    def __init__(
        self,
        module: Classifier,
        flow: GradientFlow,
        data: Data,
        spec: RunSpec,
        tracker: Tracker,
        emit: Emit,
    ):
        self._module, self._flow, self._data, self._spec = module, flow, data, spec
        self._tracker, self._emit = tracker, emit
        self.digest = ""  # of the batches trained on, see `consumed_digest`
        self._epoch: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._loss = torch.zeros(())
        self._test: dict[str, float] = {}
        self._told = 0.0

    @property
    def recorder(self) -> Recorder:
        return self._flow.recorder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        for indices in self._module.consumed:
            self.digest = consumed_digest(self.digest, indices)
        self._module.consumed.clear()
        loss = outputs["loss"].detach()
        self._epoch.append((loss * self._spec.accumulate, self._module.accuracy))
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            self._say(
                "step",
                step=trainer.global_step,
                loss=float(self._epoch[-1][0]),
                accuracy=float(self._module.accuracy),
                ratio=self.recorder.first_to_last(),
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses, accuracies = (torch.stack(values) for values in zip(*self._epoch, strict=True))
        self._epoch.clear()
        seen = {"loss": float(losses.mean()), "accuracy": float(accuracies.mean())}
        self._test = test = self._evaluate(trainer, "test")
        self.recorder.evaluate("train_batches", **seen)
        self._tracker.log(
            trainer.global_step,
            {"epoch": trainer.current_epoch + 1}
            | {f"train_batches_{name}": value for name, value in seen.items()}
            | {f"test_{name}": value for name, value in test.items()},
        )

    def _evaluate(self, trainer: pl.Trainer, split: str) -> dict[str, float]:
        context = trainer.precision_plugin.forward_context()
        found = evaluate(self._module.network, getattr(self._data, split), context)
        self.recorder.evaluate(split, **found)
        self._say("evaluation", step=trainer.global_step, split=split, **found)
        return found

    def final(self, trainer: pl.Trainer) -> dict[str, float]:
        """Metrics of both splits at the final parameters; the last epoch's end saw the test."""
        both = {"train": self._evaluate(trainer, "train"), "test": self._test}
        return {f"{s}_{name}": value for s, found in both.items() for name, value in found.items()}

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
    except SystemExit:
        raise KeyboardInterrupt from None
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
