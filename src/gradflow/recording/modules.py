"""What recording sees in a module: name, kind, its output's tensors, whether it is a block."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMALISATIONS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm,
)  # fmt: skip

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def kind_of(module: nn.Module) -> str:
    """`conv`, `linear`, `norm`, `embedding` or `other`."""
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Linear | nn.Bilinear):
        return "linear"
    if isinstance(module, _NORMALISATIONS):
        return "norm"
    return "embedding" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else "other"


def name_of(path: str) -> str:
    """A module's name without those that torch.compile, DDP and the like put around it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def class_name(module: nn.Module) -> str:
    """Of the class that its user wrote: `fully_shard` puts another in its place."""
    name = type(module).__name__
    is_sharded = any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    return name.removeprefix("FSDP") if is_sharded else name


def tensors_of(output: Any) -> list[Tensor]:
    """The different floating-point tensors in a module's output, each once.

    One, or those in tuples, lists, dicts and dataclasses; none that is sparse or nested.
    """
    if isinstance(output, Tensor):  # almost always
        is_plain = output.layout == torch.strided and not output.is_nested
        return [output] if is_plain and output.is_floating_point() and output.numel() else []
    different = {id(tensor): tensor for tensor in all_tensors(output)}
    return [tensor for found in different.values() for tensor in tensors_of(found)]


def values_of(tensor: Tensor) -> Tensor:
    """The elements that a sparse tensor has, each once."""
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()


def all_tensors(value: Any, around: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Those in tuples, lists, dicts and dataclasses, of any kind."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in around:  # what contains itself would have no end
        for item in _items(value):
            yield from all_tensors(item, (*around, id(value)))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A field may be without a value yet.
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return ()


# --- blocks ---------------------------------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    """Whether its class declares `terms(x, branch)`."""
    terms = getattr(type(module), "terms", None)
    names = list(inspect.signature(terms).parameters) if inspect.isfunction(terms) else []
    return names[1:] == ["x", "branch"]


def block_owners(model: nn.Module) -> dict[str, str]:
    """Block -> the module that has the block's parameters, those of its branch included.

    A block that makes its branch itself is its own. One that is handed its branch, as `Skip` is,
    belongs to the module directly around it; it has no owner, and is left out, where that one is
    around several.
    """
    blocks = {name: module for name, module in model.named_modules() if is_block(module)}
    within = Counter(name.rpartition(".")[0] for name in blocks)
    owners = {}
    for name, block in blocks.items():
        around = name.rpartition(".")[0]
        handed = len(inspect.signature(type(block).forward).parameters) > 2
        if not handed:
            owners[name] = name
        elif within[around] == 1:
            owners[name] = around
    return owners


class Watch:
    """Calls the recorder; in a copy of the model, or compiled, what stood there without it."""

    def __init__(self, call: Callable[..., Any], instead: Callable[..., Any]):
        self._call, self._instead = call, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here, before anything that changes is looked at: it would be compiled again each time.
        if torch.compiler.is_compiling():
            return self._instead(*args, **kwargs)
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Of Python's own, that a stored model can be loaded where there is no gradflow.
        return partial, (self._instead,)


ignore: Callable[..., None] = contextlib.nullcontext().__exit__
"""A hook that does nothing; a function of ours could not be stored without naming gradflow."""


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been asked to run it, or TorchScript does."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module, "_orig_mod") or not takes_hooks(module)


def takes_hooks(module: nn.Module) -> bool:
    """Whether it may have hooks: what `torch.jit` has scripted or traced may not."""
    return not isinstance(module, torch.jit.ScriptModule)


class Terms(Watch):
    """A block's `terms`, in whose place it stands as long as any recorder has a use for it.

    Several recorders may be around them, and come and go in any order.
    """

    def __init__(self, original: Callable[..., Any]):
        super().__init__(original, original)
        self.users = 0
        self.around: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        terms = self._instead
        # In this order: what is compiled must not depend on who is around.
        if not torch.compiler.is_compiling() and self.around:
            for around in self.around:
                terms = partial(around, terms)
        return terms(*args, **kwargs)

    def switch(self, around: Callable[..., Any], on: bool) -> None:
        """Whether calls go through `around(original, x, branch)`.

        Where they do not, what stands there costs next to nothing: to take it away and put it back
        would have torch.compile compile the block again.
        """
        if on != (around in self.around):
            self.around.append(around) if on else self.around.remove(around)


def stand_in(block: nn.Module) -> tuple[Terms, Callable[[], None]]:
    """What stands in the place of `block.terms` from now on, and the undoing."""
    if not isinstance(vars(block).get("terms"), Terms):
        block.terms = Terms(block.terms)  # type: ignore[assignment, arg-type]
    terms: Any = block.terms
    terms.users += 1

    def undo() -> None:
        terms.users -= 1
        if not terms.users and vars(block).get("terms") is terms:
            del block.terms

    return terms, undo


def wrap_terms(block: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `block.terms` go through `around(original, x, branch)`; returns the undoing."""
    terms, leave = stand_in(block)
    terms.switch(around, True)

    def undo() -> None:
        terms.switch(around, False)
        leave()

    return undo
