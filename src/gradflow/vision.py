"""Public image sets, fetched and read by torchvision: bytes, as they lie in its files.

Files are read one at a time, so that what cannot be read is named. Checksums are those of the
download: a file that holds images and labels in a set's format is read, whoever made it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.errors import GradflowError
from gradflow.spec import INSTALL_VISION, PUBLIC, DataSpec

Bytes = tuple[Tensor, Tensor]
"""Images [n, channels, height, width] (uint8) and labels [n] (int64)."""


def require(name: str) -> Any:
    """torchvision, for the data set of that name.

    Raises:
        GradflowError: it is missing, or does not go with the torch that is here.
    """
    try:
        import torchvision
        from torchvision import datasets, io, transforms  # noqa: F401
    except ModuleNotFoundError:
        raise GradflowError(f"data={name}: torchvision is missing: {INSTALL_VISION}") from None
    except Exception as error:  # built for another torch, it fails in whatever way
        raise GradflowError(
            f"data={name}: torchvision does not import beside torch {torch.__version__} "
            f"({_reason(error)}); {INSTALL_VISION} in a new environment brings two that go together"
        ) from None
    return torchvision


def download(spec: DataSpec) -> None:
    """Fetch what is missing of a public set into data.root, and unpack it.

    Raises:
        GradflowError: it cannot be fetched or written.
    """
    kind = _kind(spec)
    try:
        for split in _SPLITS[spec.name]:
            kind(spec.root, **split, download=True)
    except Exception as error:  # of the network, the disk, or a checksum
        raise GradflowError(f"data={spec.name}: not fetched ({_reason(error)})") from None


def read(spec: DataSpec) -> tuple[Bytes, Bytes, int]:
    """The training and the test split of a public set, and its number of classes.

    Raises:
        GradflowError: a file that is missing, damaged or cannot be fetched, or no torchvision.
    """
    if spec.download:
        download(spec)
    kind = _kind(spec)
    train, test = _READERS[spec.name](kind, Path(spec.root or ""), spec)
    return train, test, _CLASSES.get(spec.name, 10)


# --- one function a format ------------------------------------------------------------------------


def _idx(kind: Any, root: Path, spec: DataSpec) -> list[Bytes]:
    """MNIST's format (LeCun et al. 1998): a file of images and one of labels for each split."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    found = []
    for part in ("train", "t10k"):
        base = root / kind.__name__ / "raw"
        images, labels = base / f"{part}-images-idx3-ubyte", base / f"{part}-labels-idx1-ubyte"
        with _naming(images, spec):
            pixels = _fitting(read_image_file(str(images))[:, None], spec)
        with _naming(labels, spec):
            found.append(_checked(pixels, read_label_file(str(labels)), spec))
    return found


def _cifar(kind: Any, root: Path, spec: DataSpec) -> list[Bytes]:
    """CIFAR's format (Krizhevsky 2009): pickles of rows, 3×32×32 bytes each."""
    return [
        _joined([_cifar_file(kind, root, name, spec) for name, _ in files])
        for files in (kind.train_list, kind.test_list)
    ]


def _cifar_file(kind: Any, root: Path, name: str, spec: DataSpec) -> Bytes:
    path = root / kind.base_folder / name
    key = "labels" if kind.__name__ == "CIFAR10" else "fine_labels"
    # Of the set's files this one alone, which does for that of the classes' names as well.
    one = {"train_list": [(name, None)], "test_list": []}
    one["meta"] = {"filename": name, "key": key, "md5": None}  # type: ignore[assignment]
    with _naming(path, spec):
        found = type(kind.__name__, (kind,), one)(str(root), train=True)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return _checked(images, torch.tensor(found.targets), spec)


def _svhn(kind: Any, root: Path, spec: DataSpec) -> list[Bytes]:
    """SVHN's format (Netzer et al. 2011): a MATLAB file for each split, with 10 for the digit 0."""
    found = []
    for split in ("train", "test"):
        url, name, _ = kind.split_list[split]
        one = type(kind.__name__, (kind,), {"split_list": {split: [url, name, None]}})
        with _naming(root / name, spec):
            read = one(str(root), split=split)
            found.append(_checked(torch.from_numpy(read.data), torch.from_numpy(read.labels), spec))
    return found


_READERS: dict[str, Callable[[Any, Path, DataSpec], list[Bytes]]] = {
    "fashion_mnist": _idx, "mnist": _idx, "cifar10": _cifar, "cifar100": _cifar, "svhn": _svhn,
}  # fmt: skip
_CLASSES = {"cifar100": 100}
_SPLITS: dict[str, tuple[dict[str, Any], ...]] = {
    name: ({"train": True}, {"train": False}) for name in _READERS if name != "svhn"
} | {"svhn": ({"split": "train"}, {"split": "test"})}


def _kind(spec: DataSpec) -> Any:
    datasets = require(spec.name).datasets
    return {
        "fashion_mnist": datasets.FashionMNIST,
        "mnist": datasets.MNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
    }[spec.name]


def _joined(parts: list[Bytes]) -> Bytes:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _fitting(images: Tensor, spec: DataSpec) -> Tensor:
    """The images, if they are of the set's format."""
    wanted = list(PUBLIC[spec.name].shape)
    if images.dtype != torch.uint8 or list(images.shape[1:]) != wanted:
        raise ValueError(f"wants images {wanted} in bytes, has {list(images.shape[1:])}")
    return images


def _checked(images: Tensor, labels: Tensor, spec: DataSpec) -> Bytes:
    """The two, if they belong together."""
    images = _fitting(images, spec)
    if labels.shape != (len(images),):
        raise ValueError(f"wants as many labels as images, {len(images)}, has {list(labels.shape)}")
    classes = _CLASSES.get(spec.name, 10)
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"wants labels from 0 to {classes - 1}")
    return images, labels.long()


@contextlib.contextmanager
def _naming(path: Path, spec: DataSpec) -> Iterator[None]:
    """Whatever is wrong with a file becomes one line that names it and what helps."""
    if not path.is_file():
        raise GradflowError(f"{path}: no such file; to fetch it: {spec.remedy}")
    try:
        with warnings.catch_warnings():  # numpy's, about the pickles of its youth
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            yield
    except Exception as error:  # a damaged file fails in whatever way
        raise GradflowError(
            f"{path}: damaged ({_reason(error)}); delete it, and fetch it anew: {spec.remedy}"
        ) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, AssertionError):  # of torchvision, without words
        return "not in its format"
    if isinstance(error, KeyError):
        return f"has no {error}"
    return str(error).strip().partition("\n")[0] or type(error).__name__
