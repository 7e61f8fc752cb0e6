"""Loss, accuracy and top-5 of a whole split, against a loop over single images."""

import contextlib
import math

import pytest
import torch
from torch import nn

from gradflow.data import Split
from gradflow.training.evaluation import evaluate


@pytest.mark.parametrize("classes", [10, 11, 40])
def test_evaluation_is_that_of_single_images(classes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 2, 3, 3, generator=generator)  # more than a batch
    labels = torch.randint(classes, (300,), generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, classes), nn.Dropout(0.5))
    loss, right, among = 0.0, 0, 0
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = network[:2](image[None])[0].tolist()
        loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
        better = sum(value > logits[label] for value in logits)
        right += better == 0
        among += better < 5
    expected = {"loss": loss / 300, "accuracy": right / 300}
    if classes > 10:
        expected["top5"] = among / 300
    found = evaluate(network, Split(images, labels), contextlib.nullcontext())
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)
    assert network.training
