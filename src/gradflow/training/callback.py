"""A `Recorder` inside anyone's Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.ranks import Ranks
from gradflow.recording import Recorder
from gradflow.recording.flight import Rule
from gradflow.recording.schedules import Schedule
from gradflow.spec import ON_DIVERGENCE

if TYPE_CHECKING:
    import torch

    from gradflow.store import RunWriter

_LOOK = 64  # steps between two times that ranks on GPUs look whether the run has diverged


class GradientFlow(pl.Callback):
    """Records gradient flow while a Trainer fits: `Trainer(callbacks=[GradientFlow()])`.

    Gradients are read in `on_before_optimizer_step`: complete under accumulation, unscaled,
    reduced, not yet clipped. Under DDP what is recorded is of the whole batch, and rank 0 keeps it.

    Args:
        quantities, schedule, save, meta, flight, rule: as for `gradflow.Recorder`.
        on_divergence: `stop` ends the fit at the first step whose loss or gradient is not finite;
            `continue` goes on. Either way no update is applied at such a step, where it is
            noticed in time: each step on a CPU, at the next flush on a GPU.
        model: what to watch; by default the LightningModule itself.
        values: more numbers for the table `steps`, asked for at each step.
        repeat_forward: repeats the last forward pass, to find the module at which it diverged
            where outputs were not measured.

    Raises:
        SpecError: an `on_divergence` that there is not.

    Attributes:
        recorder: the `Recorder`, from the start of the fit on; its tables stay readable after it.
    """

    recorder: Recorder

    def __init__(
        self,
        quantities: str | Iterable[str] = "default",
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        save: str | Path | RunWriter | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        flight: int | None = None,
        rule: Rule | None = None,
        on_divergence: str = "stop",
        model: nn.Module | None = None,
        values: Callable[[], Mapping[str, Tensor | float]] | None = None,
        repeat_forward: Callable[[], None] | None = None,
    ):
        if on_divergence not in ON_DIVERGENCE:
            allowed = ", ".join(ON_DIVERGENCE)
            raise SpecError(f"on_divergence={on_divergence}: allowed is {allowed}")
        self._options: dict[str, Any] = {
            "quantities": quantities, "schedule": schedule, "save": save, "meta": meta,
            "flight": flight, "rule": rule,
        }  # fmt: skip
        self._on_divergence, self._model = on_divergence, model
        self._values, self._repeat_forward = values, repeat_forward
        self._loss: Tensor | float = 0.0
        self._open = self._noticed = False
        self._state: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recorder = Recorder(
            self._model or pl_module,
            optimizer=trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            ranks=_ranks(trainer),
            **self._options,
        )
        if self._state is not None:
            self.recorder.load_state_dict(self._state)
        self.recorder.__enter__()
        self._loss, self._open = 0.0, True
        self._noticed = self.recorder.divergence is not None

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one Trainer apart: by the class of the model they watch."""
        return self._generate_state_key(model=type(self._model).__name__)

    def state_dict(self) -> dict[str, Any]:
        """The recorder's place, so that a Trainer that goes on from a checkpoint numbers on."""
        if not hasattr(self, "recorder"):  # a checkpoint without a fit
            return dict(self._state or {})
        self.recorder.flush()
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` at the next fit."""
        self._state = state_dict or None

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # Lightning has divided by the number of accumulated batches, and scaled for fp16.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach()
        self._loss = self._loss + (loss / scaler.scale(loss.new_ones(())) if scaler else loss)

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        loss, self._loss = self._loss, 0.0
        values = self._values() if self._values is not None else {}
        several = len(trainer.optimizers) > 1
        finite = self.recorder.step(loss, optimizer=optimizer if several else None, **values)
        if not finite:
            # An optimizer passes over parameters without gradient: nothing is updated.
            optimizer.zero_grad(set_to_none=True)
        if not self._noticed and self._diverged(trainer):
            self._noticed = True
            self._locate()
            trainer.should_stop = trainer.should_stop or self._on_divergence == "stop"

    def _diverged(self, trainer: pl.Trainer) -> bool:
        """Whether a divergence is known: on all ranks from the same step on.

        All see the same numbers: on CPUs at once, on GPUs at a flush, for which each has its times.
        """
        if _ranks(trainer).world > 1 and trainer.strategy.root_device.type != "cpu":
            if self.recorder.next_step % _LOOK:
                return False
            self.recorder.flush()
        return self.recorder.divergence is not None

    def _locate(self) -> None:
        found = self.recorder.divergence
        assert found is not None
        latest = found.step == self.recorder.next_step - 1
        if self._repeat_forward is None or found.quantity.endswith("_rms") or not latest:
            return
        layer = self.recorder.locate_forward(self._repeat_forward)
        if layer is not None:
            self.recorder.divergence = replace(found, layer=layer, quantity="output_rms")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close(exception)

    def _close(self, error: BaseException | None) -> None:
        if self._open:
            self._open = False
            self.recorder.__exit__(type(error) if error else None, error, None)


def _ranks(trainer: pl.Trainer) -> Ranks:
    """The ranks that share a batch. Where they share the parameters too, each is on its own."""
    if type(trainer.strategy) is DDPStrategy:
        return Ranks(trainer.global_rank, trainer.world_size)
    return Ranks()
