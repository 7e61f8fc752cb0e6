"""Images in directories, one a class, as ImageNet lies: decoded as they are needed, in parallel.

What is read is a list of files; `torch.utils.data.DataLoader` has worker processes decode and crop
them ahead of the training. What an image becomes depends on its file and on a seed that comes with
the request for it, not on the worker.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradflow import vision
from gradflow.data import Data, Pick, Scale, chosen
from gradflow.environment import cores
from gradflow.errors import GradflowError
from gradflow.seeding import derived_seed
from gradflow.spec import DataSpec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's channels, by which torchvision's recipes scale any folder."""

Request = tuple[int, int | None]
"""An image's index, and what its crop and flip are drawn from: None for the crop to test on."""


@dataclass(frozen=True)
class FolderSplit:
    """Files (a path each, encoded) with their labels [n] (int64), read as `spec` says.

    Args:
        scale: its device and number format are those of the images given out.
        augment: random crops and flips of images that are trained on.
    """

    files: np.ndarray
    labels: Tensor
    spec: DataSpec
    scale: Scale
    augment: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        assert self.spec.size is not None
        return 3, self.spec.size, self.spec.size

    def to(self, device: torch.device, dtype: torch.dtype) -> FolderSplit:
        return replace(self, scale=self.scale.to(device, dtype))

    def stream(self, picks: Iterable[Pick]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of a rank's share of each batch, to train on."""
        return self._read(self._requests(pick) for pick in picks)

    def _requests(self, pick: Pick) -> list[Request]:
        places = list(enumerate(pick.indices.tolist()))[pick.share]
        if not self.augment:
            return [(index, None) for _, index in places]
        return [(index, derived_seed("image", pick.seed, place)) for place, index in places]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and labels in their order, cropped in the middle."""
        starts = range(0, len(self), size)
        parts = (range(len(self))[start : start + size] for start in starts)
        return self._read([(index, None) for index in part] for part in parts)

    def _read(self, requests: Iterable[list[Request]]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.scale.mean.device
        workers = min(self.spec.workers or 0, cores())
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.files, self.labels, self.spec),
            batch_sampler=requests,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # or it would draw from the run's
        )
        for images, labels, damaged in loader:
            if damaged:
                raise GradflowError(damaged)
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            yield self.scale(images), labels.to(device, non_blocking=True)


def load_folder(spec: DataSpec) -> Data:
    """The files of train/CLASS/* and val/CLASS/* in data.root, unread.

    The digest is one of their names and sizes: what is in a file is not looked at.

    Raises:
        GradflowError: directories that are missing or hold no images, or no torchvision.
    """
    assert spec.root is not None
    datasets = vision.require(spec.name).datasets
    spec.check_files()
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    scale = Scale(mean, deviation)
    splits, classes, state = [], [], hashlib.sha256()
    for name, count, key in (("train", spec.train, "train"), ("val", spec.test, "test")):
        try:
            listed = datasets.ImageFolder(Path(spec.root) / name)
        except (FileNotFoundError, OSError) as error:
            raise GradflowError(f"data.root={spec.root}: {error}") from None
        where = chosen(len(listed.samples), count, key).tolist()
        paths = [listed.samples[index][0] for index in where]
        files = np.array([os.fsencode(path) for path in paths])
        labels = torch.tensor(listed.targets)[where]
        state.update(_listing(Path(spec.root), paths))
        augment = bool(spec.augment) and name == "train"
        splits.append(FolderSplit(files, labels, spec, scale, augment))
        classes.append(listed.classes)
    if classes[0] != classes[1]:
        odd = min(set(classes[0]) ^ set(classes[1]))
        raise GradflowError(f"data.root={spec.root}: class {odd} is in one of train, val alone")
    return Data(splits[0], splits[1], max(len(classes[0]), 2), state.hexdigest()[:16])


def _listing(root: Path, paths: list[str]) -> bytes:
    lines = (f"{Path(path).relative_to(root)} {Path(path).stat().st_size}\n" for path in paths)
    return os.fsencode("".join(lines))


class _Decoder(Dataset):
    """What a worker does: a request becomes an image [3, size, size] in bytes, or what is wrong."""

    def __init__(self, files: np.ndarray, labels: Tensor, spec: DataSpec):
        self._files, self._labels = files, labels
        self._train, self._test = _crops(spec)

    def __getitem__(self, request: Request) -> tuple[Tensor | None, int, str]:
        from torchvision.datasets.folder import pil_loader
        from torchvision.transforms.functional import pil_to_tensor

        index, seed = request
        path = os.fsdecode(self._files[index])
        try:
            image = pil_loader(path)
        except Exception as error:  # a damaged image fails in whatever way
            return None, 0, f"{path}: damaged ({error})"
        if seed is None:
            image = self._test(image)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                image = self._train(image)
        return pil_to_tensor(image), int(self._labels[index]), ""


def _crops(spec: DataSpec) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """To train on and to test on: those of torchvision's recipes (Szegedy et al. 2015, §6)."""
    from torchvision import transforms

    train = [transforms.RandomResizedCrop(spec.size), transforms.RandomHorizontalFlip()]
    test = [transforms.Resize(spec.resize), transforms.CenterCrop(spec.size)]
    return transforms.Compose(train), transforms.Compose(test)


def _collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Any, Any, str]:
    """A batch, or the first thing that is wrong with it."""
    images, labels, damaged = zip(*items, strict=True)
    if any(damaged):
        return None, None, next(filter(None, damaged))
    return torch.stack(images), torch.tensor(labels), ""


def _end_with_parent(worker: int) -> None:
    """A worker has the run's lock and pipes, as a copy of its process: it must not outlive it."""
    if platform.system() == "Linux":
        pdeathsig = 1
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)
