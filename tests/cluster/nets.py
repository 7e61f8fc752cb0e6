"""A network whose building does what its arguments say; found by import path in the jobs."""

import os
import signal
import time
from pathlib import Path

from torch import nn

held = []


def build(do="", until="", count=""):
    if count:
        with Path(count).open("a") as file:
            file.write("built\n")
    if do == "raise":
        raise ValueError("of the user's making")
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while do == "hoard":
        held.append(bytearray(b"x") * 50_000_000)
        time.sleep(0.1)
    while until and not Path(until).exists():
        time.sleep(0.05)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
