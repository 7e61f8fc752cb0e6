"""The LightningModule: a classifier, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradflow.data import Batch, seed_step
from gradflow.spec import RunSpec


class Classifier(pl.LightningModule):
    """Trains a network on (images, labels, indices) with cross-entropy, as a spec says.

    Args:
        network: maps images to logits.
        spec: optimizer, schedule, seed.
        total: updates of the whole run; the schedule's length.
        start: updates made before, by a run that is gone on with.

    Attributes:
        loss, accuracy: means over the present update's batches so far, in training mode.
        consumed: indices of each batch that was really trained on, until they are taken.
        optimizer, scheduler: from the start of the fit on.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, network: nn.Module, spec: RunSpec, total: int, start: int = 0):
        super().__init__()
        self.network, self.spec, self.total, self.start = network, spec, total, start
        self.state: dict[str, Any] = {}
        self.consumed: list[np.ndarray] = []
        self.loss, self.accuracy = torch.zeros(()), torch.zeros(())
        self._batch: Batch | None = None
        self._place = 0

    @property
    def updates(self) -> int:
        """Updates made in the whole run so far."""
        return self.start + int(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        self._batch, self._place = batch, batch_idx % self.spec.accumulate
        self.consumed.append(indices)
        logits = self._forward(images)
        loss = functional.cross_entropy(logits, labels)
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        seen = loss.detach() / self.spec.accumulate, right / self.spec.accumulate
        if self._place:
            seen = self.loss + seen[0], self.accuracy + seen[1]
        self.loss, self.accuracy = seen
        return loss

    def _forward(self, images: Tensor) -> Tensor:
        seed_step(self.spec.seed, self.updates, self._place)
        return self.network(images)

    def repeat_forward(self) -> None:
        """The last batch's forward pass once more; the network's buffers stay as they were."""
        assert self._batch is not None
        kept = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        with self.trainer.precision_plugin.forward_context():
            self._forward(self._batch[0])
        for buffer, before in kept:
            buffer.copy_(before)

    def configure_optimizers(self) -> Any:
        self.optimizer = make_optimizer(self.network, self.spec)
        self.scheduler = make_scheduler(self.optimizer, self.spec, self.total)
        if self.state:
            self.optimizer.load_state_dict(self.state["optimizer"])
            self.scheduler.load_state_dict(self.state["scheduler"])
        return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]


def make_optimizer(network: nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    """The spec's optimizer over all parameters, weight decay on all of them (He et al. 2015)."""
    parameters = list(network.parameters())
    options: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    # On CPUs PyTorch goes through the parameters one by one unless told otherwise. Fused kernels
    # want the same gradients there in every step, dense and in their parameters' layout, which
    # others' networks need not have; and under mixed precision Lightning does not clip with them.
    if parameters[0].device.type == "cpu" and spec.precision in ("fp32", "fp64"):
        options["fused"] = spec.network.name != "custom"
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=spec.momentum or 0.0, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
    return kind(parameters, **options)


def make_scheduler(
    optimizer: torch.optim.Optimizer, spec: RunSpec, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate by step. One-cycle (Smith & Topin 2017, arXiv 1708.07120): up from lr/25
    over the first 30 % of the steps, down to nearly 0, cosine-shaped, momentum constant."""
    if spec.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=spec.lr, total_steps=total, cycle_momentum=False
        )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, spec, total))


def rate(step: int, spec: RunSpec, total: int) -> float:
    """The learning rate of constant, step and cosine schedules at a step, over `spec.lr`.

    A warm-up of w steps rises linearly, (step + 1)/(w + 1), or stays at `warmup_lr` (He et al.
    2015, §4.2, of 110 layers); `step` divides by ten at each milestone (the same); `cosine` falls
    to 0 at `total` (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5), counted from the end of the
    warm-up.
    """
    if step < spec.warmup and spec.warmup_lr is not None:
        return spec.warmup_lr / spec.lr
    if step < spec.warmup:
        return (step + 1) / (spec.warmup + 1)
    if spec.schedule == "step":
        return 0.1 ** sum(step >= milestone for milestone in spec.milestones or ())
    if spec.schedule == "cosine":
        progress = (step - spec.warmup) / max(1, total - spec.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
