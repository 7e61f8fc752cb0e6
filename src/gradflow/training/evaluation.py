"""Loss and accuracy of a network on a whole split, in evaluation mode."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional

from gradflow.data import Source

_BATCH = 256


@torch.no_grad()
def evaluate(
    network: nn.Module, split: Source, context: contextlib.AbstractContextManager[object]
) -> dict[str, float]:
    """Mean cross-entropy `loss` and `accuracy` over all of `split`, within a precision `context`.

    The network is left in the mode it was in.
    """
    training = network.training
    network.eval()
    loss, right = 0.0, 0
    with context:
        for images, labels in split.batches(_BATCH):
            logits = network(images)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
    network.train(training)
    return {"loss": loss / len(split), "accuracy": right / len(split)}
