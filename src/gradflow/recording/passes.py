"""What is seen of a model's forward and backward passes: outputs, blocks, and their gradients."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradflow.recording import elements
from gradflow.recording.buffers import Buffer
from gradflow.recording.execution import is_batched, is_repeated, is_transformed, will_be_repeated
from gradflow.recording.layers import Layer, Layers
from gradflow.recording.modules import (
    Watch,
    all_tensors,
    ignore,
    stand_in,
    takes_hooks,
    tensors_of,
)
from gradflow.recording.norms import norm
from gradflow.recording.weights import Weights

_NAMED = 5  # layers that a message names at most

_OF_OUTPUTS = {
    "output_rms": norm,
    "output_max": elements.largest,
    "output_nonfinite": elements.nonfinite,
}
_OF_GRADIENTS = {
    "output_grad_norm": norm,
    "output_grad_zeros": elements.zeros,
    "output_grad_subnormals": elements.subnormals,
}
"""What makes a number of a tensor."""
_Measures = tuple[tuple[str, Callable[[Tensor], Tensor]], ...]


class Wanted:
    """What a step measures, by table; of outputs apart by what it is made of."""

    def __init__(self, tables: Mapping[str, frozenset[str]]):
        self._tables = tables
        names = self.of("outputs")
        self.outputs: _Measures = tuple((n, f) for n, f in _OF_OUTPUTS.items() if n in names)
        self.gradients: _Measures = tuple((n, f) for n, f in _OF_GRADIENTS.items() if n in names)
        self.units = names & {"output_spread", "dead_units"}

    def of(self, table: str) -> frozenset[str]:
        """The quantities of a table."""
        return self._tables.get(table, frozenset())


class Passes:
    """Watches a model from `attach` to `detach`, and adds to buffers what a step wants.

    Attributes:
        wanted: what the step under way measures.
        count: forward passes of the model in it.
        range: the fewest and the most of them in a step so far.
        seconds: spent on measuring.
    """

    def __init__(self, layers: Layers, buffers: Mapping[str, Buffer], weights: Weights):
        self.wanted = Wanted({})
        self.count = 0
        self.range = (0, 0)
        self.seconds = 0.0
        self._layers, self._buffers, self._weights = layers, buffers, weights
        self._told = False  # whether it was looked for layers whose outputs cannot be read
        self._closed: set[int] = set()  # owners in whose outputs no tensor was found, before that
        self._missed = False  # whether it was said that gradients are missing
        self._undo: list[Callable[[], None]] = []
        self._hooks: dict[int, Callable[[], None]] = {}  # owner -> undo of those on its output
        self._entering: dict[int, Callable[[], None]] = {}  # the same, of those before it
        self._terms: list[tuple[Any, Callable[..., Any]]] = []  # of blocks, what is around them
        self._attached: tuple[Any, ...] | None = None  # for what hooks are there
        self._samples = 0  # in the forward pass under way, or that is repeated
        self._sizes: set[int] = set()  # numbers of samples in the step's passes
        # What outlives a pass, a parameter say, has one hook a step for each that looks: key ->
        # handle, and the tensor, whose id is in the key.
        self._on_leaves: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self._through: dict[tuple[int, int], list[Tensor]] = {}  # what came to one through a skip
        self._handled: list[BaseException | None] = []  # what was handled as a pass began
        self._joining = self._paused = False
        self._evaluates = False  # whether a forward pass of the model began without gradients
        self._was_paused = False  # in the step under way
        self._under_way = 0  # counts what is collected for a step, and what was dropped

    # --- what is watched --------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Watch passes of the model; of its layers, what `expect` says."""
        before, after = Watch(self._before_pass, ignore), Watch(self._on_pass, ignore)
        if takes_hooks(model):
            self._undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(model.register_forward_hook(after, always_call=True).remove)
        for index, block in enumerate(self._layers.blocks):
            terms, undo = stand_in(block)
            self._terms.append((terms, partial(self._on_terms, index)))
            self._undo.append(undo)

    def detach(self) -> None:
        """Leave the model as it was, and drop what was seen since the last step."""
        for terms, around in self._terms:
            terms.switch(around, on=False)
        for undo in (*self._undo, *self._hooks.values(), *self._entering.values()):
            undo()
        for hooks in (self._undo, self._hooks, self._entering, self._handled, self._terms):
            hooks.clear()
        self._attached = None
        self.forget()

    def expect(self, wanted: Wanted) -> None:
        """Put hooks on what the step to come measures, and on what it has to follow."""
        self.wanted = wanted
        if "noise_scale" in wanted.of("weights"):
            self._watch_passes()
        measures_outputs, measures_blocks = map(bool, map(wanted.of, ("outputs", "blocks")))
        layers = self._layers
        attached = measures_outputs, measures_blocks, layers.follows_all, layers.version
        if self._attached == attached:
            return
        self._attached = attached
        self.say_what_has_changed()
        for (terms, around), row in zip(self._terms, layers.select("blocks"), strict=True):
            terms.switch(around, on=measures_blocks or layers.follows(row))
        rows = layers.select("outputs")
        for index, module in enumerate(layers.owners):
            if not takes_hooks(module):
                continue
            if layers.is_placed(rows[index]) and not measures_outputs:
                self._hooks.pop(index, ignore)()
            elif index not in self._hooks:
                watch = Watch(partial(self._on_output, index), ignore)
                # In front of the user's, as these may change the output: put behind them, it would
                # be another one that is measured after each time that hooks are put on again.
                self._hooks[index] = module.register_forward_hook(watch, prepend=True).remove
            if not layers.follows(rows[index]):
                self._entering.pop(index, ignore)()
            elif index not in self._entering and rows[index].kind != "block":
                watch = Watch(partial(self._on_enter, rows[index]), ignore)
                self._entering[index] = module.register_forward_pre_hook(watch).remove

    def _watch_passes(self) -> None:
        self._weights.watch_passes(lambda: self._paused)

    # --- measuring --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """See `Recorder.paused`."""
        outer, self._paused = self._paused, True
        self._was_paused = True
        try:
            yield
        finally:
            self._paused = outer

    def _watching(self) -> bool:
        return (
            not self._paused
            and torch.is_grad_enabled()
            and not is_transformed()
            and not is_repeated()
        )

    def _before_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._handled.append(sys.exception())
        if not self.count and self._weights.are_others_watched():
            self._watch_passes()
        self._evaluates = not torch.is_grad_enabled()
        if self._watching():
            self._layers.begin()
            inputs = next(all_tensors((args, kwargs)), None)
            self._samples = 0 if inputs is None or not inputs.dim() else len(inputs)

    def _on_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """After each forward pass of the model; after one that raised, without an output."""
        handled = self._handled.pop() if self._handled else None
        self._evaluates = False
        if not self._watching():
            return
        if output is None and sys.exception() is not handled:
            self.forget()
        else:
            self.count += 1
            self._sizes.add(self._samples)
            if len(self._sizes) > 1:  # which of them is repeated in backward is not known
                self._samples = 0

    def forget(self) -> None:
        """Drop what was seen since the last step."""
        for buffer in self._buffers.values():
            buffer.forget()
        self._layers.forget()
        self.end_step()

    def close(self, step: int, world: int, scale: Tensor | None) -> None:
        """Make rows of `step` of what was seen since the one before; see `Buffer.close`."""
        for table, buffer in self._buffers.items():
            if table != "weights" and self.wanted.of(table):
                buffer.close(step, world, scale)
        self._layers.close()
        if self.count:
            fewest, most = self.range
            self.range = min(fewest or self.count, self.count), max(most, self.count)

    def end_step(self) -> None:
        """What is seen from now on is another step's."""
        for handle, _ in self._on_leaves.values():
            handle.remove()
        self._on_leaves.clear()
        self._through.clear()
        self._weights.end_passes()
        self._under_way += 1
        self.count = 0
        self._sizes.clear()
        self._was_paused = self._paused

    def _on_enter(self, row: Layer, *_: Any) -> None:
        if self._paused or not self._layers.follows(row):
            return
        if self._watching():
            self._layers.enter(row)
        elif not self._evaluates and will_be_repeated():
            self._layers.enter(row, again=True)

    def _on_output(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watching():
            return
        tensors = tensors_of(output)
        row = self._layers.rows[index]
        if not self._layers.is_placed(row):
            self._layers.called(row, tensors, joining=self._joining)
        if not (tensors or self._told or output is None or any(True for _ in all_tensors(output))):
            self._closed.add(index)
        began = time.perf_counter()
        wanted = self.wanted
        for tensor in tensors:
            if wanted.outputs:
                self._add("outputs", index, wanted.outputs, tensor.detach())
            if wanted.gradients and tensor.requires_grad:
                self._watch_gradient("outputs", index, wanted.gradients, tensor)
        if tensors and wanted.units:
            self._look_at_units(index, module, tensors[0])
        self.seconds += time.perf_counter() - began

    def _look_at_units(self, index: int, module: nn.Module, output: Tensor) -> None:
        wanted = self.wanted.units
        if "output_spread" in wanted:
            spread = elements.spread(output.detach(), self._samples)
            if spread is not None:
                self._put("outputs", index, "output_spread", spread, 1)
        if "dead_units" in wanted and output.requires_grad:
            axis = elements.unit_axis(module, output, self._samples)
            if axis is not None and output.dim() > 1:
                look = partial(self._look_at_reached, index, axis)
                self._on_backward(output, look, "dead_units", index)

    def _look_at_reached(self, index: int, axis: int, gradient: Tensor) -> None:
        reached = elements.reached_units(gradient, axis)
        each = gradient.numel() // len(reached)
        self._put("outputs", index, "dead_units", reached, each)

    def _on_terms(
        self, index: int, original: Callable[..., Any], x: Tensor, branch: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        row = self._layers.select("blocks")[index]
        self._on_enter(row)
        if not self._watching():
            return original(x, branch)
        self._layers.called(row, None, joining=True)
        outer, self._joining = self._joining, True
        try:
            if not self.wanted.of("blocks"):
                return original(x, branch)
            return self._measure_terms(index, original, x, branch)
        finally:
            self._joining = outer

    def _measure_terms(
        self, index: int, original: Callable[..., Any], x: Tensor, branch: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        buffer, wanted = self._buffers["blocks"], self.wanted.of("blocks")
        if wanted & {"branch_x_grad_norm", "x_grad_cosine"} and x.requires_grad:
            x = self._watch_split(index, wanted, x)
        # A view of its own sees the gradient that comes this way alone; none comes where the term
        # does not depend on it, and then it is exactly zero.
        x = x.view_as(x)
        for name, tensor in (("skip_grad_norm", x), ("branch_grad_norm", branch)):
            if name in wanted and tensor.requires_grad:
                buffer.expect(index, name)
                self._watch_gradient("blocks", index, ((name, norm),), tensor)
        skip_term, branch_term = original(x, branch)
        began = time.perf_counter()
        if "skip_rms" in wanted:
            if skip_term is None:
                buffer.expect(index, "skip_rms")
            else:
                self._add("blocks", index, (("skip_rms", norm),), skip_term.detach())
        if "branch_rms" in wanted:
            self._add("blocks", index, (("branch_rms", norm),), branch_term.detach())
        self.seconds += time.perf_counter() - began
        return skip_term, branch_term

    def _watch_split(self, index: int, wanted: frozenset[str], x: Tensor) -> Tensor:
        """Measure what comes to `x` through the skip, of which the view returned is for, beside
        all that comes to it."""
        through = self._through.setdefault((index, id(x)), []) if x.is_leaf else []
        view = x.view_as(x)

        def look(gradient: Tensor) -> None:
            skip = sum(through, torch.zeros_like(gradient))
            through.clear()
            precision = torch.finfo(gradient.dtype).eps
            if gradient.element_size() < 4:
                gradient, skip = gradient.float(), skip.float()
            rest = gradient - skip
            if "branch_x_grad_norm" in wanted:
                self._put("blocks", index, "branch_x_grad_norm", norm(rest), rest.numel())
            if "x_grad_cosine" in wanted:
                is_clear = norm(rest) > precision * norm(gradient)
                cosine = torch.where(is_clear, elements.cosine(skip, rest), torch.nan)
                self._put("blocks", index, "x_grad_cosine", cosine, 1)

        self._on_backward(view, through.append)
        self._on_backward(x, look, "split", index)
        return view

    def _add(self, table: str, index: int, measures: _Measures, tensor: Tensor) -> None:
        for name, measure in measures:
            self._put(table, index, name, measure(tensor), tensor.numel())

    def _put(self, table: str, index: int, name: str, value: Tensor, count: int) -> None:
        known = value.item() if self._layers.on_cpu and not value.dim() else value
        self._buffers[table].add(index, name, known, count)

    def _watch_gradient(self, table: str, index: int, measures: _Measures, tensor: Tensor) -> None:
        look = partial(self._add, table, index, measures)
        self._on_backward(tensor, look, table, index, measures)

    def _on_backward(self, tensor: Tensor, look: Callable[[Tensor], None], *what: Any) -> None:
        """Have `look`, which is for `what`, see the gradient with respect to a tensor in this step.

        A parameter that several passes return is one tensor, and each pass back reaches all hooks
        on it.
        """
        hook = partial(self._on_gradient, self._under_way, look)
        if not tensor.is_leaf:
            tensor.register_hook(hook)
        elif (key := (id(tensor), *what)) not in self._on_leaves:
            self._on_leaves[key] = tensor.register_hook(hook), tensor

    def _on_gradient(
        self, under_way: int, look: Callable[[Tensor], None], gradient: Tensor
    ) -> None:
        if under_way == self._under_way and not (self._paused or is_batched(gradient)):
            began = time.perf_counter()
            look(gradient.detach())
            self.seconds += time.perf_counter() - began

    # --- what cannot be read ----------------------------------------------------------------------

    def say_what_is_unread(self, has_gradient: np.ndarray) -> None:
        """Name, once, the layers with a gradient whose outputs should be measured and are not."""
        if self._told or self._was_paused or not self.wanted.of("outputs"):
            return
        self._told = bool(has_gradient.any())
        rows = self._layers.select("outputs")
        learning = np.flatnonzero(has_gradient).tolist()
        unread = [rows[i].layer for i in learning if not self._layers.was_executed(rows[i])]
        closed = [rows[i].layer for i in learning if i in self._closed]
        for layers, why in (
            (unread, "torch.compile runs, or TorchScript, or that are used without being called"),
            (closed, "return no tensor, nor a tuple, list, dict or dataclass with one"),
        ):
            if layers:
                warnings.warn(
                    f"gradflow: outputs are not recorded of layers that {why}: {_shown(layers)}",
                    stacklevel=5,
                )

    def say_what_is_missing(self) -> None:
        """Say, once, that no parameter has a gradient in a step that has called the model."""
        if self._missed or not self.count:
            return
        learning = [p for p in self._layers.parameters() if p is not None and p.requires_grad]
        if learning and all(parameter.grad is None for parameter in learning):
            self._missed = True
            warnings.warn(
                "gradflow: no parameter has a gradient at Recorder.step, and none is recorded: "
                "call it after backward and before zero_grad; an optimizer that steps within "
                "backward must leave `.grad` there until then",
                stacklevel=5,
            )

    def say_what_has_changed(self) -> None:
        """Name, once, the layers whose parameters are others than they were, or new: null now."""
        changed = self._layers.drop_changed()
        if changed:
            warnings.warn(
                "gradflow: modules were replaced or added, or have other parameters than when the "
                "recorder was made, and are not recorded any more (another Recorder sees what is "
                f"there now): {_shown(changed)}",
                stacklevel=5,
            )


def _shown(layers: Sequence[str]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
