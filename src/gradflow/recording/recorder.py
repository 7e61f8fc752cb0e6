"""Watches any `nn.Module` in any training loop and records how the gradient flows through it.

    with gradflow.Recorder(model) as recorder:
        for images, labels in batches:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            recorder.step(loss)
            optimizer.step()
    recorder.plot()

Values go into preallocated buffers on the model's device and leave them in chunks; on a GPU no
step waits for the device. Nothing that is measured changes what is computed: parameters after k
recorded steps are bitwise those without a recorder.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import SpecError
from gradflow.ranks import Ranks
from gradflow.recording import buffers, elements
from gradflow.recording import quantities as registry
from gradflow.recording.buffers import Buffer, Drained, over_ranks
from gradflow.recording.execution import is_batched, is_repeated, is_transformed, will_be_repeated
from gradflow.recording.flight import Flight, Rule
from gradflow.recording.layers import Layer, Layers
from gradflow.recording.modules import Watch, all_tensors, ignore, is_compiled, stand_in, tensors_of
from gradflow.recording.norms import check_group, gather, norm
from gradflow.recording.quantities import Conditions, Quantity
from gradflow.recording.schedules import Schedule, scheduled
from gradflow.recording.shards import ranks_of, reduce
from gradflow.recording.updates import Updates
from gradflow.recording.weights import Weights

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure

    from gradflow.store import RunWriter


_NAMED = 5  # layers that a message names at most
_WATCHING: weakref.WeakSet[Recorder] = weakref.WeakSet()


@dataclass(frozen=True)
class Divergence:
    """The first step whose loss or gradient was not finite, and where it began.

    `layer` is the module nearest the input whose forward value was not finite, else the module
    farthest from it whose gradient was not; None where neither was measured at that step.
    """

    step: int
    layer: str | None
    quantity: str


class Recorder:
    """Records gradient flow through `model`; a context manager for any loop.

    Call `step` once an update, after `backward` (and after unscaling and reducing, before
    clipping) and before `optimizer.step()`. All forward passes since the step before count for
    it, whatever mode the model is in: evaluate under `torch.no_grad()`, or in `paused()`. Where a
    forward pass of the model raises, what was seen of outputs and blocks since the step before is
    dropped. Of an update under way when the block ends nothing is recorded.

    Args:
        model: any module. Recorded are all modules with floating-point parameters of their own,
            and as blocks those whose class declares `terms(x, branch) -> (skip term or None,
            branch term)`, as `gradflow.Skip` does: the two are added up, not changed in place. A
            parameter shared by modules counts for the first.
        quantities: `default` (norms), `all` (those of updates too), `details` (what else there
            is), names (see `gradflow.recording.quantities`), or several of these.
        schedule: `step -> bool`, for all that is recorded, or by table (its norms), `details`, or
            quantity. By default gradients of weights every step, all else every tenth and the first
            five, but `grad_rank` every hundredth.
        optimizer: one or several. Gives the learning rate, lets one that evaluates its closure
            repeatedly (L-BFGS) count a single step for an update, and is needed for `update_norm`,
            which copies the parameters on the steps that measure it (null for what none of them
            updates, and where buffers were emptied before the update).
        save: a directory (`runs/NAME`) that becomes a run of the store with `origin: external`.
        meta: what describes that run, `{"depth": 56, "skip": "none", "seed": 0}`: the columns by
            which comparisons pair.
        flight: a number of steps: all norms are then measured at every step, and what the schedule
            does not ask for is kept that long, to be written as the table `flight` where loss or
            gradient is not finite, or `rule` holds for the first time. `story` tells what led to
            it.
        rule: of the step's numbers, `lambda row: row["grad_norm"] > 1e3`. On a GPU it is asked
            when buffers are emptied.
        scaler: the loop's GradScaler, if it has one: what is recorded is divided by its scale, but
            for parameters' gradients that it has unscaled already; and a gradient that overflows is
            the scaler's to skip, and no divergence.
        ranks: this process's place among those that train the model together, in
            torch.distributed's default group, each with a recorder and an equal share of every
            batch. By default all ranks, where `model` is a DistributedDataParallel or was given to
            `fully_shard` (FSDP2); to be given where DistributedDataParallel is around `model`. What
            is recorded is then of the whole batch and of whole parameters, and of every other
            number given to `step` the mean over the ranks. Only rank 0 keeps it, and only its
            `save` counts. Norms of sharded parameters are put together when buffers are emptied:
            `flush`, `table` and `plot` are then for all ranks to call, and `latest` has no
            `grad_norm`.

    Attributes:
        latest: the last row of the table `steps`: the loss and the other numbers of the last step.
        divergence: where loss or gradient first became non-finite (`Divergence`), or None. Known
            after the step on a CPU, at the next flush on a GPU.
        alarm: the first step at which `rule` held, or None. Known when `divergence` is.
        seconds: the recorder's own time so far.

    Raises:
        SpecError: an unknown quantity, one of updates without an optimizer, or ranks without
            their group.
        StoreError: `save` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        quantities: str | Iterable[str] = "default",
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        save: str | Path | RunWriter | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        flight: int | None = None,
        rule: Rule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        ranks: Ranks | None = None,
    ):
        chosen = registry.select(quantities)
        listed = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        for quantity in chosen.get("weights", ()):
            if quantity.name.startswith("update_") and not listed:
                raise SpecError(
                    f"{quantity.name}: give the optimizer whose updates are to be measured"
                )
        self.model = model
        self.divergence: Divergence | None = None
        self.alarm: int | None = None
        self.seconds = 0.0
        self.next_step = 0
        self.latest: dict[str, Any] = {}
        self._ranks = ranks or ranks_of(model)
        check_group(self._ranks.world)
        self._save = save if self._ranks.rank == 0 else None
        self._meta = dict(meta or {})
        self._updates = Updates(listed, scaler)
        if flight is not None and flight < 1:
            raise SpecError(f"flight={flight}: wants a number of steps, from 1")
        if rule is not None and flight is None:
            raise SpecError("rule: give flight, the number of steps to keep for it")
        self._flight, self._rule = None if flight is None else Flight(flight), rule
        self._writer: RunWriter | None = None
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._on_cpu = self._device.type == "cpu"
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        self._dtype = np.float64 if wide else np.float32

        self._layers = Layers(model)
        owners, blocks = len(self._layers.owners), len(self._layers.blocks)
        sizes = {"weights": owners, "outputs": owners, "blocks": blocks}
        chosen = self._without_unreadable(chosen)
        self._schedules = scheduled(schedule, chosen)
        self._buffers = {
            table: Buffer(sizes[table], columns, self._device)
            for table, columns in chosen.items()
            if sizes[table]
        }
        self._weights = Weights(
            self._layers, self._buffers.get("weights"), self._ranks.world, self._device
        )
        self._different = list(dict.fromkeys(self._schedules.values()))
        self._answers: dict[tuple[bool, ...], _Wanted] = {}  # for each of these
        self._wanted = _Wanted({})
        self._step_rows: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._metrics: dict[str, float] = {}
        self._tables: dict[str, list[pa.Table]] = {}
        self._passes = 0  # forward passes of the model in the step under way
        self._range = (0, 0)  # the fewest and the most of them in a step
        self._told = False  # whether it was looked for layers whose outputs cannot be read
        self._undo: list[Callable[[], None]] = []
        self._hooks: dict[int, Callable[[], None]] = {}  # owner -> undo of those on its output
        self._entering: dict[int, Callable[[], None]] = {}  # the same, of those before it
        self._terms: list[tuple[Any, Callable[..., Any]]] = []  # of blocks, what is around them
        self._attached: tuple[Any, ...] | None = None  # for what; how many layers had a place
        self._samples = 0  # in the forward pass under way, or that is repeated
        self._sizes: set[int] = set()  # numbers of samples in the step's passes
        self._on_leaves: list[Any] = []  # handles of hooks on outputs that outlive a step
        self._handled: list[BaseException | None] = []  # what was handled as a pass began
        self._modules_written = 0
        self._joining = self._paused = False
        self._was_paused = False  # in the step under way
        self._under_way = 0  # counts what is collected for a step, and what was dropped
        self._flushed = time.monotonic()
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """What a recorder needs to number on where this one stands, after a `flush`; plain data."""
        divergence = None if self.divergence is None else asdict(self.divergence)
        return {
            "next_step": self.next_step,
            "seconds": self.seconds,
            "metrics": dict(self._metrics),
            "divergence": divergence,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the recorder of `state` stood; before the first step."""
        self.next_step, self.seconds = state["next_step"], state["seconds"]
        self._metrics = dict(state["metrics"])
        found = state["divergence"]
        self.divergence = None if found is None else Divergence(**found)
        if self._undo:
            self._attach()

    # --- what is watched --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._undo or (self._writer is not None and self._save is not self._writer):
            raise RuntimeError("Recorder: it is watching already, or has saved its run")
        if isinstance(self._save, str | Path):
            self._writer = _external_writer(self._save, self._meta)
        else:
            self._writer = self._save
        self._started = self._flushed = time.monotonic()
        _WATCHING.add(self)
        before, after = Watch(self._before_pass, ignore), Watch(self._on_pass, ignore)
        self._undo.append(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(self.model.register_forward_hook(after, always_call=True).remove)
        for index, block in enumerate(self._layers.blocks):
            terms, undo = stand_in(block)
            self._terms.append((terms, partial(self._on_terms, index)))
            self._undo.append(undo)
        self._undo += self._updates.watch(self._on_update)
        self._attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _WATCHING.discard(self)
        for terms, around in self._terms:
            terms.switch(around, on=False)
        for undo in (*self._undo, *self._hooks.values(), *self._entering.values()):
            undo()
        for hooks in (self._undo, self._hooks, self._entering, self._handled, self._terms):
            hooks.clear()
        self._weights.clear()
        self._attached = None
        self._forget()
        if kind is None or not self._layers.sharded:  # the other ranks may not come this far
            self.flush()
        if isinstance(self._save, str | Path) and self._writer is not None:
            self._finish_external(self._writer, kind, error)

    def _without_unreadable(self, chosen: dict[str, list[Quantity]]) -> dict[str, list[Quantity]]:
        """Leave out, and say so, what several ranks cannot put together."""
        unreadable: set[str] = set()
        if self._ranks.world > 1:
            unreadable |= registry.OF_WHOLE_BATCHES
        if self._layers.sharded:
            unreadable |= registry.OF_WHOLE_PARAMETERS
        left = [q.name for columns in chosen.values() for q in columns if q.name in unreadable]
        if left:
            warnings.warn(
                f"gradflow: not recorded with {self._ranks.world} ranks, which have parts of it "
                f"each: {', '.join(left)}",
                stacklevel=3,
            )
        kept = {
            t: [q for q in columns if q.name not in unreadable] for t, columns in chosen.items()
        }
        return {table: columns for table, columns in kept.items() if columns}

    def _wanted_at(self, step: int) -> _Wanted:
        """What is measured at a step."""
        asked = tuple(schedule(step) for schedule in self._different)
        if asked not in self._answers:
            wanted = {s for s, is_asked in zip(self._different, asked, strict=True) if is_asked}
            self._answers[asked] = _Wanted(
                {
                    table: frozenset(
                        q.name
                        for q in b.chosen
                        if self._schedules[q.name] in wanted or (self._flight and q.is_norm)
                    )
                    for table, b in self._buffers.items()
                }
            )
        return self._answers[asked]

    def _attach(self) -> None:
        """Put hooks on what the step to come measures, and on layers whose place is unknown."""
        self._wanted = self._wanted_at(self.next_step)
        if "noise_scale" in self._wanted.of("weights"):
            self._watch_passes()
        measures_outputs, measures_blocks = map(bool, map(self._wanted.of, ("outputs", "blocks")))
        attached = measures_outputs, measures_blocks, self._layers.executed
        if self._attached == attached:
            return
        self._attached = attached
        self._say_what_is_replaced()
        for (terms, around), row in zip(self._terms, self._layers.select("blocks"), strict=True):
            terms.switch(around, on=measures_blocks or not self._layers.is_placed(row))
        rows = self._layers.select("outputs")
        for index, module in enumerate(self._layers.owners):
            unknown = not self._layers.is_placed(rows[index])
            if not (unknown or measures_outputs):
                self._hooks.pop(index, ignore)()
            elif index not in self._hooks:
                watch = Watch(partial(self._on_output, index), ignore)
                self._hooks[index] = module.register_forward_hook(watch).remove
            if not unknown:
                self._entering.pop(index, ignore)()
            elif index not in self._entering and rows[index].kind != "block":
                watch = Watch(partial(self._on_enter, rows[index]), ignore)
                self._entering[index] = module.register_forward_pre_hook(watch).remove

    def _watch_passes(self) -> None:
        self._weights.watch_passes(lambda: self._paused)

    # --- measuring --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes in this block leave no trace.

        For what is no part of the step: an evaluation that needs gradients, a penalty's gradient,
        a GAN's other pass.
        """
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
        if not self._passes and self._weights.are_others_watched():
            self._watch_passes()
        inputs = next(all_tensors((args, kwargs)), None)
        self._samples = 0 if inputs is None or not inputs.dim() else len(inputs)

    def _on_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """After each forward pass of the model; after one that raised, without an output."""
        handled = self._handled.pop() if self._handled else None
        if not self._watching():
            return
        if output is None and sys.exception() is not handled:
            self._forget()
        else:
            self._passes += 1
            self._sizes.add(self._samples)
            if len(self._sizes) > 1:  # which of them is repeated in backward is not known
                self._samples = 0

    def _forget(self) -> None:
        """Drop what was seen since the last step."""
        for buffer in self._buffers.values():
            buffer.forget()
        self._layers.forget()
        self._end_of_step()

    def _end_of_step(self) -> None:
        while self._on_leaves:
            self._on_leaves.pop().remove()
        self._weights.end_passes()
        self._under_way += 1
        self._passes = 0
        self._sizes.clear()
        self._was_paused = self._paused

    def _on_enter(self, row: Layer, *_: Any) -> None:
        if self._layers.is_placed(row) or self._paused:
            return
        if self._watching():
            self._layers.enter(row)
        elif will_be_repeated():
            self._layers.enter(row, again=True)

    def _on_output(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watching():
            return
        tensors = tensors_of(output)
        row = self._layers.rows[index]
        if not self._layers.is_placed(row):
            self._layers.called(row, tensors, joining=self._joining)
        began = time.perf_counter()
        wanted = self._wanted
        for tensor in tensors:
            if wanted.outputs:
                self._add("outputs", index, wanted.outputs, tensor.detach())
            if wanted.gradients and tensor.requires_grad:
                self._watch_gradient("outputs", index, wanted.gradients, tensor)
        if tensors and wanted.units:
            self._look_at_units(index, module, tensors[0])
        self.seconds += time.perf_counter() - began

    def _look_at_units(self, index: int, module: nn.Module, output: Tensor) -> None:
        wanted = self._wanted.units
        if "output_spread" in wanted:
            spread = elements.spread(output.detach(), self._samples)
            if spread is not None:
                self._put("outputs", index, "output_spread", spread, 1)
        if "dead_units" in wanted and output.requires_grad:
            axis = elements.unit_axis(module, output, self._samples)
            if axis is not None and output.dim() > 1:
                self._on_backward(output, partial(self._look_at_reached, index, axis))

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
            if not self._wanted.of("blocks"):
                return original(x, branch)
            return self._measure_terms(index, original, x, branch)
        finally:
            self._joining = outer

    def _measure_terms(
        self, index: int, original: Callable[..., Any], x: Tensor, branch: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        buffer, wanted = self._buffers["blocks"], self._wanted.of("blocks")
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
        through: list[Tensor] = []
        view = x.view_as(x)

        def look(gradient: Tensor) -> None:
            skip = through.pop() if through else torch.zeros_like(gradient)
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
        self._on_backward(x, look)
        return view

    def _add(self, table: str, index: int, measures: _Measures, tensor: Tensor) -> None:
        for name, measure in measures:
            self._put(table, index, name, measure(tensor), tensor.numel())

    def _put(self, table: str, index: int, name: str, value: Tensor, count: int) -> None:
        known = value.item() if self._on_cpu and not value.dim() else value
        self._buffers[table].add(index, name, known, count)

    def _watch_gradient(self, table: str, index: int, measures: _Measures, tensor: Tensor) -> None:
        self._on_backward(tensor, partial(self._add, table, index, measures))

    def _on_backward(self, tensor: Tensor, look: Callable[[Tensor], None]) -> None:
        """Have `look` see the gradient with respect to a tensor, in the step under way."""
        handle = tensor.register_hook(partial(self._on_gradient, self._under_way, look))
        if tensor.is_leaf:  # a parameter, say: it and the hook would stay
            self._on_leaves.append(handle)

    def _on_gradient(
        self, under_way: int, look: Callable[[Tensor], None], gradient: Tensor
    ) -> None:
        if under_way == self._under_way and not (self._paused or is_batched(gradient)):
            began = time.perf_counter()
            look(gradient.detach())
            self.seconds += time.perf_counter() - began

    def _on_update(self, optimizer: Optimizer) -> None:
        began = time.perf_counter()
        with torch.no_grad():
            self._weights.updated(optimizer, last=len(self._updates.optimizers) == 1)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        optimizer: Optimizer | None = None,
        **values: Tensor | float,
    ) -> bool:
        """Record this update's gradients: after `backward`, before the optimizer's step.

        Args:
            loss: the step's training loss.
            optimizer: which one is about to step, where there are several: gradients are then those
                of what it updates.
            values: more numbers for the table `steps`, such as `accuracy`.

        Returns:
            False where this step's loss or gradient is known not to be finite. On a GPU that is
            known at the next flush only, from `divergence`.
        """
        if not self._undo:
            raise RuntimeError("Recorder.step outside its `with` block: nothing is watched there")
        if self._updates.again:
            self._forget()
            return loss is None or not self._on_cpu or math.isfinite(loss)
        if {"step", "grad_norm"} & set(values):
            raise SpecError("Recorder.step: step and grad_norm are the recorder's own columns")
        self._weights.forget()
        if self._due():
            self.flush()
        began = time.perf_counter()
        lr = self._updates.learning_rate(optimizer)
        given = {"loss": loss, "lr": lr} | self._over_ranks({"loss": loss, **values})
        kept = {name: _kept(value) for name, value in given.items() if value is not None}
        self._close_passes()
        total = self._record_weights(optimizer)
        self._end_of_step()
        self.latest = kept if total is None else kept | {"grad_norm": _kept(total)}
        self._step_rows.append(self.latest | {"step": self.next_step})
        if self._layers.sharded:
            self.latest.pop("grad_norm", None)  # of this rank's part alone
        finite = not self._on_cpu or self._non_finite(self.latest) is None
        is_known = self._on_cpu and not self._layers.sharded
        alarmed = is_known and self._alarms(self.latest, self.next_step)
        self._updates.recorded()
        self.next_step += 1
        self._attach()
        self.seconds += time.perf_counter() - began
        if alarmed or (not finite and self.divergence is None):
            self.flush()
        return finite

    def _alarms(self, row: Mapping[str, Any], step: int) -> bool:
        """Whether the rule holds for the first time."""
        if self._rule is None or self.alarm is not None or not self._rule(row):
            return False
        self.alarm = step
        return True

    def _close_passes(self) -> None:
        """Make rows of what was seen in forward and backward passes since the step before."""
        scale = self._updates.loss_scale(self._device)
        for table, buffer in self._buffers.items():
            if table != "weights" and self._wanted.of(table):
                buffer.close(self.next_step, self._ranks.world, scale)
        self._layers.close()
        if self._passes:
            fewest, most = self._range
            self._range = min(fewest or self._passes, self._passes), max(most, self._passes)

    def _record_weights(self, optimizer: Optimizer | None) -> Tensor | None:
        """The step's row of the table `weights`, if it measures one; the norm of all gradients."""
        gradients = self._weights.gradients(optimizer)
        scale = self._updates.loss_scale(self._device)
        left = scale if self._updates.are_scaled(optimizer) else None
        found = self._weights.measure(gradients, left)
        self._say_what_is_unread(found.measured)
        follows = self._schedules.get("grad_cosine")
        keep = follows is not None and follows(self.next_step + 1)
        wanted = self._wanted.of("weights")
        scales = left, scale
        self._weights.record(wanted, self.next_step, gradients, found, scales, self._passes, keep)
        return norm(found.norms) if found.measured.any() else None

    def _say_what_is_unread(self, has_gradient: np.ndarray) -> None:
        """Name, once, the layers with a gradient whose outputs should be measured and are not."""
        if self._told or self._was_paused or not self._wanted.of("outputs"):
            return
        self._told = True
        unread = [
            row.layer
            for row, has_one in zip(self._layers.select("outputs"), has_gradient, strict=True)
            if has_one and self._layers.nearest(row.layer) is None
        ]
        if unread:
            warnings.warn(
                "gradflow: outputs are not recorded of layers that torch.compile runs, or that are "
                f"used without being called: {_shown(unread)}",
                stacklevel=4,
            )

    def _say_what_is_replaced(self) -> None:
        """Name, once, the layers whose module is in the model no more: null from now on."""
        gone = self._layers.drop_replaced()
        if gone:
            warnings.warn(
                "gradflow: modules were replaced after the recorder was made, and are not recorded "
                f"any more (another Recorder sees those in their place): {_shown(gone)}",
                stacklevel=4,
            )

    def _over_ranks(self, values: dict[str, Any]) -> dict[str, Any]:
        """Means over the ranks, of what there is."""
        present = {name: value for name, value in values.items() if value is not None}
        if self._ranks.world == 1 or not present:
            return present
        mine = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64, device=self._device)
                for value in present.values()
            ]
        )
        return dict(zip(present, gather(mine, self._ranks.world).mean(dim=0), strict=True))

    @property
    def _compiled(self) -> bool:
        return any(map(is_compiled, self.model.modules()))

    def evaluate(self, split: str, *, step: int | None = None, **metrics: Tensor | float) -> None:
        """Record metrics (`loss`, `accuracy`, …) of a split at the present parameters.

        Args:
            step: how many updates these have had, if not as many as steps were recorded.
        """
        if self._writer is not None and self._writer.record["status"] != "running":
            raise RuntimeError("Recorder.evaluate after its `with` block: the run is finished")
        numbers = {name: float(value) for name, value in metrics.items()}
        at = self.next_step if step is None else step
        self._evaluations.append({"step": at, "split": split} | numbers)
        self._metrics |= {f"{split}_{name}": value for name, value in numbers.items()}

    def first_to_last(self) -> float | None:
        """Weight-gradient norm of the first convolution over that of the last, at the last step.

        Linear layers where there are no convolutions. Waits for the device; None where the last
        step's gradients were not measured, or no rank has them whole.
        """
        buffer = self._buffers.get("weights")
        if (
            self._layers.sharded
            or buffer is None
            or "weight_grad_norm" not in buffer.index
            or not buffer.steps
        ):
            return None
        rows = [
            (self._layers.place(row, i), row.kind)
            for i, row in enumerate(self._layers.select("weights"))
            if self._layers.is_placed(row)
        ]
        for kind in ("conv", "linear"):
            order = sorted(place for place, known in rows if known == kind)
            if len(order) > 1:
                first, last = (buffer.current("weight_grad_norm")[order[i][-1]] for i in (0, -1))
                return float(first / last)
        return None

    # --- leaving the device -----------------------------------------------------------------------

    def _due(self) -> bool:
        if any(buffer.full for buffer in self._buffers.values()):
            return True
        waited = time.monotonic() - self._flushed
        return len(self._step_rows) >= buffers.FLUSH_STEPS or (
            self._writer is not None and waited > buffers.FLUSH_SECONDS and not self._layers.sharded
        )

    def flush(self) -> None:
        """Empty the buffers into tables (and files). Waits for the device."""
        began = time.perf_counter()
        self._say_what_is_replaced()
        drained = {name: buffer.drain() for name, buffer in self._buffers.items()}
        steps, self._step_rows = _plain(self._step_rows), []
        if self._layers.sharded and steps:
            self._put_together(drained, steps)
        for name, found in drained.items():
            found.finish(self._buffers[name].chosen)
        events = [] if self.alarm is None else [self.alarm]
        if not self._on_cpu or self._layers.sharded:
            events = [row["step"] for row in steps if self._alarms(row, row["step"])]
        if self.divergence is None:
            self.divergence = self._first_divergence(steps, drained)
            events += [] if self.divergence is None else [self.divergence.step]
        if self._writer is not None and steps and self._layers.executed > self._modules_written:
            from gradflow import schema

            self._writer.write("modules", schema.table("modules", self._layers.columns()))
            self._modules_written = self._layers.executed
        if self._flight is not None:
            self._write_flight(self._flight, drained, steps, events)
        for name, found in drained.items():
            self._emit(name, self._long_columns(name, found))
        if steps:
            self._emit("steps", _columns(steps, "step", np.int32))
        if self._evaluations:
            self._emit("evaluations", _columns(self._evaluations, "step", np.int32))
            self._evaluations = []
        self._flushed = time.monotonic()
        self.seconds += time.perf_counter() - began

    def _write_flight(
        self,
        flight: Flight,
        drained: dict[str, Drained],
        steps: list[dict[str, Any]],
        events: list[int],
    ) -> None:
        """Write what led to the events, if any; leave the tables what the schedules ask for."""
        flight.keep(drained, steps)
        layers = {name: self._layers.select(name) for name in self._buffers}
        chosen = {name: buffer.chosen for name, buffer in self._buffers.items()}
        for step in events:
            self._emit("flight", flight.columns(step, layers, chosen))
        flight.forget()
        for name, found in drained.items():
            for column, quantity in enumerate(chosen[name]):
                asked = map(self._schedules[quantity.name], found.steps.tolist())
                asked_for = np.fromiter(asked, bool, len(found.steps))
                # Another array: the flight record has this one.
                found.measured = found.measured.copy() if column == 0 else found.measured
                found.measured[:, :, column] &= asked_for[:, None]

    def _put_together(self, drained: dict[str, Drained], steps: list[dict[str, Any]]) -> None:
        """Make values of this rank's part of the parameters those of the whole."""
        world = self._ranks.world
        if "weights" in drained:
            reduce(drained["weights"], self._buffers["weights"].chosen, world, self._device)
        totals = [row.get("grad_norm", 0.0) for row in steps]
        mine = torch.tensor(totals, dtype=torch.float64, device=self._device)
        known = torch.tensor([int("grad_norm" in row) for row in steps], device=self._device)
        totals = over_ranks(gather(mine, world), "norm").tolist()
        for row, total, is_known in zip(
            steps, totals, gather(known, world).sum(dim=0).tolist(), strict=True
        ):
            if is_known:
                row["grad_norm"] = total

    def _emit(self, name: str, columns: dict[str, Any]) -> None:
        if not len(columns["step"]) or self._ranks.rank > 0:
            return
        from gradflow import schema

        data = schema.table(name, columns, registry.meanings(self._conditions()))
        if self._writer is not None:
            self._writer.append(name, data)
        else:
            self._tables.setdefault(name, []).append(data)

    def _conditions(self) -> Conditions:
        scaled = self._updates.scaler is not None
        return Conditions(self._ranks.world, self._range, scaled, self._compiled)

    def _long_columns(self, name: str, found: Drained) -> dict[str, Any]:
        """Columns step, layer and one a quantity; layers in order of position, masked if null."""
        import pyarrow as pa

        rows = self._layers.select(name)
        order = sorted(range(len(rows)), key=lambda i: self._layers.place(rows[i], i))
        values, measured = found.values[:, order], found.measured[:, order]
        kept = measured.any(axis=2)
        row, layer = np.nonzero(kept)
        names = pa.array([rows[i].layer for i in order], pa.string())
        indices = pa.array(layer.astype(np.int32))
        columns: dict[str, Any] = {
            "step": found.steps[row],
            "layer": pa.DictionaryArray.from_arrays(indices, names),
        }
        for column, quantity in enumerate(self._buffers[name].chosen):
            with np.errstate(over="ignore"):  # a norm beyond float32 reads inf there
                numbers = values[:, :, column][kept].astype(self._dtype)
            columns[quantity.name] = np.ma.masked_array(numbers, ~measured[:, :, column][kept])
        return columns

    # --- divergence -------------------------------------------------------------------------------

    def _non_finite(self, row: Mapping[str, Any]) -> str | None:
        if not math.isfinite(row.get("loss", 0.0)):
            return "loss"
        if self._updates.scaler is None and not math.isfinite(row.get("grad_norm", 0.0)):
            return "grad_norm"
        return None

    def _first_divergence(
        self, steps: list[dict[str, Any]], drained: Mapping[str, Drained]
    ) -> Divergence | None:
        for row in steps:
            quantity = self._non_finite(row)
            if quantity is not None:
                found = self._origin(row["step"], drained)
                return Divergence(row["step"], *(found or (None, quantity)))
        return None

    def _origin(self, step: int, drained: Mapping[str, Drained]) -> tuple[str, str] | None:
        """The module at which `step` went wrong: forward from the input, else backward."""
        forward: list[Any] = []
        backward: list[Any] = []
        for table, found in drained.items():
            rows = self._layers.select(table)
            for place in np.flatnonzero(found.steps == step):
                for column, quantity in enumerate(self._buffers[table].chosen):
                    values = found.values[place, :, column]
                    bad = found.measured[place, :, column] & ~np.isfinite(values)
                    side = backward if quantity.is_gradient else forward
                    if (quantity.is_gradient and quantity.is_norm) or quantity.reduction == "rms":
                        side += [
                            (self._layers.place(rows[i], i), rows[i].layer, quantity.name)
                            for i in np.flatnonzero(bad).tolist()
                        ]
        if forward:
            return min(forward)[1:]
        return max(backward)[1:] if backward else None

    def locate_forward(self, forward: Callable[[], Any]) -> str | None:
        """The first module, in order of execution, whose output is not finite in `forward()`.

        For a step whose outputs were not measured: repeat its forward pass with this. None where
        all outputs are finite. With several ranks all call it, and it is the first over them all.
        """
        found: list[int] = []

        def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(bool(t.isfinite().all()) for t in tensors_of(output)):
                found.append(index)

        handles = [
            module.register_forward_hook(partial(look, index))
            for index, module in enumerate(self._layers.owners)
        ]
        try:
            with torch.no_grad():
                forward()
        finally:
            for handle in handles:
                handle.remove()
        if self._ranks.world > 1:
            index = found[0] if found else -1
            place = self._layers.place(self._layers.rows[index])[0] if found else 2**62
            mine = torch.tensor([place, index], device=self._device)
            _, index = min(gather(mine, self._ranks.world).tolist())
            found = [index] if index >= 0 else []
        return self._layers.rows[found[0]].layer if found else None

    # --- what was recorded ------------------------------------------------------------------------

    def table(self, name: str) -> pd.DataFrame:
        """A table so far, as a frame: its own columns and, for layers, those of modules.parquet.

        Args:
            name: weights, outputs, blocks, steps, evaluations, flight or modules.
        """
        import pandas as pd

        from gradflow import schema
        from gradflow.store import Run

        self.flush()
        modules = schema.table("modules", self._layers.columns())
        if name == "modules":
            return schema.to_pandas(modules)
        if name not in schema.KEYS:
            raise ValueError(f"table {name!r}: there are {', '.join(schema.KEYS)}")
        if self._writer is not None:
            data = Run(self._writer.path).table(name)
        else:
            parts = self._tables.get(name)
            data = schema.concatenate(parts) if parts else None
        if data is None:
            return pd.DataFrame()
        return schema.to_pandas(schema.with_modules(data, modules))

    def story(self) -> str:
        """What led to the first divergence or alarm, in words; empty where there was none.

        Wants `flight`.
        """
        from gradflow.flight import story

        return "\n".join(story(self.table("flight")))

    def plot(self, step: int | None = None) -> Figure:
        """The profile: gradient norm of each module's weights against position, log scale.

        Of a network whose blocks have skips, below it and along the same layers, the norm of the
        gradient that each block's skip and branch receive.

        Args:
            step: which step; by default the first and the last at which either was measured.
        """
        from gradflow import plots

        weights, blocks = (self.table(name) for name in ("weights", "blocks"))
        if step is not None:
            weights, blocks = (frame[frame["step"] == step] for frame in (weights, blocks))
        return plots.record(weights, blocks)

    def _finish_external(
        self, writer: RunWriter, kind: type[BaseException] | None, error: BaseException | None
    ) -> None:
        from gradflow.environment import environment
        from gradflow.store import METRICS

        lasted = time.monotonic() - self._started
        found = self.divergence
        # A loop that ended at the step that diverged did not apply its update.
        ended = found is not None and found.step == self.next_step - 1
        fields: dict[str, Any] = {
            "steps": self.next_step - 1 if ended else self.next_step,
            "environment": environment(str(self._device), torch.get_num_threads()),
            "metrics": {name: self._metrics[name] for name in METRICS if name in self._metrics},
            "recorder_seconds": self.seconds,
            "recorder_share": self.seconds / lasted if lasted else None,
        }
        status = "done"
        if found is not None:
            status, fields["divergence"] = "diverged", asdict(found)
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            status = "interrupted"
        elif kind is not None:
            status, fields["error"] = "failed", f"{kind.__name__}: {error}"
        writer.finish(status, **fields)


# --- helpers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Passes of a model in this block leave no trace with recorders that watch any part of it."""
    parts = set(model.modules())
    with contextlib.ExitStack() as stack:
        for recorder in list(_WATCHING):
            if not parts.isdisjoint(recorder.model.modules()):
                stack.enter_context(recorder.paused())
        yield


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


class _Wanted:
    """What a step measures, by table; of outputs apart by what it is made of."""

    def __init__(self, tables: Mapping[str, frozenset[str]]):
        self._tables = tables
        names = self.of("outputs")
        self.outputs: _Measures = tuple((n, f) for n, f in _OF_OUTPUTS.items() if n in names)
        self.gradients: _Measures = tuple((n, f) for n, f in _OF_GRADIENTS.items() if n in names)
        self.units = names & {"output_spread", "dead_units"}

    def of(self, table: str) -> frozenset[str]:
        return self._tables.get(table, frozenset())


def _shown(layers: Sequence[str]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _kept(value: Tensor | float) -> Any:
    """A number for the table: on the CPU as a float, elsewhere a copy that stays on the device."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else value.detach().clone()
    return float(value)


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with every tensor as a float, moved off the device together."""
    waiting = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    if not waiting:
        return rows
    numbers = iter(torch.stack([value.reshape(()) for value in waiting]).cpu().tolist())
    return [
        {n: next(numbers) if isinstance(value, Tensor) else value for n, value in row.items()}
        for row in rows
    ]


def _columns(rows: list[dict[str, Any]], key: str, dtype: Any) -> dict[str, Any]:
    labels = list(dict.fromkeys([key, *(name for row in rows for name in row)]))
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in labels}
    columns[key] = np.array(columns[key], dtype=dtype)
    return columns


def _external_writer(path: str | Path, meta: dict[str, Any]) -> RunWriter:
    from gradflow.store import RunWriter

    try:
        meta = json.loads(json.dumps(meta, default=_item))
    except (TypeError, ValueError) as error:
        raise SpecError(f"meta: wants names with plain values ({error})") from None
    if isinstance(meta.get("skip"), bool):
        meta["skip"] = "identity" if meta["skip"] else "none"
    return RunWriter(path, meta, origin="external")


def _item(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"not {type(value).__name__}")
