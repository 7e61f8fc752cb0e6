"""What feeds a run: data sets in memory on the training device, or streamed, and their batches.

Batches are cut from tensors on the device, without worker processes (but for data=imagefolder, see
`folder`). Their order depends on (seed, epoch) alone, and how their images are cropped and flipped
on (seed, update, place), so that both arms of a matched pair see the same batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gradflow.augmentation import crop_and_flip, draw
from gradflow.errors import GradflowError
from gradflow.ranks import Ranks
from gradflow.seeding import derived_seed
from gradflow.spec import PUBLIC, DataSpec

Batch = tuple[Tensor, Tensor, np.ndarray]
"""Images [n, channels, height, width], labels [n], and the batch's indices in the split: n, or
of several ranks the whole batch's."""

MOST_CLASSES = 10**6
"""Of `data=files`, which has as many as its largest label says."""
_TEMPLATE, _NOISE = 3, 0.5


class Pick(NamedTuple):
    """A training batch that is still to be read.

    Attributes:
        indices: of the whole batch in the split.
        share: which of them are this rank's.
        seed: what the batch's crops and flips are drawn from.
    """

    indices: Tensor
    share: slice
    seed: int


class Source(Protocol):
    """A split that batches are read from: `Split` in memory, `folder.FolderSplit` from files."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Source:
        """The same split with images that come on a device, in a number format."""

    def stream(self, picks: Iterable[Pick]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of a rank's share of each batch, to train on."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and labels in their order, neither cropped nor flipped at random."""


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of each channel [channels, 1, 1], of pixels from 0 to 1."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Scale:
        """Those of all pixels of images in bytes; exact, from counts of the 256 values."""
        values = torch.arange(256, dtype=torch.float64) / 255
        channels = images.transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
        shares = counts.double() / channels.shape[1]
        mean = (shares * values).sum(dim=1)
        deviation = (shares * (values - mean[:, None]).square()).sum(dim=1).sqrt()
        deviation[deviation == 0] = 1.0
        return cls(mean[:, None, None], deviation[:, None, None])

    def to(self, device: torch.device, dtype: torch.dtype) -> Scale:
        return Scale(self.mean.to(device, dtype), self.deviation.to(device, dtype))

    def __call__(self, images: Tensor) -> Tensor:
        """Numbers of mean 0 and deviation 1, of bytes."""
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.deviation)


@dataclass(frozen=True)
class Split:
    """Images [n, channels, height, width] and labels [n] (int64) in memory.

    Images are floats as a network takes them; or bytes, four times as many in the same memory,
    which become such floats batch by batch by `scale`.

    Args:
        augment: crop and flip bytes that are trained on.
    """

    images: Tensor
    labels: Tensor
    scale: Scale | None = None
    augment: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Images in channels-last layout, which the convolutions of CPUs and GPUs prefer."""
        stored = dtype if self.scale is None else torch.uint8
        scale = None if self.scale is None else self.scale.to(device, dtype)
        images = self.images.to(device, stored, memory_format=torch.channels_last)
        return replace(self, images=images, labels=self.labels.to(device), scale=scale)

    def stream(self, picks: Iterable[Pick]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of a rank's share of each batch, to train on."""
        for pick in picks:
            there = pick.indices[pick.share].to(self.labels.device)
            images = self.images[there]
            if self.augment:
                images = crop_and_flip(images, draw(len(pick.indices), pick.seed)[pick.share])
            yield self._scaled(images), self.labels[there]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and labels in their order, neither cropped nor flipped."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self._scaled(self.images[part]), self.labels[part]

    def _scaled(self, images: Tensor) -> Tensor:
        return images if self.scale is None else self.scale(images)


@dataclass(frozen=True)
class Data:
    """A training and a test split, standardised by the training split's mean and deviation (of
    data=imagefolder, by ImageNet's).

    `digest` is a SHA-256 over both as they were loaded, the same on any device and in any format;
    of data=imagefolder, over names and sizes of files.
    """

    train: Source
    test: Source
    num_classes: int
    digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.train.shape

    def inputs(self, network: str) -> int:
        """What a network of that name counts as its inputs: an mlp values, others channels."""
        return math.prod(self.shape) if network == "mlp" else self.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Data:
        """The same data on a device, images in the given number format."""
        return replace(self, train=self.train.to(device, dtype), test=self.test.to(device, dtype))


def load_data(spec: DataSpec) -> Data:
    """The data that a spec names, on the CPU.

    Raises:
        GradflowError: files that are missing or do not hold images and labels.
    """
    if spec.name == "imagefolder":
        from gradflow.folder import load_folder

        return load_folder(spec)
    if spec.name in PUBLIC:
        return _public(spec)
    make = {
        "digits": _digits,
        "synthetic": _synthetic,
        "gaussian": _gaussian,
        "files": _files,
    }[spec.name]
    (train_x, train_y), (test_x, test_y) = make(spec)
    mean, deviation = train_x.mean(), train_x.std()
    scale = deviation if deviation > 0 else 1.0

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        standard = ((images - mean) / scale).astype(np.float32)
        return Split(torch.from_numpy(standard), torch.from_numpy(labels.astype(np.int64)))

    classes = int(max(train_y.max(), test_y.max())) + 1
    train, test = split(train_x, train_y), split(test_x, test_y)
    return Data(train, test, max(classes, 2), _digest(train, test))


def _digest(*splits: Split) -> str:
    state = hashlib.sha256()
    for split in splits:
        state.update(split.images.numpy().tobytes())
        state.update(split.labels.numpy().tobytes())
    return state.hexdigest()[:16]


def _public(spec: DataSpec) -> Data:
    from gradflow import vision

    spec.check_files()
    train, test, classes = vision.read(spec)

    def part(found: vision.Bytes, count: int | None, key: str) -> vision.Bytes:
        where = chosen(len(found[1]), count, key)
        return _averaged(found[0][where].contiguous(), spec.size), found[1][where]

    train, test = part(train, spec.train, "train"), part(test, spec.test, "test")
    scale = Scale.of(train[0])
    splits = Split(*train, scale, augment=bool(spec.augment)), Split(*test, scale)
    return Data(*splits, classes, _digest(*splits))


def _averaged(images: Tensor, size: int | None) -> Tensor:
    """Bytes of that height and width, each the rounded mean of a square of pixels."""
    if size is None:
        return images
    parts = []
    for part in images.split(1000):  # as floats, all would take four times their memory
        parts.append(functional.avg_pool2d(part.float(), images.shape[2] // size).round().byte())
    return torch.cat(parts)


def chosen(size: int, count: int | None, key: str) -> Tensor:
    """Which images are taken where `data.train` or `data.test` asks for `count` of `size`.

    Drawn once and for all, and a larger choice has all images of a smaller one.
    """
    if count is None:
        return torch.arange(size)
    if count > size:
        raise GradflowError(f"data.{key}={count}: there are {size} images")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(key)))
    return order[:count].sort().values


_Arrays = tuple[np.ndarray, np.ndarray]


def _digits(spec: DataSpec) -> tuple[_Arrays, _Arrays]:
    """scikit-learn's 1,797 handwritten digits of 8×8; a fixed stratified split, 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return (train_x, train_y), (test_x, test_y)


def _synthetic(spec: DataSpec) -> tuple[_Arrays, _Arrays]:
    """Ten 3×3×3 templates of RMS 1, one pasted per image at a random place with a random sign.

    Gaussian noise of .5 lies over the whole image. The random sign and place leave a linear model
    little to go by; a convolution finds the template.
    """
    seed, size, train, test = (v or 0 for v in (spec.seed, spec.size, spec.train, spec.test))
    random = np.random.default_rng(derived_seed("synthetic", seed))
    templates = random.standard_normal((10, 3, _TEMPLATE, _TEMPLATE))
    templates /= np.sqrt(np.mean(templates**2, axis=(1, 2, 3), keepdims=True))

    def draw(count: int) -> _Arrays:
        labels = np.arange(count) % 10
        images = _NOISE * random.standard_normal((count, 3, size, size))
        rows, columns = random.integers(0, size - _TEMPLATE + 1, (2, count))
        signs = random.choice([-1.0, 1.0], count)
        for image, label, row, column, sign in zip(
            images, labels, rows, columns, signs, strict=True
        ):
            patch = (slice(None), slice(row, row + _TEMPLATE), slice(column, column + _TEMPLATE))
            image[patch] += sign * templates[label]
        return images, labels

    return draw(train), draw(test)


def _gaussian(spec: DataSpec) -> tuple[_Arrays, _Arrays]:
    """Independent standard normal pixels and random labels of ten classes.

    What mean-field theory assumes of inputs: any two are orthogonal but for 1/√(values an image).
    """
    channels, size = spec.channels or 0, spec.size or 0
    random = np.random.default_rng(derived_seed("gaussian", spec.seed or 0))

    def draw(count: int) -> _Arrays:
        images = random.standard_normal((count, channels, size, size))
        return images, random.integers(0, 10, count)

    return draw(spec.train or 0), draw(spec.test or 0)


def _files(spec: DataSpec) -> tuple[_Arrays, _Arrays]:
    """`train.npz` and `test.npz` in a directory: x [n, channels, height, width], y [n] ints."""
    assert spec.root is not None
    spec.check_files()
    train, test = (_read_npz(Path(spec.root) / f"{name}.npz") for name in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise GradflowError(
            f"data.root={spec.root}: images of {train[0].shape[1:]} to train on, "
            f"of {test[0].shape[1:]} to test on"
        )
    return train, test


def _read_npz(path: Path) -> _Arrays:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(2) != b"PK":  # how a zip file begins, be it whole or not
            raise GradflowError(f"{path}: is no .npz file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            images, labels = content["x"], content["y"]
    except Exception as error:  # a damaged archive raises whatever zipfile finds first
        raise GradflowError(f"{path}: unreadable ({error})") from None
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise GradflowError(
            f"{path}: wants x [n, channels, height, width] and y [n], "
            f"has {images.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise GradflowError(f"{path}: wants y of whole numbers from 0 to {MOST_CLASSES - 1:,}")
    if images.dtype.kind not in "biuf":
        raise GradflowError(f"{path}: wants x of numbers, has {images.dtype}")
    wrong = int((~np.isfinite(images)).sum())
    if wrong:
        are = "value that is" if wrong == 1 else "values that are"
        raise GradflowError(f"{path}: x has {wrong} {are} not finite")
    return images.astype(np.float64), labels


def seed_step(seed: int, update: int, place: int) -> None:
    """Seed torch for one batch: what a network draws depends on no more than seed, update, place.

    Args:
        place: the batch's among those accumulated for the update.
    """
    value = derived_seed("step", seed, update, place)
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # the same, without keeping a stack trace for each accelerator that might come: 1 ms
        torch.default_generator.manual_seed(value)


def consumed_digest(before: str, indices: np.ndarray) -> str:
    """Digest of all batches consumed so far, from that before this batch and this batch's indices.

    A chain, so that a run that goes on from a checkpoint needs no more than the last link.
    """
    return hashlib.sha256(before.encode() + indices.astype("<i8").tobytes()).hexdigest()[:16]


class Batches:
    """Training batches (images, labels, indices), epoch after epoch without end.

    Args:
        split: where the batches are cut from.
        batch_size: images a batch; a last, partial batch is dropped.
        accumulate: batches an update; an epoch has a whole number of updates.
        seed: with the epoch's number decides the order.
        start: how many batches of the stream to pass over, as a run that goes on does.
        ranks: whose share of each batch to give out, where several train on it together.

    Attributes:
        per_epoch: batches of one epoch.
    """

    def __init__(
        self,
        split: Source,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        start: int = 0,
        ranks: Ranks | None = None,
    ):
        self._share, self._accumulate = (ranks or Ranks()).share(batch_size), accumulate
        self.split, self.batch_size, self.seed, self.start = split, batch_size, seed, start
        self.per_epoch = len(split) // (batch_size * accumulate) * accumulate
        if not self.per_epoch:
            raise GradflowError(
                f"batch_size={batch_size}, accumulate={accumulate}: "
                f"there are {len(split)} training images"
            )

    def __iter__(self) -> Iterator[Batch]:
        first, skipped = divmod(self.start, self.per_epoch)
        later = (pick for number in itertools.count(first + 1) for pick in self._picks(number))
        yield from self._read(itertools.chain(self._picks(first, skipped), later))

    def epoch(self, number: int, skipped: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without its first `skipped`."""
        yield from self._read(self._picks(number, skipped))

    def _picks(self, number: int, skipped: int = 0) -> Iterator[Pick]:
        generator = torch.Generator().manual_seed(derived_seed("batches", self.seed, number))
        order = torch.randperm(len(self.split), generator=generator)
        for place in range(skipped, self.per_epoch):
            indices = order[place * self.batch_size : (place + 1) * self.batch_size]
            update = divmod(number * self.per_epoch + place, self._accumulate)
            yield Pick(indices, self._share, derived_seed("augment", self.seed, *update))

    def _read(self, picks: Iterator[Pick]) -> Iterator[Batch]:
        asked, given = itertools.tee(picks)  # a split that streams reads ahead
        for pick, (images, labels) in zip(asked, self.split.stream(given), strict=False):
            yield images, labels, pick.indices.numpy()
