"""What feeds a run: splits, batches in an order of (seed, epoch) alone, synthetic images."""

import importlib.util
import os
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gradflow.augmentation import crop_and_flip, draw
from gradflow.data import Batches, Scale, Split, chosen, load_data
from gradflow.errors import GradflowError, SpecError
from gradflow.ranks import Ranks
from gradflow.seeding import derived_seed
from gradflow.spec import DIGITS_TRAIN, PUBLIC, DataSpec


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
    one_nan, some_inf = ({"x": good["x"].copy(), "y": good["y"]} for _ in range(2))
    one_nan["x"][3, 0, 4, 4] = some_inf["x"][0, 0, 0, 0] = np.nan
    some_inf["x"][2] = -np.inf
    for wrong, match in (
        ({"x": np.zeros((4, 8, 8)), "y": good["y"]}, "wants x"),
        ({"x": good["x"], "y": np.zeros(3, int)}, "wants x"),
        ({"x": good["x"], "y": np.zeros(4)}, "whole numbers"),
        ({"x": good["x"], "y": np.array([0, 1, 2, 10**12])}, "whole numbers from 0 to 999,999$"),
        ({"x": good["x"]}, "unreadable"),
        (one_nan, "test.npz: x has 1 value that is not finite$"),
        (some_inf, "test.npz: x has 65 values that are not finite$"),
        ({"x": np.full((4, 1, 8, 8), "a"), "y": good["y"]}, "wants x of numbers, has <U1$"),
        ({"x": np.zeros((4, 3, 8, 8)), "y": good["y"]}, "to train on"),
    ):
        np.savez(tmp_path / "test.npz", **wrong)
        with pytest.raises(GradflowError, match=match):
            load_data(spec)
    whole = (tmp_path / "train.npz").read_bytes()
    (tmp_path / "train.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GradflowError, match=r"train\.npz: unreadable"):
        load_data(spec)
    (tmp_path / "train.npz").write_text("0 1 2\n")
    with pytest.raises(GradflowError, match=r"train\.npz: is no \.npz file$"):
        load_data(spec)


# --- bytes, cropped, flipped and scaled as they are read ------------------------------------------


def byte_split(count: int = 60, *, augment: bool = True) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
    images[:, 2] //= 4  # a dark channel
    return Split(images, torch.arange(count), Scale.of(images), augment)


def stream(count: int, split: Split | None = None, **keys) -> list[torch.Tensor]:
    split = (split or byte_split()).to(torch.device("cpu"), torch.float32)
    batches = Batches(split, **{"batch_size": 12, "accumulate": 2} | keys)
    return [images for images, _, _ in islice(batches, count)]


def test_the_scale_is_of_each_channel_and_exact():
    images = byte_split().images
    scale = Scale.of(images)
    slow = images.double() / 255
    mean, deviation = slow.mean((0, 2, 3)), slow.std((0, 2, 3), correction=0)
    assert torch.allclose(scale.mean.flatten(), mean, rtol=1e-14)
    assert torch.allclose(scale.deviation.flatten(), deviation, rtol=1e-13)
    assert scale.mean[2] < 0.15 < 0.45 < scale.mean[0]
    same = Scale.of(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8))
    assert same(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8)).item() == 0
    assert same.deviation.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_stay_bytes_and_come_out_scaled(dtype):
    split = byte_split().to(torch.device("cpu"), dtype)
    assert split.images.dtype == torch.uint8
    assert split.images.nbytes == 60 * 3 * 8 * 8
    whole = torch.cat([images for images, _ in split.batches(32)])
    assert whole.dtype == dtype
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(3, dtype=dtype), atol=1e-6)
    assert torch.allclose(whole.std((0, 2, 3), correction=0), torch.ones(3, dtype=dtype))


def test_only_images_that_are_trained_on_are_cropped_and_flipped():
    split = byte_split()
    plain = byte_split(augment=False)
    for (got, labels), (expected, _) in zip(split.batches(25), plain.batches(25), strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got, split.scale(split.images[labels]))
    for got, expected in zip(stream(5), stream(5, plain), strict=True):
        assert not torch.equal(got, expected)


def test_a_training_batch_is_cropped_scaled_and_of_its_indices():
    split = byte_split()
    batches = Batches(split, batch_size=12, accumulate=2, seed=5)
    for number, (images, labels, indices) in enumerate(islice(batches, 9)):
        update, place = divmod(number, 2)
        drawn = draw(12, derived_seed("augment", 5, update, place))
        assert torch.equal(images, split.scale(crop_and_flip(split.images[indices], drawn)))
        assert labels.tolist() == indices.tolist()


def test_crops_depend_on_seed_update_and_place_alone():
    """Both arms of a pair, a run that goes on, and the ranks of a shared one see the same."""
    whole = stream(11)
    assert all(torch.equal(a, b) for a, b in zip(whole, stream(11), strict=True))
    for start in (0, 1, 3, 4, 7):  # four batches an epoch, as there are two an update
        rest = stream(11 - start, start=start)
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    shares = [stream(11, ranks=Ranks(rank, world=3, devices=3)) for rank in range(3)]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat(parts), expected)
    assert not torch.equal(whole[0], stream(1, seed=1)[0])


def test_a_choice_of_images_is_fixed_and_grows():
    small, large = chosen(1000, 10, "train"), chosen(1000, 500, "train")
    assert set(small.tolist()) < set(large.tolist())
    assert large.tolist() == sorted(set(large.tolist()))
    assert 200 < (large < 500).sum() < 300
    assert chosen(7, None, "train").tolist() == list(range(7))
    with pytest.raises(GradflowError, match=r"data\.test=8: there are 7 images"):
        chosen(7, 8, "test")


# --- without a torchvision that works -------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLIC, "imagefolder"])
def test_a_missing_torchvision_is_a_line_with_the_command_that_helps(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torchvision" else real(n, *a)
    )
    spec = DataSpec(name, root="somewhere")
    line = rf'data={name}: torchvision is missing: pip install "gradflow-harness\[vision\]"$'
    with pytest.raises(SpecError, match=line):
        spec.check_files()
    with pytest.raises(GradflowError, match=line):
        load_data(spec)


def test_a_torchvision_that_does_not_go_with_torch_is_a_line(tmp_path, command):
    """As one that was built for another torch: it fails when it is imported, with RuntimeError."""
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command("-m", "gradflow", "data=cifar10", "data.root=.", "max_steps=0", PYTHONPATH=path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"gradflow: data=cifar10: torchvision does not import beside torch {torch.__version__} "
        "(operator torchvision::nms does not exist); pip install"
    )


@pytest.mark.parametrize("name", [*PUBLIC, "imagefolder"])
def test_a_missing_directory_is_a_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    helps = "" if name == "imagefolder" else f"; to fetch it: python -m gradflow data={name} "
    for root, problem in ((tmp_path / "gone", "no such directory"), (tmp_path, "has no ")):
        with pytest.raises(SpecError) as caught:
            DataSpec(name, root=str(root)).check_files()
        assert str(caught.value).startswith(f"data.root={root}: {problem}")
        assert helps in str(caught.value)
        assert "\n" not in str(caught.value)
