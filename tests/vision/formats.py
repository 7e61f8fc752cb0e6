"""Archives made by the tests in the formats of the public sets, and what is in them."""

import pickle
import struct
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

Arrays = tuple[np.ndarray, np.ndarray]
CLASSES = {"fashion_mnist": 10, "mnist": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}
FOLDERS = {"fashion_mnist": "FashionMNIST/raw", "mnist": "MNIST/raw"}


def images(name: str, count: int, seed: int) -> Arrays:
    """Images [n, channels, height, width] in bytes, and labels [n], all classes among them."""
    random = np.random.default_rng(seed)
    shape = (1, 28, 28) if name in FOLDERS else (3, 32, 32)
    labels = np.arange(count) % CLASSES[name]
    noise = random.integers(0, 100, (count, *shape))
    return (noise + labels[:, None, None, None]).astype(np.uint8), random.permutation(labels)


def write(name: str, root: Path, train: int = 200, test: int = 100) -> tuple[Arrays, Arrays]:
    """A set of that name below `root`, in its own format; what was written."""
    splits = images(name, train, 1), images(name, test, 2)
    {"cifar10": _cifar10, "cifar100": _cifar100, "svhn": _svhn}.get(name, _idx)(name, root, *splits)
    return splits


def _idx(name: str, root: Path, train: Arrays, test: Arrays) -> None:
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    for part, (pixels, labels) in (("train", train), ("t10k", test)):
        head = struct.pack(">iiii", 0x803, len(pixels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">ii", 0x801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


def _cifar10(name: str, root: Path, train: Arrays, test: Arrays) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = [f"data_batch_{number}" for number in range(1, 6)]
    for part, pixels, labels in zip(
        parts, np.split(train[0], 5), np.split(train[1], 5), strict=True
    ):
        _rows(folder / part, pixels, labels=labels.tolist())
    _rows(folder / "test_batch", test[0], labels=test[1].tolist())
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": list("abcdefghij")}))


def _cifar100(name: str, root: Path, train: Arrays, test: Arrays) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part, (pixels, labels) in (("train", train), ("test", test)):
        fine = labels.tolist()
        _rows(folder / part, pixels, fine_labels=fine, coarse_labels=[v // 5 for v in fine])
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [str(i) for i in range(100)]}))


class OldArray:
    """Pickles as an array did in the Python 2 of 2009: its dtype's flags are numbers."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __reduce__(self):
        return np.ndarray, (self.values.shape, OldType(), self.values.tobytes())


class OldType:
    def __reduce__(self):
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


def _rows(path: Path, pixels: np.ndarray, **labels: list[int]) -> None:
    rows = pixels.reshape(len(pixels), -1)
    entry = {"batch_label": path.name, "data": OldArray(rows), **labels, "filenames": []}
    path.write_bytes(pickle.dumps(entry, protocol=2))


def _svhn(name: str, root: Path, train: Arrays, test: Arrays) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part, (pixels, labels) in (("train", train), ("test", test)):
        numbered = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        content = {"X": pixels.transpose(2, 3, 1, 0), "y": numbered}
        scipy.io.savemat(root / f"{part}_32x32.mat", content, do_compression=True)


def write_folder(root: Path, classes: int = 3, train: int = 8, val: int = 4) -> None:
    """JPEGs of several sizes below train/CLASS and val/CLASS, so many a class; one is grey."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = (int(n) for n in random.integers(40, 80, 2))
                pixels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
                picture = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
                if number == 0:
                    picture = picture.convert("L")
                picture.save(folder / f"{split}_{label}_{number}.JPEG", quality=90)
