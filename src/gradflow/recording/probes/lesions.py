"""What a trained network loses when blocks are taken out or change places."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError, SpecError
from gradflow.recording.modules import block_owners, is_block, wrap_terms
from gradflow.recording.probes.passes import Reading, blocks_of, untouched


@contextlib.contextmanager
def deleted(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """In this block the named modules hand on what they are given: y = x.

    Of a block (a module that declares `terms`, as `Skip` does) x is what its skip is given, a
    shortcut's output where shapes change; what follows the sum, such as an activation, stays. Of
    any other module x is its first argument.

    Raises:
        SpecError: no module of that name; in a forward pass, one whose output has another shape
            than x.
    """
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as undo:
        for name in names:
            if name not in modules:
                raise SpecError(f"names={name}: the model has no such module")
            module = modules[name]
            if is_block(module):
                undo.callback(wrap_terms(module, partial(_input_as_terms, name)))
            else:
                undo.callback(module.register_forward_hook(partial(_input_as_output, name)).remove)
        yield


@contextlib.contextmanager
def swapped(model: nn.Module, a: str, b: str) -> Iterator[None]:
    """In this block two modules have each other's parameters and buffers.

    Raises:
        SpecError: no module of that name, or their parameters or buffers differ in name or shape.
    """
    modules = dict(model.named_modules())
    for name in (a, b):
        if name not in modules:
            raise SpecError(f"names={name}: the model has no such module")
    if _structure(modules[a]) != _structure(modules[b]):
        raise SpecError(f"names={a},{b}: they differ in the names or shapes of their parameters")
    pairs = list(zip(_state(modules[a]), _state(modules[b]), strict=True))
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def lesion(
    model: nn.Module,
    accuracy: Callable[[], float],
    inputs: Tensor,
    *,
    seed: int,
    blocks: Sequence[str] | None = None,
    several: Sequence[int] = (2, 3, 5, 10),
    draws: int = 5,
    swaps: int = 10,
) -> list[Reading]:
    """The accuracy of the model, whole and with blocks deleted or swapped, in evaluation mode.

    Veit et al. 2016 (arXiv 1605.06431, §4): a residual network loses little by one block, a plain
    one everything. A block can be deleted where its branch has the shape of what its skip is given,
    so that in plain networks those that change shapes cannot, and with skips they can: for a
    matched comparison name the `blocks`.

    Args:
        accuracy: evaluates the model as it stands.
        inputs: any batch, for one pass that tells which blocks can be deleted.
        seed: of the draws.
        blocks: which to delete and swap; by default all that can be deleted.
        several: how many to delete together, where there are as many.
        draws: random choices for each of these numbers.
        swaps: random pairs to swap, of all whose parameters have equal names and shapes.

    Returns:
        `lesion_none`, the whole model's; `lesion_delete` of each `layer` alone, in order of
        execution; `lesion_delete_several` at the number of `blocks`; and `lesion_swap` of `layer`,
        the module that has the block's parameters, with the one of the block at place `other`
        among those deleted, from 0.

    Raises:
        GradflowError: the model has no block, or none that can be deleted.
        SpecError: one of `blocks` cannot.
    """
    possible = _deletable(model, inputs)
    for name in blocks or ():
        if name not in possible:
            raise SpecError(f"blocks={name}: allowed is {', '.join(possible) or 'none'}")
    chosen = possible if blocks is None else [name for name in possible if name in blocks]
    if not chosen:
        raise GradflowError("lesion: no block has a branch of the shape of its input")
    draw = random.Random(seed)

    def without(names: Sequence[str]) -> float:
        with deleted(model, names):
            return float(accuracy())

    with untouched(model), torch.no_grad():
        model.eval()
        readings = [Reading("lesion_none", without([]))]
        readings += [Reading("lesion_delete", without([name]), layer=name) for name in chosen]
        readings += [
            Reading("lesion_delete_several", without(names), x_name="blocks", x=float(len(names)))
            for count in several
            if count <= len(chosen)
            for names in [draw.sample(chosen, count) for _ in range(draws)]
        ]
        pairs, owners = _like_pairs(model, chosen), block_owners(model)
        for a, b in sorted(draw.sample(pairs, min(swaps, len(pairs)))):
            layer, other = owners[chosen[a]], owners[chosen[b]]
            with swapped(model, layer, other):
                value = float(accuracy())
            readings.append(Reading("lesion_swap", value, layer=layer, x_name="other", x=float(b)))
    return readings


def _input_as_terms(name: str, terms: Any, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(name, x, branch)
    return x, torch.zeros_like(x)


def _input_as_output(name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
    _check_shapes(name, args[0], output)
    x: Tensor = args[0]
    return x


def _check_shapes(name: str, x: Tensor, output: Tensor) -> None:
    if x.shape != output.shape:
        shapes = " to ".join("x".join(map(str, t.shape)) for t in (x, output))
        raise SpecError(f"names={name}: cannot be deleted, it changes the shape, {shapes}")


def _deletable(model: nn.Module, inputs: Tensor) -> list[str]:
    """Blocks whose branch has the shape of x in every call, in order of execution."""
    fits: dict[str, bool] = {}

    def look(name: str, terms: Any, x: Tensor, branch: Tensor) -> Any:
        fits[name] = fits.get(name, True) and x.shape == branch.shape
        return terms(x, branch)

    with contextlib.ExitStack() as undo, untouched(model), torch.no_grad():
        for name, block in blocks_of(model).items():
            undo.callback(wrap_terms(block, partial(look, name)))
        model.eval()
        model(inputs)
    return [name for name, fit in fits.items() if fit]


def _like_pairs(model: nn.Module, blocks: Sequence[str]) -> list[tuple[int, int]]:
    """Places of blocks whose owners have parameters of equal names and shapes."""
    modules, owners = dict(model.named_modules()), block_owners(model)
    made = [_structure(modules[owners[name]]) if name in owners else [] for name in blocks]
    return [
        (a, b) for a, b in itertools.combinations(range(len(blocks)), 2) if made[a] == made[b] != []
    ]


def _named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _state(module: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in _named_state(module)]


def _structure(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in _named_state(module)]


def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        a.data, b.data = b.data, a.data
