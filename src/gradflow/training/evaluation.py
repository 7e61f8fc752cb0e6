"""Loss and accuracy of a network on a whole split, in evaluation mode."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional

from gradflow.data import Source

_BATCH = 256
TOP5_FROM = 11
"""Classes from which the top-5 accuracy is given: of ten, any five are right half the time."""


@torch.no_grad()
def evaluate(
    network: nn.Module, split: Source, context: contextlib.AbstractContextManager[object]
) -> dict[str, float]:
    """Mean cross-entropy `loss` and `accuracy` over all of `split`, within a precision `context`.

    With more than ten classes also `top5`: the share of images whose label is among the five
    largest logits. The network is left in the mode it was in.
    """
    training = network.training
    network.eval()
    loss, right, among = 0.0, 0, None
    with context:
        for images, labels in split.batches(_BATCH):
            logits = network(images)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
            if logits.shape[1] >= TOP5_FROM:
                five = logits.topk(5, dim=1).indices
                among = (among or 0) + int((five == labels[:, None]).sum())
    network.train(training)
    found = {"loss": loss / len(split), "accuracy": right / len(split)}
    return found if among is None else {**found, "top5": among / len(split)}
