"""Measures parameters and their gradients, and makes of each module's own ones a value."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradflow.recording import elements
from gradflow.recording.buffers import Buffer
from gradflow.recording.layers import Layers
from gradflow.recording.modules import values_of
from gradflow.recording.norms import Norms
from gradflow.recording.shards import local, share
from gradflow.recording.updates import parameters_of

Tensors = Sequence[Tensor | None]
_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")

_COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "grad_nonfinite": elements.nonfinite,
    "grad_zeros": elements.zeros,
    "grad_subnormals": elements.subnormals,
}
_ROUNDING = 1e-6
"""Of a squared norm: what is left of it below that is no signal."""


@dataclass
class _Plan:
    """For parameters' tensors of which the same are there, in the same shapes, again and again."""

    present: list[bool]
    is_dense: bool
    norms: Norms
    measured: np.ndarray


@dataclass
class Found:
    """Of each module: the L2 norm over all of its own parameters' tensors that are there.

    Attributes:
        norms: [modules], 0 where none is.
        measured: [modules], whether any is.
    """

    norms: Tensor
    measured: np.ndarray


class Weights:
    """The quantities of the table `weights`."""

    def __init__(self, layers: Layers, buffer: Buffer | None, world: int):
        self._layers, self._buffer, self._device = layers, buffer, layers.device
        own, parameters = layers.own, layers.parameters()
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._module = [module for module, places in enumerate(own) for _ in places]
        self._modules = torch.tensor(self._module, dtype=torch.int64, device=self._device)
        self._shares = [share(p, world) for p in parameters] if layers.sharded else None
        self._plans: dict[str, _Plan] = {}
        self._wanted: Collection[str] = ()  # at the step that was recorded last
        self._store: list[Tensor] = []  # copies of parameters, kept to be written again
        self._before: list[Tensor | None] | None = None  # parameters as they were
        self._weight_norms: Tensor | None = None
        self._updated: set[int] = set()  # ids of the parameters that were, since the step
        self.previous: list[Tensor | None] | None = None  # gradients of the step before
        self._passes: dict[int, list[Tensor]] = {}  # place -> squared norms, one a backward pass
        self._others: dict[int, Tensor] = {}  # place -> squared norm of what else `.grad` has
        self._hooks: list[tuple[Any, Any]] = []  # handle, the node it is on
        self._watched: list[tuple[Any, ...]] = []  # these parameters, as they were

    def gradients(self, optimizer: Optimizer | None) -> list[Tensor | None]:
        """Of each parameter, as it is; of what that optimizer updates, if one is given."""
        parameters = self._layers.parameters()
        if optimizer is None:
            return [None if p is None else p.grad for p in parameters]
        updated = parameters_of(optimizer)
        return [p.grad if p is not None and id(p) in updated else None for p in parameters]

    def measure(self, gradients: Tensors, scale: Tensor | None) -> Found:
        """Norms of gradients, divided by `scale` where there is one."""
        found = self._norms("gradients", gradients)
        return found if scale is None else replace(found, norms=found.norms / scale)

    def record(
        self,
        wanted: Collection[str],
        step: int,
        gradients: Tensors,
        found: Found,
        scales: tuple[Tensor | None, Tensor | None],
        passes: int,
        keep: bool,
    ) -> None:
        """The row of `step`, with what `measure` has found.

        Args:
            scales: by what gradients are to be divided, and what backward passes had been.
            passes: how many forward passes there were, 0 where that is not known.
            keep: whether the next step needs this one's gradients.
        """
        self._wanted = wanted
        if self._buffer is not None and wanted:
            self._buffer.open(step)
            if "weight_grad_norm" in wanted:
                self._fill("weight_grad_norm", found.norms, found.measured)
            if "weight_norm" in wanted or "update_ratio" in wanted:
                self._record_parameters()
            self._record_elements(gradients, scales[0])
            if "grad_cosine" in wanted and self.previous is not None:
                self._record_cosines(gradients, self.previous)
            if "grad_rank" in wanted:
                self._record_ranks(gradients)
            if "noise_scale" in wanted:
                self._record_noise(gradients, scales, passes)
            if "update_norm" in wanted or "update_ratio" in wanted:
                self._before = self._copies()
        self.previous = None
        if keep:
            self.previous = [None if g is None else _dense(g).clone() for g in gradients]

    def forget(self) -> None:
        """Drop what was kept for the update of the step before."""
        self._before = None
        self._updated.clear()

    def clear(self) -> None:
        """Drop all that was kept of any step."""
        self.forget()
        self.previous, self._store = None, []
        self._plans.clear()  # small tensors are copied into theirs

    # --- norms ------------------------------------------------------------------------------------

    def _norms(self, of: str, tensors: Tensors, less: Tensors = ()) -> Found:
        """Of the parameters' tensors, or of what they are more than `less`."""
        present = [tensor is not None for tensor in tensors]
        there = self._local([t for t in tensors if t is not None])
        others = [t for t in less if t is not None] or None
        plan = self._plans.get(of)
        if plan is not None and plan.is_dense and plan.present == present:
            with contextlib.suppress(RuntimeError):  # other shapes
                return Found(plan.norms(there, others), plan.measured)
        plan = self._plans[of] = self._plan(present, there)
        stored = there if plan.is_dense else [_stored(t) for t in there]
        return Found(plan.norms(stored, others), plan.measured)

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local, tensors)) if self._layers.sharded else tensors

    def _plan(self, present: list[bool], there: list[Tensor]) -> _Plan:
        places = [place for place, is_there in enumerate(present) if is_there]
        groups = [self._module[place] for place in places]
        shares = None if self._shares is None else list(itertools.compress(self._shares, present))
        stored = [_stored(tensor) for tensor in there]
        is_dense = all(map(operator.is_, stored, there))
        norms = Norms(stored, groups, len(self._layers.own), shares)
        return _Plan(present, is_dense, norms, self._measured(present))

    def _measured(self, present: Sequence[bool]) -> np.ndarray:
        """Of each module, whether any of its own parameters is there."""
        return np.array([any(present[place] for place in own) for own in self._layers.own], bool)

    def _fill(self, name: str, values: Tensor, measured: np.ndarray, count: Any = 1) -> None:
        assert self._buffer is not None
        self._buffer.fill(name, values, measured, count)

    def _record_parameters(self) -> None:
        found = self._norms("weights", self._layers.parameters())
        self._weight_norms = found.norms
        if "weight_norm" in self._wanted:
            self._fill("weight_norm", found.norms, found.measured)

    # --- updates ----------------------------------------------------------------------------------

    def _copies(self) -> list[Tensor | None]:
        """The parameters as they are, in the copies of last time where their shapes fit."""
        parameters = self._layers.parameters()
        there = self._local([p for p in parameters if p is not None])
        if not _copied(there, self._store):
            self._store = [p.clone() for p in there]
        copies = iter(self._store)
        return [None if p is None else next(copies) for p in parameters]

    def updated(self, optimizer: Optimizer, *, last: bool) -> None:
        """Record what an optimizer has added, if the step wants it; `last`: no other follows."""
        if self._before is None or self._buffer is None or not self._buffer.steps:
            return  # not measured at this step, or the step has left the buffer
        self._updated |= parameters_of(optimizer)
        found = self._norms("updates", *self._moved())
        if "update_norm" in self._wanted:
            self._fill("update_norm", found.norms, found.measured)
        if "update_ratio" in self._wanted:
            assert self._weight_norms is not None
            self._fill("update_ratio", found.norms / self._weight_norms, found.measured)
        if last:
            self._before = None

    def _moved(self) -> tuple[Tensors, Tensors]:
        """Parameters as they are and as they were, of those that any optimizer updated."""
        assert self._before is not None
        pairs = [
            (after, before)
            if after is not None
            and before is not None
            and id(after) in self._updated
            and (self._layers.sharded or after.shape == before.shape)
            else (None, None)
            for after, before in zip(self._layers.parameters(), self._before, strict=True)
        ]
        return [after for after, _ in pairs], [before for _, before in pairs]

    # --- details ----------------------------------------------------------------------------------

    def _record_elements(self, gradients: Tensors, scale: Tensor | None) -> None:
        counted = [name for name in _COUNTED if name in self._wanted]
        if not counted and "grad_max" not in self._wanted:
            return
        present = [gradient is not None for gradient in gradients]
        measured = self._measured(present)
        there = self._local([g for g in gradients if g is not None])
        stored = [_stored(t) for t in there]
        shares = None if self._shares is None else list(itertools.compress(self._shares, present))
        sizes = [0 if gradient is None else gradient.numel() for gradient in gradients]
        whole = np.array([sum(sizes[place] for place in own) for own in self._layers.own])
        for name in counted:
            counts = [_COUNTED[name](t).to(self._dtype) for t in stored]
            if name == "grad_zeros":  # those that a sparse gradient does not store
                absent = [t.numel() - s.numel() for t, s in zip(there, stored, strict=True)]
                counts = [count + more for count, more in zip(counts, absent, strict=True)]
            if shares is not None:
                counts = [count * part**2 for count, part in zip(counts, shares, strict=True)]
            self._fill(name, self._sums(self._spread(present, counts)), measured, whole)
        if "grad_max" in self._wanted:
            peaks = self._spread(present, [elements.largest(t).to(self._dtype) for t in stored])
            largest = peaks.new_zeros(len(measured)).scatter_reduce_(
                0, self._modules, peaks, "amax"
            )
            self._fill("grad_max", largest if scale is None else largest / scale, measured)

    def _spread(self, present: Sequence[bool], values: Sequence[Tensor]) -> Tensor:
        """One value a place, 0 where nothing is there."""
        found = iter(values)
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        return torch.stack([next(found) if is_there else zero for is_there in present])

    def _sums(self, values: Tensor) -> Tensor:
        """By module, of one value a parameter."""
        return values.new_zeros(len(self._layers.own)).index_add_(0, self._modules, values)

    def _record_cosines(self, gradients: Tensors, previous: Tensors) -> None:
        pairs = [
            None if now is None or then is None or now.shape != then.shape else (now, then)
            for now, then in zip(gradients, previous, strict=True)
        ]
        present = [pair is not None for pair in pairs]
        both = [
            (_dense(p[0]).to(self._dtype), p[1].to(p[0].device, self._dtype))
            for p in pairs
            if p is not None
        ]
        products, here, there = (
            self._sums(self._spread(present, [(a * b).sum() for a, b in tensors]))
            for tensors in (both, [(a, a) for a, _ in both], [(b, b) for _, b in both])
        )
        cosines = products / (here.sqrt() * there.sqrt())
        self._fill("grad_cosine", cosines, self._measured(present))

    def _record_ranks(self, gradients: Tensors) -> None:
        ranks, present = [], []
        for own in self._layers.own:
            found = [g for g in (gradients[place] for place in own) if g is not None]
            matrix = max(map(_dense, found), key=lambda g: (g.dim(), g.numel()), default=None)
            present.append(matrix is not None and matrix.dim() > 1)
            if present[-1]:
                assert matrix is not None
                ranks.append(elements.effective_rank(matrix).to(self._dtype))
        self._fill("grad_rank", self._spread(present, ranks), np.array(present))

    @torch.enable_grad()
    def watch_passes(self, is_paused: Callable[[], bool]) -> None:
        """Measure each backward pass of the step to come by itself."""
        self.end_passes()
        self._watched = self._present()
        for place, parameter in enumerate(self._layers.parameters()):
            if parameter is not None and parameter.requires_grad:
                # What adds to `.grad`: hooks of the parameter itself see `autograd.grad` too.
                node: Any = parameter.view_as(parameter).grad_fn
                node = node.next_functions[0][0]
                hook = partial(self._on_pass, place, parameter, is_paused)
                self._hooks.append((node.register_prehook(hook), node))

    def are_others_watched(self) -> bool:
        """Whether others are in the place of the parameters watched, or their shape or format is.

        What the hook is on keeps to these, and autograd fails, or goes past it, where they change.
        """
        return bool(self._hooks) and self._watched != self._present()

    def _present(self) -> list[tuple[Any, ...]]:
        return [(id(p), p.shape, p.dtype) for p in self._layers.parameters() if p is not None]

    def _on_pass(
        self,
        place: int,
        parameter: Tensor,
        is_paused: Callable[[], bool],
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        """Before `gradients` are added to `parameter.grad`."""
        gradient = gradients[0]
        if gradient is None:
            return
        if is_paused():
            if place in self._passes:
                self._others[place] = self._others.get(place, 0.0) + self._squares(gradient)
            return
        if place not in self._passes and parameter.grad is not None:  # zero, if it was zeroed
            self._others[place] = self._squares(parameter.grad)
        self._passes.setdefault(place, []).append(self._squares(gradient))

    def _squares(self, gradient: Tensor) -> Tensor:
        return _stored(gradient).detach().to(self._dtype).square().sum()

    def end_passes(self) -> None:
        """The step is over."""
        while self._hooks:
            self._hooks.pop()[0].remove()
        self._passes.clear()
        self._others.clear()

    def _record_noise(
        self, gradients: Tensors, scales: tuple[Tensor | None, Tensor | None], passes: int
    ) -> None:
        """From the n passes' gradients h, which sum up to H; zero in a pass that has none.

        McCandlish et al.'s estimates (appendix A.1) with batches of 1 and of n passes, of which
        n h and H are the gradients: |G|² = n (|H|² − Σ|h|²) / (n − 1), and
        tr(Σ) = n (n Σ|h|² − |H|²) / (n − 1). Not where a gradient has more in it than these, nor
        where passes back are not those forward: of two losses on one batch, say.
        """
        count = max(map(len, self._passes.values()), default=0)
        there = {place: g for place, g in enumerate(gradients) if g is not None}
        if count < 2 or passes not in (0, count) or not there:
            return
        present = [place in there for place in range(len(gradients))]
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        squares = []
        for place, gradient in there.items():
            whole, parts = self._squares(gradient), self._passes.get(place)
            if parts is None:  # left by an earlier step, or zero
                squares.append((whole, zero, whole))
            else:
                squares.append((whole, torch.stack(parts).sum(), self._others.get(place, zero)))
        together, single, other = (
            self._sums(self._spread(present, column)) for column in zip(*squares, strict=True)
        )
        left, scale = (1.0 if s is None else s**2 for s in scales)
        together, single = together / left, single / scale
        signal = together - single
        is_clear = (signal > _ROUNDING * together) & (other == 0)
        noise = torch.where(is_clear, (count * single - together) / signal, torch.nan)
        self._fill("noise_scale", noise, self._measured(present))


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _copied(tensors: list[Tensor], store: list[Tensor]) -> bool:
    """Whether the tensors could be written into the store."""
    if any(list(map(of, tensors)) != list(map(of, store)) for of in (_SHAPE, _DTYPE)):
        return False
    torch._foreach_copy_(store, tensors)
    return True


def _stored(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else values_of(tensor)
