"""What a run goes on from, bit for bit: written at the end of an epoch, and every five minutes.

A checkpoint holds the parameters and buffers, the optimizer, the schedule, the gradient scaler, the
recorder's place, and how many updates were made; batch order and what a network draws at random
follow from (seed, epoch) and (seed, update). It names the part files of the record that belong to
it, so that what was recorded after it is measured again and nothing is there twice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from gradflow.spec import RECIPE, RunSpec
from gradflow.store import CHECKPOINT

SECONDS = (2.0, 300.0)
"""Between checkpoints: an epoch that ends earlier has none; later, any update has one."""


def write_checkpoint(attempt: Path, spec: RunSpec, state: dict[str, Any]) -> None:
    """Write atomically: a kill, or a full disk, leaves the one before or this one.

    Raises:
        OSError: it cannot be written.
    """
    temporary = attempt / f".{CHECKPOINT}.tmp"
    try:
        torch.save(state | {"run_id": spec.run_id, "recipe": RECIPE}, temporary)
    except RuntimeError as error:  # of torch's own writer
        temporary.unlink(missing_ok=True)
        raise OSError(str(error).strip().splitlines()[0]) from None
    temporary.replace(attempt / CHECKPOINT)


def read_checkpoint(attempt: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The run's last checkpoint on the CPU; None where there is none that can be gone on from."""
    with contextlib.suppress(Exception):  # damaged in whatever way: the run begins again
        state: dict[str, Any] = torch.load(
            attempt / CHECKPOINT, map_location="cpu", weights_only=True
        )
        if state["run_id"] == spec.run_id and state["recipe"] == RECIPE:
            return state
    return None
