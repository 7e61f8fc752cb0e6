"""Passes through a model that leave it as it was, and what is read in them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gradflow.errors import GradflowError
from gradflow.recording.modules import is_block, kind_of, tensors_of


@dataclass(frozen=True, slots=True)
class Reading:
    """One number that a probe measured.

    Attributes:
        probe: what was measured.
        layer: name of the module, None for one of the whole model.
        x_name, x: what the number is a function of (`lag`, `index`, …), and where.
    """

    probe: str
    value: float
    layer: str | None = None
    x_name: str | None = None
    x: float | None = None


def propagate(model: nn.Module, inputs: Tensor, *, seed: int) -> None:
    """A forward and a backward pass of L = Σ r·y, r ~ N(0, 1): a random linear readout.

    ∂L/∂y has unit variance and no direction of its own, as theory wants it. Gradients are added to
    `.grad`, and the passes leave their usual trace, for a `Recorder` to read.

    Args:
        seed: r depends on it and on the shape of y = model(inputs), not on type or device.
    """
    output = output_of(model(inputs))
    output.backward(readout(output, seed))


def readout(output: Tensor, seed: int) -> Tensor:
    """r ~ N(0, 1) for an output: the same numbers in every type and on every device."""
    numbers = torch.randn(
        output.shape,
        generator=Generator().manual_seed(seed),
        dtype=torch.float32,
        device="cpu",
    )
    return numbers.to(output)


def output_of(output: Any) -> Tensor:
    """The first floating-point tensor of what a module returned.

    Raises:
        GradflowError: there is none.
    """
    tensors = tensors_of(output)
    if not tensors:
        raise GradflowError("the model's output has no floating-point tensor with elements")
    return tensors[0]


def differentiable(inputs: Tensor) -> Tensor:
    """The same numbers as a leaf of a graph; whole numbers, which have no gradient, as they are."""
    inputs = inputs.detach()
    return inputs.requires_grad_() if inputs.is_floating_point() else inputs


def wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def cast_copy(model: nn.Module, inputs: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Model and inputs in another type, the given ones untouched; on the CPU if it needs that."""
    twin, inputs = copy.deepcopy(model), inputs.detach()
    if dtype == torch.float64 and inputs.device.type == "mps":
        twin, inputs = twin.cpu(), inputs.cpu()
    return twin.to(dtype), inputs.to(dtype) if inputs.is_floating_point() else inputs


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Passes in this block, with gradients, after which the model is as it was.

    Modes and torch's random generators are put back, so that two blocks in a row draw the same
    numbers; buffers have stand-ins meanwhile. Parameters and their `.grad` are for the block itself
    to leave alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        try:
            for module, name, buffer in buffers:
                setattr(module, name, buffer.clone())
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters have no `.grad` in this block, and theirs again afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """By name: blocks, norms, and all modules with floating-point parameters of their own."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if is_block(module)
        or kind_of(module) == "norm"
        or any(p.is_floating_point() for p in module.parameters(recurse=False))
    }


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name.

    Raises:
        GradflowError: there is no block.
    """
    blocks = {name: module for name, module in model.named_modules() if is_block(module)}
    if not blocks:
        raise GradflowError("the model has no block: none of its modules declares terms(x, branch)")
    return blocks


def observe(
    probe: str,
    model: nn.Module,
    inputs: Tensor,
    measure: Callable[[Tensor], Tensor | None],
    modules: Mapping[str, nn.Module] | None = None,
) -> list[Reading]:
    """A forward pass without gradients, and a reading of each module's output.

    Args:
        measure: output -> a 0-d tensor, None where it has no such thing. Several calls of a module
            read as their mean.
        modules: by name; by default those `watched`.

    Returns:
        Readings in the order in which the modules were first done.
    """
    found: dict[str, list[Tensor]] = {}

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = next(iter(tensors_of(output)), None)
        value = None if tensor is None else measure(tensor)
        if value is not None:
            found.setdefault(name, []).append(value)

    chosen = watched(model) if modules is None else modules
    handles = [m.register_forward_hook(partial(look, name)) for name, m in chosen.items()]
    try:
        with untouched(model), torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [
        Reading(probe, torch.stack(values).mean().item(), layer=name)
        for name, values in found.items()
    ]
