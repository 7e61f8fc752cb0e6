"""Files of a report that are yet to be made: what they are made of is known, and making them waits.

A page names its figures and its long tables as they come; helpers make them meanwhile, this process
what is left at the end, and nobody those whose data and code are as they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from gradflow import cache
from gradflow.cache import Cache
from gradflow.helpers import Helpers


class Piece(Protocol):
    """What files are made of."""

    def key(self) -> str:
        """A digest of all of it."""

    def files(self) -> dict[str, bytes]:
        """The files, by their suffix."""


@dataclass(frozen=True)
class Sketch:
    """A figure: a function of `plots`, by its name, and what it is given."""

    function: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def key(self) -> str:
        given = [value for item in sorted(self.options.items()) for value in item]
        return cache.digest(self.function, len(self.arguments), *self.arguments, *given)

    def files(self) -> dict[str, bytes]:
        from gradflow import plots  # takes as long to load as several figures to draw

        drawn = getattr(plots, self.function)(*self.arguments, **self.options)
        with tempfile.TemporaryDirectory() as scratch:
            paths = plots.save(drawn, Path(scratch) / "figure")
            return {path.suffix[1:]: path.read_bytes() for path in paths}


def sketch(function: str, *arguments: pd.DataFrame, **options: Any) -> Sketch:
    """`plots.<function>(*arguments, **options)`, to be called later.

    Args:
        arguments: frames of one group, whose number does not matter: another run may change that
            of all groups. options: what JSON can write.
    """

    def unnumbered(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(group=0) if "group" in frame else frame

    return Sketch(function, tuple(map(unnumbered, arguments)), options)


_VALUE = "\0value\0"


@dataclass(frozen=True)
class Sheet:
    """Rows of a table as CSV, without its first line.

    `missing` stands for a NaN in columns that are not Arrow-backed. All rows have the same value in
    the column `by`, which `text` fills in.
    """

    frame: pd.DataFrame
    by: str
    missing: str

    def key(self) -> str:
        frame = self.frame.drop(columns=self.by)
        return cache.digest(frame, list(self.frame), self.missing)

    def files(self) -> dict[str, bytes]:
        frame = self.frame.assign(**{self.by: _VALUE})
        text = frame.to_csv(index=False, header=False, na_rep=self.missing)
        return {"csv": text.encode()}

    @staticmethod
    def text(made: Mapping[str, bytes], value: object) -> bytes:
        return made["csv"].replace(_VALUE.encode(), str(value).encode())


def files(piece: Piece) -> dict[str, bytes]:
    return piece.files()


class Making:
    """Pieces under way, by name."""

    def __init__(self, kept: Cache, helpers: Helpers):
        self._kept, self._helpers = kept, helpers
        self._begin()

    def _begin(self) -> None:
        self._work = self._helpers.work(files)
        self._keys: dict[str, str] = {}
        self._found: dict[str, dict[str, bytes]] = {}
        self._missing: list[str] = []

    def add(self, name: str, piece: Piece) -> None:
        """Make a piece, unless one of the same data was kept."""
        self._keys[name] = piece.key()
        before = self._kept.load(_entry(self._keys[name]), self._keys[name])
        if before is not None:
            self._found[name] = before
        else:
            self._missing.append(name)
            self._work.add(piece)

    def results(self) -> dict[str, dict[str, bytes]]:
        """The files of all pieces added since the last time."""
        for name, made in zip(self._missing, self._work.results(), strict=True):
            self._found[name] = made
            self._kept.save(_entry(self._keys[name]), self._keys[name], made)
        found = {name: self._found[name] for name in self._keys}  # as they were added
        self._begin()
        return found


def _entry(key: str) -> str:
    """Of pieces by what they are made of: their names change with the number of their group."""
    return f"{key[:32]}.piece"
