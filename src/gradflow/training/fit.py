"""Trains one run with Lightning and records it; everything a run's training needs in one place."""

from __future__ import annotations

import contextlib
import logging
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from gradflow.data import Batches, Data, consumed_digest
from gradflow.errors import GradflowError
from gradflow.ranks import Group, Ranks
from gradflow.recording import Divergence, Recorder
from gradflow.recording.schedules import Schedule
from gradflow.spec import RunSpec
from gradflow.store import RunWriter
from gradflow.tracking import Mirror
from gradflow.training import checkpoint, ddp
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
    mirror: Mirror,
    emit: Emit,
    state: dict[str, Any] | None = None,
    group: Group | None = None,
) -> Outcome:
    """Train `network` in place as `spec` says; tables go to `writer`, progress to `emit`.

    With the `state` of a checkpoint, training goes on there, bit for bit as if never stopped (on
    the same devices, with the same threads and versions). With a `group`, all its ranks train, and
    this process is rank 0.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after what was recorded is written.
    """
    ranks = Ranks() if group is None else group.ranks
    with contextlib.ExitStack() as stack:
        if group is not None and ranks.world > 1:
            stack.enter_context(ddp.leading(group))
            ddp.from_rank_0((data.digest, state))
        fit = _Fit(network, data, spec, device, ranks, state, schedule, quantities, writer)
        watch = _Watch(fit.module, fit.flow, data, writer, mirror, emit)
        if state is not None:
            watch.load(state)
        trainer = fit.run(watch)
    metrics = watch.final(trainer)
    recorder = fit.flow.recorder
    recorder.flush()
    return Outcome(
        steps=watch.updates,
        metrics=metrics,
        batches_digest=watch.digest,
        recorder_seconds=recorder.seconds,
        fit_seconds=watch.fit_seconds + time.monotonic() - watch.began,
        divergence=recorder.divergence,
    )


def follow(
    network: nn.Module,
    data: Data,
    spec: RunSpec,
    *,
    device: torch.device,
    schedule: dict[str, Schedule],
    quantities: str | tuple[str, ...],
    ranks: Ranks,
    address: tuple[str, int],
) -> None:
    """Train as another rank than 0 with the one that is in `train`, at `address`.

    Raises:
        GradflowError: its data are others.
    """
    with ddp.following(ranks, address):
        digest, state = ddp.from_rank_0(None)
        if digest != data.digest:
            raise GradflowError(f"data={spec.data.name}: they are not those of rank 0")
        fit = _Fit(network, data, spec, device, ranks, state, schedule, quantities)
        fit.run(_Follow(fit.module))


class _Fit:
    """What every rank does: train its share of the batches, and record."""

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        spec: RunSpec,
        device: torch.device,
        ranks: Ranks,
        state: dict[str, Any] | None,
        schedule: dict[str, Schedule],
        quantities: str | tuple[str, ...],
        writer: RunWriter | None = None,
    ):
        start = 0 if state is None else state["updates"]
        self._network, self._spec, self._device, self._ranks = network, spec, device, ranks
        self._batches = Batches(
            data.train,
            batch_size=spec.batch_size,
            accumulate=spec.accumulate,
            seed=spec.seed,
            start=start * spec.accumulate,
            ranks=ranks,
        )
        self.module = Classifier(network, spec, spec.updates(len(data.train)), start)
        if ranks.world > 1:  # DDP, which looks for unused parameters, complains if there are none
            self.module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
        self.flow = GradientFlow(
            quantities,
            schedule,
            writer,
            flight=spec.record.flight,
            on_divergence=spec.on_divergence,
            model=network,
            values=lambda: {"accuracy": self.module.accuracy},
            repeat_forward=self.module.repeat_forward,
        )
        if state is not None:
            network.load_state_dict(state["network"])
            self.module.state = state
            self.flow.load_state_dict(state["recorder"])

    def run(self, callback: pl.Callback) -> pl.Trainer:
        """Train to the end; the Trainer that did."""
        interruptible = _Interruptible()
        with _quiet():
            trainer = pl.Trainer(
                precision=_PRECISIONS[self._spec.precision],  # type: ignore[arg-type]
                max_epochs=-1,
                max_steps=self.module.total - self.module.start,
                accumulate_grad_batches=self._spec.accumulate,
                gradient_clip_val=self._spec.clip,
                callbacks=[interruptible, callback, self.flow],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **ddp.trainer_options(self._ranks, self._device),
            )
            with interruptible:
                trainer.fit(self.module, train_dataloaders=self._batches)
        self._network.to(self._device)  # Lightning leaves it on the CPU
        return trainer


class _Follow(pl.Callback):
    """What a rank other than 0 does beside training: nothing but to forget what it trained on."""

    def __init__(self, module: Classifier):
        self._module = module

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _load_scaler(trainer, self._module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._module.consumed.clear()


class _Watch(pl.Callback):
    """Progress, evaluations, checkpoints and the digest of consumed batches."""

    def __init__(
        self,
        module: Classifier,
        flow: GradientFlow,
        data: Data,
        writer: RunWriter,
        mirror: Mirror,
        emit: Emit,
    ):
        self._module, self._flow, self._data = module, flow, data
        self._spec, self._writer = module.spec, writer
        self._mirror, self._emit = mirror, emit
        self._per_epoch = module.spec.but(max_steps=None, epochs=1).updates(len(data.train))
        self._seen = module.start
        self.digest = ""  # of the batches trained on, see `consumed_digest`
        self.fit_seconds = 0.0
        self._epoch: list[tuple[Any, Any]] = []  # loss, accuracy
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
        self._epoch.append((self.recorder.latest["loss"], self.recorder.latest["accuracy"]))
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
            loss=float(self.recorder.latest["loss"]),
            accuracy=float(self.recorder.latest["accuracy"]),
            ratio=self.recorder.first_to_last(),
        )

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        losses, accuracies = (_mean(values) for values in zip(*self._epoch, strict=True))
        self._epoch.clear()
        seen = {"loss": losses, "accuracy": accuracies}
        self.recorder.evaluate("train_batches", step=self.updates, **seen)
        test = self._evaluate(trainer, "test")
        self._test = (self.updates, test)
        self._mirror.log(
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
        with self._writer.writes():
            checkpoint.write_checkpoint(self._writer.attempt, self._spec, state)
        self._writer.settle()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, before the fit."""
        self.digest, self._epoch = state["digest"], state["epoch"]
        self.fit_seconds = state["fit_seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _load_scaler(trainer, self._module)

    def _say(self, event: str, **fields: Any) -> None:
        self._emit({"event": event, "run": self._spec.name, **fields})


def _load_scaler(trainer: pl.Trainer, module: Classifier) -> None:
    """Give a run that goes on the scaler it had."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    state = module.state.get("scaler")
    if scaler is not None and state:
        scaler.load_state_dict(state)


class _Interruptible(pl.Callback):
    """Lets Ctrl-C and SIGTERM end a fit as KeyboardInterrupt, at once; also a context manager.

    Lightning turns Ctrl-C into SystemExit and leaves SIGINT ignored. SIGTERM it keeps for the end
    of the batch, and tells other ranks of it in the midst of whatever they exchange; before each
    batch it asks rank 0 whether there was one.
    """

    def __enter__(self) -> None:
        signals = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.getsignal(number) for number in signals}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        handler = self._handlers[signal.SIGTERM]
        if handler in (signal.SIG_DFL, None):
            handler = signal.default_int_handler
        signal.signal(signal.SIGTERM, handler)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _pass  # type: ignore[method-assign]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        # Any other SystemExit is of a network of the user's.
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None


def _pass() -> None:
    pass


def _mean(values: Sequence[Any]) -> float:
    """Of numbers, or of tensors on a device."""
    if isinstance(values[0], torch.Tensor):
        return float(torch.stack(list(values)).mean())
    return statistics.fmean(values)


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
