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
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.errors import SpecError
from gradflow.ranks import Ranks
from gradflow.recording import buffers
from gradflow.recording import quantities as registry
from gradflow.recording.buffers import Buffer, Drained, over_ranks
from gradflow.recording.divergence import Divergence, first_divergence, locate_forward, non_finite
from gradflow.recording.flight import Flight, Rule
from gradflow.recording.layers import Layers
from gradflow.recording.modules import is_compiled
from gradflow.recording.norms import check_group, gather
from gradflow.recording.passes import Passes, Wanted
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


_WATCHING: weakref.WeakSet[Recorder] = weakref.WeakSet()


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
            gradient is not finite, `rule` holds for the first time, or the loop raises. `story`
            tells what led to it.
        rule: of the step's row of the table `steps`, `lambda row: row["grad_norm"] > 1e3`: what
            was given to `step`, and `step`, `grad_norm` and `lr`. On a GPU it is asked when buffers
            are emptied.
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
        self._usual: set[tuple[str, str]] = set()  # outputs with infinities of which nothing came
        self._seconds = 0.0
        self.next_step = 0
        self.latest: dict[str, Any] = {}
        self._ranks = ranks or ranks_of(model)
        check_group(self._ranks.world)
        self._save = save if self._ranks.rank == 0 else None
        self._meta = _named(meta or {})
        self._updates = Updates(listed, scaler)
        if flight is not None and (type(flight) is not int or flight < 1):
            raise SpecError(f"flight={flight}: wants a number of steps, from 1")
        if rule is not None and flight is None:
            raise SpecError("rule: give flight, the number of steps to keep for it")
        self._flight, self._rule = None if flight is None else Flight(flight), rule
        self._writer: RunWriter | None = None
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        self._dtype = np.float64 if wide else np.float32

        self._layers = Layers(model)
        self._device, self._on_cpu = self._layers.device, self._layers.on_cpu
        owners, blocks = len(self._layers.owners), len(self._layers.blocks)
        sizes = {"weights": owners, "outputs": owners, "blocks": blocks}
        chosen = self._without_unreadable(chosen)
        self._schedules = scheduled(schedule, chosen)
        self._buffers = {
            table: Buffer(sizes[table], columns, self._device)
            for table, columns in chosen.items()
            if sizes[table]
        }
        self._weights = Weights(self._layers, self._buffers.get("weights"), self._ranks.world)
        self._different = list(dict.fromkeys(self._schedules.values()))
        self._answers: dict[tuple[bool, ...], Wanted] = {}  # for each of these
        self._passes = Passes(self._layers, self._buffers, self._weights)
        self._step_rows: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._metrics: dict[str, float] = {}
        self._tables: dict[str, list[pa.Table]] = {}
        self._undo: list[Callable[[], None]] = []
        self._modules_written = 0
        self._flushed = time.monotonic()
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds + self._passes.seconds

    def state_dict(self) -> dict[str, Any]:
        """What a recorder needs to go on where this one stands, after a `flush`.

        Plain data, and the gradients of the last step where the next wants a cosine with them.
        """
        divergence = None if self.divergence is None else asdict(self.divergence)
        return {
            "next_step": self.next_step,
            "seconds": self.seconds,
            "metrics": dict(self._metrics),
            "divergence": divergence,
            "alarm": self.alarm,
            "previous": self._weights.previous,
            "flight": None if self._flight is None else self._flight.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the recorder of `state` stood; before the first step."""
        self.next_step, self._seconds = state["next_step"], state["seconds"]
        self._metrics = dict(state["metrics"])
        found = state["divergence"]
        self.divergence = None if found is None else Divergence(**found)
        self.alarm = state.get("alarm")
        self._weights.previous = state.get("previous")
        if self._flight is not None and state.get("flight") is not None:
            self._flight.load_state_dict(state["flight"])
        if self._undo:
            self._passes.expect(self._wanted_at(self.next_step))

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
        self._passes.attach(self.model)
        self._undo += [self._passes.detach, *self._updates.watch(self._on_update)]
        self._passes.expect(self._wanted_at(self.next_step))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _WATCHING.discard(self)
        while self._undo:
            self._undo.pop()()
        self._weights.clear()
        if kind is None or not self._layers.sharded:  # the other ranks may not come this far
            self.flush()
        if isinstance(error, Exception) and self.divergence is None and self._flight is not None:
            self._emit("flight", self._led_to(self._flight, self.next_step - 1))
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

    def _wanted_at(self, step: int) -> Wanted:
        """What is measured at a step."""
        asked = tuple(schedule(step) for schedule in self._different)
        if asked not in self._answers:
            wanted = {s for s, is_asked in zip(self._different, asked, strict=True) if is_asked}
            self._answers[asked] = Wanted(
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

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Forward and backward passes in this block leave no trace.

        For what is no part of the step: an evaluation that needs gradients, a penalty's gradient,
        a GAN's other pass.
        """
        return self._passes.paused()

    # --- measuring --------------------------------------------------------------------------------

    def _on_update(self, optimizer: Optimizer) -> None:
        began = time.perf_counter()
        with torch.no_grad():
            self._weights.updated(optimizer, last=len(self._updates.optimizers) == 1)
        self._seconds += time.perf_counter() - began

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
            self._passes.forget()
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
        scale = self._updates.loss_scale(self._device)
        self._passes.close(self.next_step, self._ranks.world, scale)
        total = self._record_weights(optimizer, scale)
        self._passes.end_step()
        self.latest = kept if total is None else kept | {"grad_norm": _kept(total)}
        self._step_rows.append(self.latest | {"step": self.next_step})
        if self._layers.sharded:
            self.latest.pop("grad_norm", None)  # of this rank's part alone
        scaled = self._updates.scaler is not None
        finite = not self._on_cpu or non_finite(self.latest, scaled=scaled) is None
        is_known = self._on_cpu and not self._layers.sharded
        alarmed = is_known and self._alarms(self._step_rows[-1], self.next_step)
        self._updates.recorded()
        self.next_step += 1
        self._passes.expect(self._wanted_at(self.next_step))
        self._seconds += time.perf_counter() - began
        if alarmed or (not finite and self.divergence is None):
            self.flush()
        return finite

    def _alarms(self, row: Mapping[str, Any], step: int) -> bool:
        """Whether the rule holds for the first time."""
        if self._rule is None or self.alarm is not None or not self._rule(row):
            return False
        self.alarm = step
        return True

    def _record_weights(
        self, optimizer: Optimizer | None, scale: Tensor | None
    ) -> Tensor | float | None:
        """The step's row of the table `weights`, if it measures one; the norm of all gradients."""
        gradients = self._weights.gradients(optimizer)
        left = scale if self._updates.are_scaled(optimizer) else None
        found = self._weights.measure(gradients, left)
        self._passes.say_what_is_unread(found.measured)
        is_known = any(gradient is not None for gradient in gradients)
        if not is_known:
            self._passes.say_what_is_missing()
        follows = self._schedules.get("grad_cosine")
        keep = follows is not None and follows(self.next_step + 1)
        wanted, count = self._passes.wanted.of("weights"), self._passes.count
        self._weights.record(wanted, self.next_step, gradients, found, (left, scale), count, keep)
        return _total(found.norms) if is_known else None

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
        if len(self._step_rows) >= buffers.FLUSH_STEPS or any(
            b.full for b in self._buffers.values()
        ):
            return True
        if self._writer is None or self._layers.sharded:
            return False
        return time.monotonic() - self._flushed > buffers.FLUSH_SECONDS

    def flush(self) -> None:
        """Empty the buffers into tables (and files). Waits for the device."""
        began = time.perf_counter()
        self._passes.say_what_has_changed()
        drained = {name: buffer.drain() for name, buffer in self._buffers.items()}
        steps, self._step_rows = _plain(self._step_rows), []
        if self._layers.sharded and steps:
            self._put_together(drained, steps)
        for name, found in drained.items():
            found.finish(self._buffers[name].chosen)
        known = self.alarm is not None and any(row["step"] == self.alarm for row in steps)
        events = [self.alarm] if known and self.alarm is not None else []
        if not self._on_cpu or self._layers.sharded:
            events = [row["step"] for row in steps if self._alarms(row, row["step"])]
        if self.divergence is None:
            self.divergence = first_divergence(
                steps,
                drained,
                self._layers,
                self._buffers,
                self._usual,
                scaled=self._updates.scaler is not None,
            )
            events += [] if self.divergence is None else [self.divergence.step]
        if self._writer is not None and steps and self._layers.version > self._modules_written:
            from gradflow import schema

            self._writer.write("modules", schema.table("modules", self._layers.columns()))
            self._modules_written = self._layers.version
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
        self._seconds += time.perf_counter() - began

    def _write_flight(
        self,
        flight: Flight,
        drained: dict[str, Drained],
        steps: list[dict[str, Any]],
        events: list[int],
    ) -> None:
        """Write what led to the events, if any; leave the tables what the schedules ask for."""
        flight.keep(drained, steps)
        for step in events:
            self._emit("flight", self._led_to(flight, step))
        flight.forget()
        for name, found in drained.items():
            found.measured = found.measured.copy()  # the flight record has this one
            for column, quantity in enumerate(self._buffers[name].chosen):
                asked = map(self._schedules[quantity.name], found.steps.tolist())
                asked_for = np.fromiter(asked, bool, len(found.steps))
                found.measured[:, :, column] &= asked_for[:, None]

    def _led_to(self, flight: Flight, step: int) -> dict[str, Any]:
        layers = {name: self._layers.select(name) for name in self._buffers}
        chosen = {name: buffer.chosen for name, buffer in self._buffers.items()}
        return flight.columns(step, layers, chosen)

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
        return Conditions(self._ranks.world, self._passes.range, scaled, self._compiled)

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

    def locate_forward(self, forward: Callable[[], Any]) -> str | None:
        """The first module, in order of execution, whose output is not finite in `forward()`.

        For a step whose outputs were not measured: repeat its forward pass with this. None where
        all outputs are finite. With several ranks all call it, and it is the first over them all.
        """
        found = locate_forward(self._layers, forward, self._usual)
        if self._ranks.world > 1:
            index = -1 if found is None else found
            place = 2**62 if found is None else self._layers.place(self._layers.rows[found])[0]
            mine = torch.tensor([place, index], device=self._device)
            _, index = min(gather(mine, self._ranks.world).tolist())
            found = index if index >= 0 else None
        return None if found is None else self._layers.rows[found].layer

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
        return schema.to_pandas(schema.with_modules(data, schema.encoded(modules)))

    def story(self) -> str:
        """What led to the first divergence or alarm, in words; empty where there was none.

        Wants `flight`.
        """
        from gradflow.flight import story

        found = None if self.divergence is None else asdict(self.divergence)
        return "\n".join(story(self.table("flight"), found))

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


def _total(norms: Tensor) -> Tensor | float:
    """The norm of several together, as `_kept` takes it."""
    if norms.device.type != "cpu":
        return torch.linalg.vector_norm(norms)
    values = norms.numpy()
    return math.sqrt(values.dot(values))


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
        text = json.dumps(meta, default=_item, ensure_ascii=False)
        meta = json.loads(text.encode())  # refuses what is no Unicode, as a file's name may be
    except (TypeError, ValueError) as error:
        raise SpecError(f"meta: wants names with plain values ({error})") from None
    if isinstance(meta.get("skip"), bool):
        meta["skip"] = "identity" if meta["skip"] else "none"
    return RunWriter(path, meta, origin="external")


def _named(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, Mapping) or not all(isinstance(n, str) and n for n in meta):
        raise SpecError('meta: wants names with plain values, such as {"depth": 56, "seed": 0}')
    return dict(meta)


def _item(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"not {type(value).__name__}")
