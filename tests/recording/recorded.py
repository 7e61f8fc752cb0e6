"""What the tests of recording share: how a record is made and read, and norms by hand."""

import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from gradflow import Recorder, Skip
from gradflow.recording.schedules import every

ALWAYS = every(1)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


near = partial(pytest.approx, abs=0)
"""Relative tolerance alone: pytest's own absolute one hides what is small."""


def norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach().double()).item()


def rms(*tensors: Tensor) -> float:
    """Over all elements of all of them."""
    squares = sum(norm(tensor) ** 2 for tensor in tensors)
    return math.sqrt(squares / sum(tensor.numel() for tensor in tensors))


def cells(frame: pd.DataFrame, quantity: str) -> dict[tuple[int, str], float | None]:
    """(step, layer) -> value; None where it was not measured."""
    values = frame[quantity]
    listed = [None if null else v for v, null in zip(values, values.isna(), strict=True)]
    keys = zip(frame["step"].tolist(), frame["layer"].tolist(), strict=True)
    return dict(zip(keys, listed, strict=True))


def column(recorder: Recorder, table: str, quantity: str, step: int = 0) -> dict[str, Any]:
    """layer -> value at a step."""
    known = cells(recorder.table(table), quantity)
    return {layer: value for (at, layer), value in known.items() if at == step}


def steps_of(recorder: Recorder, table: str) -> list[int]:
    return sorted(set(recorder.table(table)["step"].tolist()))


def record(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> Recorder:
    """One recorded step."""
    with Recorder(model, **options) as recorder:
        value = loss()
        value.backward()
        recorder.step(value)
    return recorder


def on_ranks(program: str, world: int, *arguments: Any) -> list[Any]:
    """What each of the processes that run `program` prints, as JSON.

    Their arguments are rank, world, a free port, and those given.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, (rank, world, port, *arguments))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, said
    return [json.loads(out) for out, _ in said]


def loop(recorder: Recorder, count: int) -> None:
    """So many steps on random inputs of shape (3, 4)."""
    for _ in range(count):
        recorder.model.zero_grad()
        recorder.model(torch.randn(3, 4)).square().mean().backward()
        recorder.step()


class Block(nn.Module):
    """Somebody's own block around a `Skip`."""

    def __init__(self, skip: Skip, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=dtype)
        self.skip = skip.to(dtype)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        branch = self.inner(torch.tanh(x))
        self.seen.append((x, branch))
        return self.skip(x, branch)
