"""What feeds a run: splits, batches in an order of (seed, epoch) alone, synthetic images."""

from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gradflow.data import Batches, Split, load_data
from gradflow.errors import GradflowError, SpecError
from gradflow.spec import DIGITS_TRAIN, DataSpec


def small_split(count: int = 50) -> Split:
    return Split(torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1), torch.arange(count))


def test_digits_are_a_fixed_stratified_split():
    data, again = load_data(DataSpec()), load_data(DataSpec())
    assert (len(data.train), len(data.test)) == (DIGITS_TRAIN, 360)
    assert data.shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.digest == again.digest == "b6be2810ccf76a0d"
    counts = torch.bincount(data.test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37
    assert data.train.images.mean().abs() < 1e-6
    assert data.train.images.std() == pytest.approx(1, abs=1e-3)


def test_no_test_image_is_trained_on():
    data = load_data(DataSpec())
    train = {image.numpy().tobytes() for image in data.train.images}
    shared = sum(image.numpy().tobytes() in train for image in data.test.images)
    assert shared == 0


@pytest.mark.parametrize("size", [8, 12, 32])
def test_synthetic_has_the_size_asked_for(size):
    data = load_data(DataSpec("synthetic", size=size, train=40, test=20))
    assert data.train.images.shape == (40, 3, size, size)
    assert data.test.images.shape == (20, 3, size, size)
    assert sorted(data.test.labels.bincount().tolist()) == [2] * 10


def test_synthetic_comes_from_its_seed():
    one, same, other = (load_data(DataSpec("synthetic", seed=s, train=40)) for s in (1, 1, 2))
    assert one.digest == same.digest != other.digest


def test_synthetic_is_too_hard_for_a_linear_model():
    data = load_data(DataSpec("synthetic"))
    images = data.train.images.flatten(1).numpy()
    labels = data.train.labels.numpy()
    linear = LogisticRegression(C=100, max_iter=300).fit(images, labels)
    assert linear.score(images, labels) < 0.6


def order(seed: int, epoch: int, skipped: int = 0) -> list[int]:
    batches = Batches(small_split(), batch_size=8, seed=seed)
    return [int(i) for _, _, indices in batches.epoch(epoch, skipped) for i in indices]


def test_batches_depend_on_seed_and_epoch_alone():
    first, second, third = (order(0, epoch) for epoch in range(3))
    assert first != second != third
    assert order(0, 1) == second
    assert order(1, 0) != first
    assert len(set(first)) == len(first) == 48


def test_the_stream_goes_from_epoch_to_epoch_and_starts_anywhere():
    whole = order(0, 0) + order(0, 1) + order(0, 2)
    for start in (0, 1, 5, 6, 7, 13):
        batches = Batches(small_split(), batch_size=8, start=start)
        got = [int(i) for _, _, indices in islice(batches, 18 - start) for i in indices]
        assert got == whole[8 * start :]


def test_batches_hold_the_images_of_their_indices():
    split = small_split()
    for images, labels, indices in Batches(split, batch_size=16).epoch(0):
        assert labels.tolist() == indices.tolist()
        assert images.flatten().tolist() == indices.tolist()


@pytest.mark.parametrize(("accumulate", "count"), [(1, 6), (2, 6), (4, 4), (5, 5)])
def test_an_epoch_has_a_whole_number_of_updates(accumulate, count):
    batches = Batches(small_split(), batch_size=8, accumulate=accumulate)
    assert batches.per_epoch == len(list(batches.epoch(0))) == count


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(GradflowError, match="batch_size=51, accumulate=1: there are 50"):
        Batches(small_split(), batch_size=51)


def test_files(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 10)):
        x, y = random.integers(0, 256, (count, 3, 9, 9), np.uint8), np.arange(count) % 5
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    data = load_data(DataSpec("files", root=str(tmp_path)))
    assert data.shape == (3, 9, 9)
    assert data.num_classes == 5
    assert data.train.images.mean().abs() < 1e-5


def test_files_that_cannot_be_used_are_named(tmp_path):
    spec = DataSpec("files", root=str(tmp_path))
    with pytest.raises(SpecError, match=r"has no train\.npz"):
        load_data(spec)
    with pytest.raises(SpecError, match="no such directory"):
        load_data(DataSpec("files", root=str(tmp_path / "gone")))
    good = {"x": np.zeros((4, 1, 8, 8)), "y": np.zeros(4, int)}
    np.savez(tmp_path / "train.npz", **good)
    for wrong, match in (
        ({"x": np.zeros((4, 8, 8)), "y": good["y"]}, "wants x"),
        ({"x": good["x"], "y": np.zeros(3, int)}, "wants x"),
        ({"x": good["x"], "y": np.zeros(4)}, "whole numbers"),
        ({"x": good["x"]}, "unreadable"),
        ({"x": np.zeros((4, 3, 8, 8)), "y": good["y"]}, "to train on"),
    ):
        np.savez(tmp_path / "test.npz", **wrong)
        with pytest.raises(GradflowError, match=match):
            load_data(spec)
    whole = (tmp_path / "train.npz").read_bytes()
    (tmp_path / "train.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GradflowError, match=r"train\.npz: unreadable"):
        load_data(spec)
