"""How a process is interrupted: once, whatever comes after."""

from __future__ import annotations

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
