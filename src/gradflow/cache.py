"""What a report derived before, kept on disk until what it was derived from changes.

An entry is named, and holds the key it was saved under: another key finds nothing, and the next
save replaces it. So there is one entry for each run, however often it changes; what the last report
did not use is removed.
Keys are digests of content or, of a run's files, of what the file system says of them, and of the
code that derives. An entry holds bytes under names, and their checksum: nothing in it is executed,
and whatever is not whole is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

DIRECTORY = ".cache"
"""Below a report's directory."""
SETTLED = 2.0
"""Seconds after its last change before a run is kept: a change so soon after another might leave
the file system's times as they were."""
_LIBRARIES = ("numpy", "pandas", "pyarrow", "scipy", "matplotlib", "seaborn")
_PARTIAL = ".tmp"

Parts = Mapping[str, bytes]


class Cache:
    """Named entries in a directory, each of some bytes by name; None keeps nothing.

    What cannot be written is not kept, what cannot be read is not there.
    """

    def __init__(self, directory: str | Path | None = None):
        self._directory = None if directory is None else Path(directory)
        self._used: set[str] = set()

    def load(self, name: str, key: str) -> dict[str, bytes] | None:
        """What was saved last under this name, if it was under this key."""
        if self._directory is None:
            return None
        self._used.add(name)
        try:
            return _unpacked((self._directory / name).read_bytes(), key)
        except OSError:
            return None

    def save(self, name: str, key: str, parts: Parts) -> None:
        """Keep parts under a name, in place of what it had: whole, or not at all."""
        if self._directory is None:
            return
        self._used.add(name)
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(suffix=_PARTIAL, dir=self._directory)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_packed(key, parts))
                Path(partial).replace(self._directory / name)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

    def prune(self) -> None:
        """Remove what was neither loaded nor saved by this object: of runs that are gone."""
        if self._directory is not None and self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name not in self._used:
                    with contextlib.suppress(OSError):
                        path.unlink()


def _packed(key: str, parts: Parts) -> bytes:
    head = json.dumps([key, {name: len(data) for name, data in parts.items()}]).encode()
    body = b"".join([head, b"\n", *parts.values()])
    return hashlib.sha256(body).digest() + body


def _unpacked(data: bytes, key: str) -> dict[str, bytes] | None:
    size = hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(data)[size:]).digest() != data[:size]:
        return None
    head, _, _ = data[size:].partition(b"\n")
    saved, lengths = json.loads(head)
    if saved != key:
        return None
    stream = io.BytesIO(data)
    stream.seek(size + len(head) + 1)
    return {name: stream.read(length) for name, length in lengths.items()}


# --- keys -----------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Of frames, bytes, whatever else JSON or `repr` writes out in full, and of `code`."""
    found = hashlib.sha256(code().encode())
    for value in values:
        data: bytes | memoryview
        if isinstance(value, pd.DataFrame):
            data = _frame_bytes(value)
        elif isinstance(value, bytes):
            data = value
        else:
            data = json.dumps(value, sort_keys=True, default=repr).encode()
        found.update(f"{type(value).__name__} {len(data)}\n".encode())
        found.update(data)
    return found.hexdigest()


def _frame_bytes(frame: pd.DataFrame) -> memoryview:
    """Equal bytes for equal frames (not the other way round), but for their index."""
    mixed = [name for name in frame.columns if frame[name].dtype == object]
    words = {name: list(map(repr, frame[name])) for name in mixed}
    plain = pa.Table.from_pandas(frame.assign(**words), preserve_index=False, nthreads=1)
    whole = plain.combine_chunks().replace_schema_metadata({"dtypes": repr(list(frame.dtypes))})
    sink = pa.BufferOutputStream()
    _write(whole, sink)
    return memoryview(sink.getvalue())


@cache
def code() -> str:
    """A digest of gradflow's own sources that derive, and of the libraries' versions."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found.update(f"{name} {version(name)}\n".encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What the file system says of the files that a run is read from, and when one last changed.

    Attributes:
        files: name, inode, size and both times of each: files are replaced, never written into, so
            that a change shows at least in the inode.
        changed: nanoseconds of the epoch.
    """

    files: tuple[Any, ...]
    changed: int

    @property
    def settled(self) -> bool:
        """Whether the last change is a while ago."""
        return time.time_ns() - self.changed > SETTLED * 1e9


def fingerprint(run: Path) -> Fingerprint:
    """Of a run's directory, finished or not. Of claim and checkpoint nothing is read.

    Raises:
        OSError: it cannot be read.
    """
    attempts = sorted(path.name for path in run.iterdir() if path.name.startswith("attempt-"))
    files = [file for name in ("", *attempts) for file in _files(run, name)]
    changed = max((time for *_, mtime, ctime in files for time in (mtime, ctime)), default=0)
    return Fingerprint((str(run.resolve()), *attempts, *files), changed)


def _files(run: Path, directory: str) -> Iterator[tuple[Any, ...]]:
    with contextlib.suppress(FileNotFoundError):  # an attempt that has just ended
        for entry in sorted(os.scandir(run / directory), key=lambda entry: entry.name):
            if entry.name.endswith(".parquet") or entry.name in ("run.json", "spec.json"):
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    times = (about.st_mtime_ns, about.st_ctime_ns)
                    yield (directory, entry.name, about.st_ino, about.st_size, *times)


# --- frames as bytes ------------------------------------------------------------------------------


def encode(frame: pd.DataFrame) -> bytes:
    """A frame as an Arrow stream, without its index: compressed as a whole, as the small buffers of
    few rows, each by itself, take many times as long and no less room."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as compressed:
        _write(pa.Table.from_pandas(frame, preserve_index=False), compressed)
    return sink.getvalue().to_pybytes()


def decode(parts: Sequence[bytes]) -> tuple[pd.DataFrame, list[int]]:
    """The frames of some `encode`, one under another, and how many rows each has."""
    found = list(map(_read, parts))
    frames = []
    # Runs may have a quantity more or less, or of another type.
    for _, alike in groupby(found, lambda data: (data.schema, data.schema.metadata)):
        frames.append(pa.concat_tables(alike).unify_dictionaries().to_pandas())
    whole = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    return whole, [data.num_rows for data in found]


def _read(part: bytes) -> pa.Table:
    return pa.ipc.open_stream(pa.CompressedInputStream(pa.BufferReader(part), "zstd")).read_all()


def _write(data: pa.Table, sink: Any) -> None:
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
