"""What the death of a process leaves behind, without one."""

import os

from gradflow.store import RunWriter


def die(writer: RunWriter) -> None:
    """The lock goes with the process; its claim stays and is renewed no longer."""
    writer._claim._ended.set()
    os.close(writer._claim._lock)
