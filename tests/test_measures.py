"""Readers of records: running accuracy, updates to an accuracy, curves over several arms."""

import math

import numpy as np
import pytest

from gradflow import schema
from gradflow.errors import GradflowError
from gradflow.measures import Imagined, best_difference, over_arms, running_accuracy, updates_to


def trained(accuracy):
    rows = {"step": range(len(accuracy)), "accuracy": np.asarray(accuracy, dtype=float)}
    return Imagined({"steps": schema.table("steps", rows)})


def test_running_accuracy_is_the_mean_of_the_last_batches():
    updates, means = running_accuracy(trained([0, 1, 1, 0]), batches=2)
    assert updates.tolist() == [2, 3, 4]
    assert means.tolist() == [0.5, 1, 0.5]


def test_updates_to_an_accuracy():
    """Eleven batches at 0, then 1: nine of ten are right after 20."""
    record = trained([0.0] * 11 + [1.0] * 20)
    assert updates_to(record, 0.9) == 20
    assert updates_to(record, 1.0) == 21
    assert math.isinf(updates_to(trained([0.5] * 30), 0.9))


def test_without_steps_there_is_no_accuracy():
    with pytest.raises(GradflowError, match="steps"):
        running_accuracy(Imagined())


def test_each_at_its_best():
    accuracies = [0.2, 0.9, 0.3, 0.5, 0.1]
    records = [Imagined(metrics={"train_accuracy": value}) for value in accuracies]
    assert best_difference(2, 3).effect(*records) == pytest.approx(0.4)
    places, values = over_arms([8, 20])(*records[:2])
    assert (places.tolist(), values.tolist()) == ([8, 20], [0.2, 0.9])
