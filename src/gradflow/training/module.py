"""The LightningModule: a classifier, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradflow.seeding import derived_seed
from gradflow.spec import RunSpec

Batch = tuple[Tensor, Tensor, np.ndarray]


class Classifier(pl.LightningModule):
    """Trains a network on (images, labels, indices) with cross-entropy, as a spec says.

    Args:
        network: maps images to logits.
        spec: optimizer, schedule, seed.
        total: updates of the whole run; the schedule's length.

    Attributes:
        accuracy: share of right answers in the present update's batches, in training mode.
        consumed: called with the indices of each batch that is really trained on.
    """

    def __init__(self, network: nn.Module, spec: RunSpec, total: int):
        super().__init__()
        self.network, self.spec, self.total = network, spec, total
        self.consumed: list[np.ndarray] = []
        self.accuracy = torch.zeros(())
        self._batch: Batch | None = None
        self._place = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        self._batch, self._place = batch, batch_idx % self.spec.accumulate
        self.consumed.append(indices)
        logits = self._forward(images)
        right = (logits.detach().argmax(dim=1) == labels).float().mean() / self.spec.accumulate
        self.accuracy = right if self._place == 0 else self.accuracy + right
        return functional.cross_entropy(logits, labels)

    def _forward(self, images: Tensor) -> Tensor:
        # What a network draws at random depends on the step alone, not on what came before.
        torch.manual_seed(derived_seed("step", self.spec.seed, self.global_step, self._place))
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
        optimizer = make_optimizer(self.network, self.spec)
        scheduler = make_scheduler(optimizer, self.spec, self.total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_optimizer(network: nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    """The spec's optimizer over all parameters, weight decay on all of them (He et al. 2015)."""
    parameters = network.parameters()
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum or 0.0, weight_decay=spec.weight_decay
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.optimizer]
    return kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


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

    A warm-up of w steps rises linearly, (step + 1)/(w + 1); `step` divides by ten at each
    milestone (He et al. 2015, §4.2); `cosine` falls to 0 at `total` (Loshchilov & Hutter 2017,
    arXiv 1608.03983, eq. 5), counted from the end of the warm-up.
    """
    if step < spec.warmup:
        return (step + 1) / (spec.warmup + 1)
    if spec.schedule == "step":
        return 0.1 ** sum(step >= milestone for milestone in spec.milestones or ())
    if spec.schedule == "cosine":
        progress = (step - spec.warmup) / max(1, total - spec.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
