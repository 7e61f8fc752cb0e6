"""How far training moved the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gradflow.errors import SpecError
from gradflow.recording.modules import block_owners
from gradflow.recording.norms import norms
from gradflow.recording.probes.passes import Reading


def displacement(model: nn.Module, initial: nn.Module) -> list[Reading]:
    """`displacement` ‖W_T − W₀‖/‖W₀‖ of each module with parameters of its own, and each block.

    L2 norms over all of a module's own parameters together, weights and biases; for the module that
    has a block's parameters (`layer1.0`, say) over all of them, branch, norms and shortcut. Exactly
    0 where nothing moved; inf or nan where W₀ is zero.

    Args:
        initial: the same model with the parameters W₀.

    Returns:
        Readings in the order of the module tree, a block before its layers.

    Raises:
        SpecError: the models' parameters differ in name or shape.
    """
    before = dict(initial.named_parameters(remove_duplicate=False))
    now = dict(model.named_parameters(remove_duplicate=False))
    shapes = [{name: p.shape for name, p in known.items()} for known in (now, before)]
    if shapes[0] != shapes[1]:
        raise SpecError("initial: its parameters differ from the model's in name or shape")
    whole = set(block_owners(model).values())
    readings = []
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = [f"{dot}{name}" for name, _ in module.named_parameters(recurse=prefix in whole)]
        own = [name for name in own if now[name].is_floating_point()]
        if own:
            layer = prefix or type(module).__name__
            readings.append(Reading("displacement", _moved(now, before, own), layer=layer))
    return readings


def _moved(
    now: Mapping[str, nn.Parameter], before: Mapping[str, nn.Parameter], names: Sequence[str]
) -> float:
    """Over all these parameters together."""
    starts = [before[name].detach().to(now[name]) for name in names]
    steps = [now[name].detach() - start for name, start in zip(names, starts, strict=True)]
    moved, start = (torch.linalg.vector_norm(norms(tensors)) for tensors in (steps, starts))
    return (moved / start).item()
