"""ImageNet's layout: what is read of it, cropped how, in which order, by however many workers."""

from itertools import islice
from pathlib import Path

import formats
import pytest
import torch

from gradflow.data import Batches, Split, load_data
from gradflow.errors import GradflowError, SpecError
from gradflow.folder import IMAGENET
from gradflow.ranks import Ranks
from gradflow.seeding import derived_seed
from gradflow.spec import DataSpec

pytestmark = pytest.mark.vision


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    formats.write_folder(root)
    return root


def spec_of(root: Path, **keys) -> DataSpec:
    return DataSpec("imagefolder", root=str(root), **{"size": 32, "workers": 0} | keys)


def stream(root: Path, count: int, batches: dict | None = None, **keys) -> list[tuple]:
    split = load_data(spec_of(root, **keys)).to(torch.device("cpu")).train
    options = {"batch_size": 6, "accumulate": 2} | (batches or {})
    return list(islice(Batches(split, **options), count))


def same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and (a[2] == b[2]).all()
        for a, b in zip(one, other, strict=True)
    )


def files(root: Path, split: str) -> list[Path]:
    return sorted((root / split).glob("*/*.JPEG"))


def test_what_is_there_is_listed(root):
    data = load_data(spec_of(root))
    assert (len(data.train), len(data.test)) == (24, 12)
    assert data.num_classes == 3
    assert data.shape == (3, 32, 32)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.test.labels.bincount().tolist() == [4, 4, 4]
    assert load_data(DataSpec("imagefolder", root=str(root))).shape == (3, 224, 224)


def test_images_to_test_on_are_those_of_torchvisions_recipe(root):
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    recipe = Compose([Resize(36), CenterCrop(32), ToTensor(), Normalize(*IMAGENET)])
    for split, name in (("test", "val"), ("train", "train")):
        source = getattr(load_data(spec_of(root)).to(torch.device("cpu")), split)
        images = torch.cat([images for images, _ in source.batches(5)])
        paths = files(root, name)
        expected = torch.stack([recipe(Image.open(path).convert("RGB")) for path in paths])
        assert torch.equal(images, expected)


def test_images_to_train_on_are_those_of_torchvisions_recipe(root):
    """One image after the other, each from the seed of its place."""
    from PIL import Image
    from torchvision import transforms

    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )
    paths = files(root, "train")
    for number, (images, labels, indices) in enumerate(stream(root, 5, {"seed": 7})):
        batch_seed = derived_seed("augment", 7, *divmod(number, 2))
        for place, index in enumerate(indices):
            torch.manual_seed(derived_seed("image", batch_seed, place))
            assert torch.equal(images[place], recipe(Image.open(paths[index]).convert("RGB")))
            assert labels[place] == index // 8


def test_without_augmentation_training_images_are_cropped_in_the_middle(root):
    data = load_data(spec_of(root, augment=False)).to(torch.device("cpu"))
    whole = torch.cat([images for images, _ in data.train.batches(24)])
    for images, _, indices in stream(root, 4, augment=False):
        assert torch.equal(images, whole[indices])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root, workers):
    assert same(stream(root, 11), stream(root, 11, workers=workers))
    for split in ("train", "test"):
        alone, helped = (
            getattr(load_data(spec_of(root, workers=w)).to(torch.device("cpu")), split)
            for w in (0, workers)
        )
        for one, other in zip(alone.batches(5), helped.batches(5), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_the_order_is_that_of_any_other_set(root):
    memory = Split(torch.zeros(24, 1, 1, 1), torch.arange(24))
    expected = [i for _, _, i in islice(Batches(memory, batch_size=6, accumulate=2, seed=3), 9)]
    got = [i for _, _, i in stream(root, 9, {"seed": 3}, workers=2)]
    assert all((one == other).all() for one, other in zip(expected, got, strict=True))


def test_crops_depend_on_seed_update_and_place_alone(root):
    whole = stream(root, 9)
    for start in (1, 3, 4, 6):
        assert same(whole[start:], stream(root, 9 - start, {"start": start}, workers=2))
    shares = [stream(root, 9, {"ranks": Ranks(rank, world=2, devices=2)}) for rank in (0, 1)]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), expected[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), expected[1])
    again = next(iter(stream(root, 1, {"seed": 1})))
    assert not torch.equal(again[0], whole[0][0])


def test_the_runs_own_random_numbers_are_left_alone(root):
    for workers in (0, 2):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        stream(root, 3, workers=workers)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_part_of_it_has_all_classes(root):
    data = load_data(spec_of(root, train=12, test=6))
    assert (len(data.train), len(data.test), data.num_classes) == (12, 6, 3)
    assert data.train.labels.bincount().min() > 0
    listed = [Path(file.decode()).name for file in data.train.files]
    assert set(listed) < {path.name for path in files(root, "train")}


# --- what is missing or damaged -------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", ["cut", b"", b"no picture"])
def test_a_damaged_picture_is_named_in_one_line(tmp_path, workers, content):
    formats.write_folder(tmp_path)
    path = tmp_path / "train/n00000001/train_1_3.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(GradflowError, match="damaged") as caught:
        stream(tmp_path, 4, workers=workers)
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert "\n" not in str(caught.value)


def test_directories_that_are_no_data_set_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(SpecError, match=f"^data.root={tmp_path}: has no val$"):
        load_data(spec_of(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(GradflowError, match=r"Couldn't find any class folder in .*train"):
        load_data(spec_of(tmp_path))
    formats.write_folder(tmp_path / "b")
    (tmp_path / "b" / "val" / "n7").mkdir()
    with pytest.raises(GradflowError, match=r"Found no valid file for the classes n7") as caught:
        load_data(spec_of(tmp_path / "b"))
    assert "\n" not in str(caught.value)
    (tmp_path / "b" / "val" / "n00000001").rename(tmp_path / "gone")
    (tmp_path / "b" / "val" / "n7").rmdir()
    with pytest.raises(GradflowError, match="class n00000001 is in one of train, val alone"):
        load_data(spec_of(tmp_path / "b"))
