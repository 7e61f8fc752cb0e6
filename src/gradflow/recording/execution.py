"""Whether the code under way is what the user's step computes, or something around it."""

from __future__ import annotations

import sys

import torch
from torch.autograd import function
from torch.utils import checkpoint


def is_repeated() -> bool:
    """Whether activation checkpointing repeats a pass that has been seen, within backward.

    True for `use_reentrant=False`, whose first pass built the graph. The other kind's first pass
    runs without gradients, and its repetition is the one that builds it.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and is_inside("unpack_hook", checkpoint.__file__)


def will_be_repeated() -> bool:
    """Whether this is the first pass of activation checkpointing that its backward repeats.

    PyTorch's with `use_reentrant=True`, or another's: an `autograd.Function` around layers, whose
    forward runs without gradients.
    """
    return not torch.is_grad_enabled() and is_inside("apply", function.__file__)


def is_transformed() -> bool:
    """Whether torch.func differentiates or vectorises: no tensor has a value of its own here."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(gradient: torch.Tensor) -> bool:
    """Whether it is of a batched backward pass (`is_grads_batched`), of several losses at once."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def is_inside(name: str, file: str) -> bool:
    """Whether a function of that name in that file is under way."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_code.co_filename == file:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
