"""Random crops and flips of a whole batch, on the device it lies on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PAD = 4
"""Pixels on each side, of He et al. 2015 (arXiv 1512.03385) §4.2."""


@dataclass(frozen=True)
class Draws:
    """How each image of a batch is cropped and flipped: rows [n], columns [n], flipped [n].

    An image is padded by `PAD` black pixels on each side; (row, column) is the upper left corner of
    a crop of the old size. Where `flipped`, the crop's left and right then change places.
    """

    rows: Tensor
    columns: Tensor
    flipped: Tensor

    def __getitem__(self, share: slice) -> Draws:
        return Draws(self.rows[share], self.columns[share], self.flipped[share])


def draw(count: int, seed: int) -> Draws:
    """What `count` images are given, the same on every device: all is drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    return Draws(rows, columns, torch.rand(count, generator=generator) < 0.5)


def crop_and_flip(images: Tensor, draws: Draws) -> Tensor:
    """Images [n, channels, height, width] cropped and flipped, in channels-last layout."""
    height, width = images.shape[2:]
    padded = functional.pad(images, (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1)
    columns = torch.arange(width).expand(len(images), width)
    columns = torch.where(draws.flipped[:, None], columns.flip(1), columns)
    rows = (draws.rows[:, None] + torch.arange(height))[:, :, None]
    columns = (draws.columns[:, None] + columns)[:, None, :]
    number = torch.arange(len(images))[:, None, None]
    where = (index.to(images.device) for index in (number, rows, columns))
    return padded[tuple(where)].permute(0, 3, 1, 2)
