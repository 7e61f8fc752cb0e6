"""Crops and flips of a batch, against a slow version of one image after the other."""

import pytest
import torch

from gradflow.augmentation import PAD, Draws, crop_and_flip, draw


def slowly(image: torch.Tensor, row: int, column: int, flipped: bool) -> torch.Tensor:
    """One image [channels, height, width], pixel by pixel."""
    _, height, width = image.shape
    found = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y = y + row - PAD
            source_x = (width - 1 - x if flipped else x) + column - PAD
            if 0 <= source_y < height and 0 <= source_x < width:
                found[:, y, x] = image[:, source_y, source_x]
    return found


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10)])
def test_a_batch_is_what_its_images_are_one_by_one(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (40, *shape), generator=generator).to(torch.uint8)
    draws = draw(40, seed=3)
    got = crop_and_flip(images.to(memory_format=torch.channels_last), draws)
    assert got.dtype == torch.uint8
    assert got.is_contiguous(memory_format=torch.channels_last)
    for image, *drawn, cropped in zip(
        images, draws.rows, draws.columns, draws.flipped, got, strict=True
    ):
        assert torch.equal(cropped, slowly(image, *(int(value) for value in drawn)))


def test_the_middle_crop_is_the_image():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    middle = torch.tensor([PAD, PAD])
    straight, flipped = (Draws(middle, middle, torch.tensor([f, f])) for f in (False, True))
    assert torch.equal(crop_and_flip(images, straight), images)
    assert torch.equal(crop_and_flip(images, flipped), images.flip(3))


def test_all_places_are_equally_likely_and_half_are_flipped():
    draws = draw(81_000, seed=0)
    places = torch.bincount(draws.rows * (2 * PAD + 1) + draws.columns)
    assert len(places) == 81
    assert 850 < places.min() <= places.max() < 1150  # 1,000 ± 5 deviations of 31
    assert draws.flipped.float().mean() == pytest.approx(0.5, abs=0.01)


def test_draws_come_from_the_seed_and_a_share_is_part_of_the_whole():
    one, same, other = (draw(12, seed) for seed in (1, 1, 2))
    assert torch.equal(one.rows, same.rows)
    assert torch.equal(one.flipped, same.flipped)
    assert not torch.equal(one.rows, other.rows)
    parts = [one[slice(0, 6)], one[slice(6, 12)]]
    for name in ("rows", "columns", "flipped"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(one, name))
