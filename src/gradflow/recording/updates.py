"""The optimizers whose updates are recorded, and the scale of the loss they are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradflow.recording.execution import is_inside

_OPTIMIZER = inspect.getfile(Optimizer)


class Updates:
    """One or several optimizers, or none that is known, and a GradScaler if there is one."""

    def __init__(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None):
        self.optimizers = optimizers
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._recorded = False  # since an optimizer began to step

    def watch(self, after: Callable[[Optimizer], None]) -> list[Callable[[], None]]:
        """Call `after` with the optimizer after each of its updates; returns the undoing."""

        def start(*_: Any) -> None:
            self._recorded = False

        def end(optimizer: Optimizer, *_: Any) -> None:
            self._recorded = False
            after(optimizer)

        undo: list[Callable[[], None]] = []
        for optimizer in self.optimizers:
            undo.append(optimizer.register_step_pre_hook(start).remove)
            undo.append(optimizer.register_step_post_hook(end).remove)
        return undo

    def recorded(self) -> None:
        """Note that a gradient was recorded."""
        self._recorded = bool(self.optimizers)

    @property
    def again(self) -> bool:
        """Whether the update under way has been recorded before.

        An optimizer that evaluates its closure several times makes a single update, from the first
        gradient on.
        """
        return self._recorded and is_inside("wrapper", _OPTIMIZER)  # which each `step` goes through

    def learning_rate(self, optimizer: Optimizer | None) -> Any:
        """Of the first group of this optimizer, or of the first one."""
        of = next(iter(self.optimizers), None) if optimizer is None else optimizer
        return None if of is None or not of.param_groups else of.param_groups[0].get("lr")

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """By what the loss was multiplied, on the device."""
        scale = None if self.scaler is None else self.scaler._scale  # None before its first use
        return None if scale is None else scale.to(device=device, dtype=torch.float64)

    def are_scaled(self, optimizer: Optimizer | None) -> bool:
        """Whether the gradients are known to be still those of the scaled loss.

        An optimizer that scales by itself (`fused=True`) leaves them so; without an optimizer, the
        loop is trusted to have unscaled them.
        """
        known = self.optimizers if optimizer is None else [optimizer]
        if self.scaler is None or not known:
            return False
        states = self.scaler._per_optimizer_states
        stages = [states[id(of)]["stage"].name if id(of) in states else "READY" for of in known]
        return all(stage == "READY" for stage in stages)


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The ids of what it updates."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
