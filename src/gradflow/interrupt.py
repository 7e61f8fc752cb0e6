"""How a process is interrupted: once, whatever comes after; and what it prints, by its reader."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """Raises KeyboardInterrupt once: a second cause must not disturb the writing of the end.

    A handler for SIGINT and SIGTERM, or called for any other cause.
    """

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, number: int = 0, frame: FrameType | None = None) -> None:
        if not self._seen:
            self._seen = True
            raise KeyboardInterrupt


def of_interrupt(error: BaseException | None) -> bool:
    """Whether an exception is a KeyboardInterrupt, or what some library has made of one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed to a pipe whose other end is closed is lost in silence: `head` saw enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
