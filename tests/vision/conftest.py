"""The whole of Fashion-MNIST, from Debian's package, where torchvision looks for it."""

import gzip
import shutil
from pathlib import Path

import pytest

PACKAGE = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def fashion(tmp_path_factory) -> Path:
    """A root with FashionMNIST/raw in it."""
    assert PACKAGE.is_dir(), "apt-get install dataset-fashion-mnist"
    root = tmp_path_factory.mktemp("fashion")
    (root / "FashionMNIST" / "raw").mkdir(parents=True)
    for packed in PACKAGE.glob("*.gz"):
        with gzip.open(packed) as source:
            target = root / "FashionMNIST" / "raw" / packed.stem
            with target.open("wb") as file:
                shutil.copyfileobj(source, file)
    return root
