"""Who is at work on a run: a lock on one machine, a lease between machines.

The process that computes a run locks its directory (`flock`); the lock dies with the process. A
network file system may not carry the lock to other machines, so the process also owns an *attempt*,
a directory `attempt-<n>` inside the run's, with its claim in it, and renews the claim every BEAT
seconds. Another machine takes an attempt over when it has itself watched the claim for LEASE
seconds without seeing it renewed; no two clocks are compared.

Whatever the owner writes is written into the attempt and renamed into place. To take an attempt
over is to rename it, to the next number: of several takers one succeeds, and nothing that the
former owner still writes finds its place. So a run whose owner was cut off for longer than the
lease may be computed twice, and is never published twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gradflow.errors import Busy

BEAT = 15.0
"""Seconds between two renewals of a claim."""
LEASE = 120.0
"""Seconds without renewal after which another machine takes over."""

CLAIM = "claim.json"
_ATTEMPT = re.compile(r"attempt-(\d+)")
_LOOK = 1.0  # seconds between looks at another machine's claim
# NFS has locks of files that are open for writing alone, which a directory never is: EBADF.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class Claim:
    """A run's directory, taken for this process until `release`.

    Args:
        path: the run's directory, which exists.
        after: the number of the last attempt that has ended.
        force: take the attempt over from another machine at once: its owner is known to be dead.
        watch: wait whether another machine's lease ends; else that is Busy at once.

    Attributes:
        attempt: the directory to write into.
        number: the attempt's.

    Raises:
        Busy: another process has it.
        OSError: the directory cannot be read or written.
    """

    def __init__(self, path: Path, after: int = 0, *, force: bool = False, watch: bool = True):
        self.path = path
        self._lock = lock(path, patience=0.5)
        try:
            self.attempt = self._take(after, force, watch)
            self.number = _number(self.attempt)
            self._write(json.dumps({**_here(), "pid": os.getpid()}))
        except BaseException:
            _unlock(self._lock)
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def _take(self, after: int, force: bool, watch: bool) -> Path:
        found = latest(self.path)
        if found is None:
            mine = self.path / f"attempt-{after + 1}"
            try:
                mine.mkdir()
            except FileExistsError:
                raise self._busy("another process") from None
        else:
            owner = _read(found)
            if owner and not force and not self._is_dead(owner):
                if not watch:
                    raise self._busy(f"a process on {owner.get('host')}")
                self._watch(found, owner)
            mine = found.with_name(f"attempt-{_number(found) + 1}")
            try:
                found.rename(mine)
            except OSError:  # somebody else was faster
                raise self._busy("another process") from None
        if latest(self.path) != mine:
            raise self._busy("another process")
        return mine

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        """Whether the owner was of this machine and is gone: it would hold the lock, if any."""
        return _is_here(owner) and (self._lock is not None or not _exists(owner.get("pid")))

    def _write(self, text: str) -> None:
        """Whole or not at all: what has no claim is free."""
        temporary = self.attempt / f".{CLAIM}.tmp"
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.attempt / CLAIM)
        except FileNotFoundError:
            raise self._busy("another process") from None

    def _watch(self, found: Path, owner: dict[str, Any]) -> None:
        """Wait until the lease is over; raise Busy as soon as the owner shows that it lives."""
        host = owner.get("host")
        print(f"{self.path}: claimed by a process on {host}; "
              f"watching for up to {LEASE:g} s whether it lives", file=sys.stderr)  # fmt: skip
        seen, until = _renewed(found), time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(min(_LOOK, LEASE / 10))
            if _renewed(found) != seen:
                raise self._busy(f"a process on {host}")

    def _busy(self, who: str) -> Busy:
        return Busy(f"{self.path}: {who} is computing this run")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # lost: the next thing written says so
                os.utime(self.attempt / CLAIM)

    def place(self, name: str, target: str) -> None:
        """Rename a file of the attempt to what it is called in the run's directory.

        Raises FileNotFoundError where another process has taken the run over; see `check`.
        """
        (self.attempt / name).replace(self.path / target)

    def check(self) -> None:
        """Raise Busy where the attempt is no longer this process's."""
        if not self.attempt.exists():
            raise self._busy("another process has taken over and")

    def release(self, *, keep: bool) -> None:
        """Give the run free; `keep` leaves the attempt's files for the next one to go on from."""
        self._ended.set()
        with contextlib.suppress(OSError):
            (self.attempt / CLAIM).unlink(missing_ok=True)
            if not keep:
                shutil.rmtree(self.attempt)
            self.attempt.rmdir()  # which leaves one with files alone
        _unlock(self._lock)


def latest(path: Path) -> Path | None:
    """The attempt of the highest number in a run's directory."""
    found = [entry for entry in path.iterdir() if _ATTEMPT.fullmatch(entry.name)]
    return max(found, key=_number, default=None)


def alive(path: Path) -> bool:
    """Whether a process is at work on the run: by its lock, or by its claim on another machine.

    Of another machine it is a guess, by the clocks of the two.
    """
    try:
        _unlock(lock(path))
    except Busy:
        return True
    except OSError:
        return False
    found = latest(path)
    owner = {} if found is None else _read(found)
    if found is None or not owner or _is_here(owner):
        return False
    renewed = _renewed(found)
    return renewed is not None and abs(time.time() - renewed / 1e9) < LEASE


def lock(path: Path, patience: float = 0.0) -> int | None:
    """Lock a directory or file; None where the file system has no locks.

    A look whether it is alive holds the lock for a moment: have patience. Raises Busy.
    """
    handle, until = os.open(path, os.O_RDONLY), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            os.close(handle)
            raise Busy(f"{path}: another process is computing this run") from None
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                return None
            raise


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _number(attempt: Path) -> int:
    found = _ATTEMPT.fullmatch(attempt.name)
    assert found is not None
    return int(found[1])


def _here() -> dict[str, str]:
    """What tells this machine, since it was started, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return {"host": socket.gethostname(), "boot": boot.read_text().strip()}
    return {"host": socket.gethostname(), "boot": ""}


def _is_here(owner: dict[str, Any]) -> bool:
    return {name: owner.get(name) for name in ("host", "boot")} == _here()


def _exists(pid: Any) -> bool:
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _read(attempt: Path) -> dict[str, Any]:
    """An attempt's claim; empty where it is free, or claimed by nobody that can be named."""
    try:
        owner = json.loads((attempt / CLAIM).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):  # somebody's all the same, until its lease is over
        return {"host": "another machine"}
    return owner if isinstance(owner, dict) and owner else {"host": "another machine"}


def _renewed(attempt: Path) -> int | None:
    """When a claim was last renewed, in ns of the file system's clock; None if it is free.

    Opened first: a network file system looks anew at a file that is opened.
    """
    try:
        with (attempt / CLAIM).open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
