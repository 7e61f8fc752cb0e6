"""Public sets through torchvision: the whole of Fashion-MNIST, and archives in each format."""

import pickle
import struct
from itertools import islice
from pathlib import Path

import formats
import numpy as np
import pytest
import torch

from gradflow.augmentation import PAD, crop_and_flip, draw
from gradflow.data import Batches, load_data
from gradflow.errors import GradflowError, SpecError
from gradflow.spec import PUBLIC, DataSpec

pytestmark = pytest.mark.vision


def spec_of(name: str, root: Path, **keys) -> DataSpec:
    return DataSpec(name, root=str(root), **keys)


# --- the whole of Fashion-MNIST -------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(fashion):
    return load_data(spec_of("fashion_mnist", fashion, augment=True))


def test_fashion_mnist_is_whole(data):
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.shape == (1, 28, 28)
    assert data.num_classes == 10
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.digest == "ece172613115fb18"
    assert data.train.scale.mean.item() == pytest.approx(0.2860, abs=5e-5)
    assert data.train.scale.deviation.item() == pytest.approx(0.3530, abs=5e-5)


def test_it_lies_in_memory_as_bytes(data):
    placed = data.to(torch.device("cpu"), torch.float32)
    for split in (data.train, placed.train, placed.test):
        assert split.images.dtype == torch.uint8
        assert split.images.nbytes == len(split) * 784
    assert placed.train.images.is_contiguous(memory_format=torch.channels_last)
    images, labels, indices = next(iter(Batches(placed.train, batch_size=128)))
    assert images.dtype == torch.float32
    assert labels.tolist() == data.train.labels[indices].tolist()


def test_it_comes_out_with_mean_0_and_deviation_1(data):
    placed = data.to(torch.device("cpu"), torch.float32)
    total = torch.zeros(2, dtype=torch.float64)
    for images, _ in placed.train.batches(1000):
        total += torch.stack([images.double().sum(), images.double().square().sum()])
    mean, square = total / (60_000 * 784)
    assert mean.abs() < 1e-6
    assert square == pytest.approx(1, abs=1e-6)


def test_it_is_scaled_as_torchvision_does(data):
    from torchvision.transforms import Compose, Normalize, ToTensor

    mean, deviation = data.train.scale.mean.item(), data.train.scale.deviation.item()
    theirs = Compose([ToTensor(), Normalize([mean], [deviation])])
    placed = data.to(torch.device("cpu"), torch.float32)
    images, labels = next(placed.test.batches(200))
    expected = [theirs(image.numpy().transpose(1, 2, 0)) for image in data.test.images[:200]]
    assert torch.equal(images, torch.stack(expected))
    assert labels.tolist() == data.test.labels[:200].tolist()


def test_it_is_cropped_and_flipped_as_torchvision_does_image_by_image(data):
    from torchvision.transforms import functional

    images, draws = data.train.images[:100], draw(100, seed=0)
    got = crop_and_flip(images, draws)
    for number, image in enumerate(images):
        row, column = int(draws.rows[number]), int(draws.columns[number])
        expected = functional.crop(functional.pad(image, [PAD]), row, column, 28, 28)
        if draws.flipped[number]:
            expected = functional.hflip(expected)
        assert torch.equal(got[number], expected)


def test_a_part_of_it_is_a_fixed_choice(fashion, data):
    part = load_data(spec_of("fashion_mnist", fashion, train=5000, test=1000))
    again = load_data(spec_of("fashion_mnist", fashion, train=5000, test=1000))
    assert (len(part.train), len(part.test)) == (5000, 1000)
    assert part.digest == again.digest != data.digest
    counts = part.train.labels.bincount()
    assert 420 < counts.min() <= counts.max() < 580  # 500 ± 4 deviations of 21
    with pytest.raises(GradflowError, match=r"data\.train=60001: there are 60000 images"):
        load_data(spec_of("fashion_mnist", fashion, train=60_001))


def test_it_is_averaged_to_a_smaller_size(fashion, data):
    small = load_data(spec_of("fashion_mnist", fashion, size=14))
    assert small.shape == (1, 14, 14)
    assert small.train.images.dtype == torch.uint8
    squares = data.test.images[:500].double().unflatten(2, (14, 2)).unflatten(4, (14, 2))
    assert torch.equal(small.test.images[:500], squares.mean((3, 5)).round().byte())
    assert small.train.scale.mean.item() == pytest.approx(0.2860, abs=1e-4)


# --- every format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_what_was_written_is_read(tmp_path, name):
    written = formats.write(name, tmp_path)
    data = load_data(spec_of(name, tmp_path))
    for split, (images, labels) in zip((data.train, data.test), written, strict=True):
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images.numpy(), images)
        assert split.labels.dtype == torch.int64
        assert np.array_equal(split.labels.numpy(), labels)
    assert data.num_classes == formats.CLASSES[name]
    assert data.train.labels.bincount().tolist() == [200 // data.num_classes] * data.num_classes
    pixels = written[0][0] / 255
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    assert data.train.scale.mean.flatten().tolist() == pytest.approx(mean.tolist(), rel=1e-12)
    assert data.train.scale.deviation.flatten().tolist() == pytest.approx(
        deviation.tolist(), rel=1e-12
    )
    assert data.test.scale is data.train.scale
    batch, _, indices = next(iter(Batches(data.train, batch_size=50)))
    expected = (written[0][0][indices] / 255 - mean[:, None, None]) / deviation[:, None, None]
    assert np.allclose(batch.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", PUBLIC)
def test_both_arms_see_the_same_images(tmp_path, name):
    formats.write(name, tmp_path)
    arms = [load_data(spec_of(name, tmp_path, augment=True)).train for _ in range(2)]
    batches = [islice(Batches(arm, batch_size=30, seed=3), 15) for arm in arms]
    for (images, labels, indices), (others, other_labels, other_indices) in zip(
        *batches, strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
        assert np.array_equal(indices, other_indices)


# --- what is missing or damaged -------------------------------------------------------------------


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def overwrite(start: bytes):
    return lambda path: path.write_bytes(start + path.read_bytes()[len(start) :])


def without(key: str):
    def change(path: Path) -> None:
        entry = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({k: v for k, v in entry.items() if k != key}))

    return change


def relabel(path: Path) -> None:
    entry = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(entry | {"labels": [10] * len(entry["labels"])}))


DAMAGES = [
    ("mnist", "MNIST/raw/train-images-idx3-ubyte", cut, "damaged"),
    ("mnist", "MNIST/raw/train-labels-idx1-ubyte", cut, "damaged"),
    ("mnist", "MNIST/raw/t10k-images-idx3-ubyte", overwrite(b"\x1f\x8b\x08\x00"), "not in its"),
    ("mnist", "MNIST/raw/t10k-images-idx3-ubyte", overwrite(struct.pack(">i", 0x801)), "damaged"),
    ("mnist", "MNIST/raw/t10k-images-idx3-ubyte", overwrite(struct.pack(">i", 0xA03)), "damaged"),
    ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", overwrite(struct.pack(">i", 0x803)), "damaged"),
    ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", Path.unlink, "no such file"),
    ("fashion_mnist", "FashionMNIST/raw/t10k-images-idx3-ubyte", lambda p: p.write_bytes(b""),
     "damaged"),
    ("cifar10", "cifar-10-batches-py/data_batch_3", cut, "damaged"),
    ("cifar10", "cifar-10-batches-py/data_batch_5", without("data"), "has no 'data'"),
    ("cifar10", "cifar-10-batches-py/data_batch_4", relabel, "wants labels from 0 to 9"),
    ("cifar10", "cifar-10-batches-py/test_batch", without("labels"), "has no"),
    ("cifar10", "cifar-10-batches-py/test_batch", Path.unlink, "no such file"),
    ("cifar100", "cifar-100-python/train", without("fine_labels"), "has no 'fine_labels'"),
    ("cifar100", "cifar-100-python/test", lambda p: p.write_bytes(b"no pickle"), "damaged"),
    ("svhn", "train_32x32.mat", cut, "damaged"),
    ("svhn", "test_32x32.mat", lambda p: p.write_bytes(b"MATLAB"), "damaged"),
    ("svhn", "test_32x32.mat", Path.unlink, "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "damage", "said"), DAMAGES)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, file, damage, said):
    formats.write(name, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(GradflowError) as caught:
        load_data(spec_of(name, tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / file}: ")
    assert said in message
    assert "\n" not in message
    assert message.endswith(
        f"python -m gradflow data={name} data.root={tmp_path} data.download=true"
    )


def test_images_of_another_size_are_the_fault_of_their_own_file(tmp_path):
    formats.write("mnist", tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">iiii", 0x803, 5, 27, 27) + bytes(5 * 27 * 27))
    with pytest.raises(GradflowError) as caught:
        load_data(spec_of("mnist", tmp_path))
    wrong = "damaged (wants images [1, 28, 28] in bytes, has [1, 27, 27]); delete it"
    assert str(caught.value).startswith(f"{path}: {wrong}")


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    formats.write("mnist", tmp_path)
    path = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">ii", 0x801, 5) + bytes(5))
    with pytest.raises(GradflowError, match=r"wants as many labels as images, 200, has \[5\]"):
        load_data(spec_of("mnist", tmp_path))


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_not_there_is_one_line(tmp_path, name):
    with pytest.raises(SpecError, match=f"has no .*; to fetch it: .*data={name} data.root="):
        load_data(spec_of(name, tmp_path))


# --- fetching, without a network ------------------------------------------------------------------


def test_nothing_is_fetched_but_on_the_users_word(tmp_path, monkeypatch):
    from torchvision import datasets

    fetched = []

    def fetch(self):
        if not fetched:
            formats.write("mnist", tmp_path)
        fetched.append(self.train)

    monkeypatch.setattr(datasets.MNIST, "download", fetch)
    with pytest.raises(SpecError, match="has no MNIST/raw"):
        load_data(spec_of("mnist", tmp_path))
    assert fetched == []
    data = load_data(spec_of("mnist", tmp_path, download=True))
    assert fetched == [True, False]
    assert data.digest == load_data(spec_of("mnist", tmp_path)).digest
    assert fetched == [True, False]


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    def fetch(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried here, and there")

    monkeypatch.setattr(datasets.FashionMNIST, "download", fetch)
    message = (
        r"^data=fashion_mnist: not fetched \(Error downloading train-images-idx3-ubyte\.gz:\)$"
    )
    with pytest.raises(GradflowError, match=message):
        load_data(spec_of("fashion_mnist", tmp_path, download=True))
