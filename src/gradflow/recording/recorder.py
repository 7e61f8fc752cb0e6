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
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.ranks import Ranks
from gradflow.recording import quantities as registry
from gradflow.recording.modules import Watch, ignore, is_block, kind_of, tensors_of, wrap_terms
from gradflow.recording.norms import check_group, gather, norm, norms
from gradflow.recording.quantities import Quantity
from gradflow.recording.schedules import DEFAULTS, Schedule

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure

    from gradflow.store import RunWriter

_BUFFER_BYTES = 4 * 2**20
_FLUSH_STEPS = 256
_FLUSH_SECONDS = 20.0


@dataclass(frozen=True)
class Divergence:
    """The first step whose loss or gradient was not finite, and where it began.

    `layer` is the module nearest the input whose forward value was not finite, else the module
    farthest from it whose gradient was not; None where neither was measured at that step.
    """

    step: int
    layer: str | None
    quantity: str


@dataclass
class _Module:
    """One row of modules.parquet."""

    layer: str
    kind: str
    shape: str
    parameters: int
    calls: int = 0


@dataclass
class _Call:
    """What was seen of a module in the first step that executes it, while that is under way."""

    row: _Module
    count: int = 0
    signature: tuple[Any, ...] | None = None


class _Buffer:
    """Values of one table: steps × layers × quantities on the device, emptied in chunks.

    What is measured in the course of a step stays loose until `close` makes it a row, so that rows
    are whole steps. Norms of several tensors for one value combine by hypot, which neither under-
    nor overflows.
    """

    def __init__(self, layers: int, chosen: list[Quantity], device: torch.device):
        self.chosen = chosen
        self.index = {quantity.name: column for column, quantity in enumerate(chosen)}
        rows = _BUFFER_BYTES // (8 * layers * len(chosen))
        self.rows = max(1, min(_FLUSH_STEPS, rows))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        shape = (self.rows, layers, len(chosen))
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._measured = np.zeros(shape, dtype=bool)
        self._elements = np.zeros(shape, dtype=np.float64)
        self._seen: dict[int, Tensor] = {}  # row -> elements by rank and place, −1 for none
        self._is_rms = torch.tensor([quantity.is_rms for quantity in chosen], device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._loose: dict[int, Tensor] = {}  # place in a row -> norm
        self._counts: dict[int, int] = {}  # place in a row -> elements
        self._places: tuple[list[int], Tensor] = ([], torch.zeros(0, dtype=torch.int64))
        self.steps: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.steps) >= self.rows

    def add(self, layer: int, name: str, value: Tensor, elements: int) -> None:
        """Combine one tensor's norm into the step under way."""
        place = layer * len(self.chosen) + self.index[name]
        before = self._loose.get(place, self._zero)
        self._loose[place] = value if before is self._zero else torch.hypot(before, value)
        self._counts[place] = self._counts.get(place, 0) + elements

    def expect(self, layer: int, name: str) -> None:
        """Zero, measured, unless something is added in the course of the step."""
        self._loose.setdefault(layer * len(self.chosen) + self.index[name], self._zero)

    def close(self, step: int, world: int = 1) -> None:
        """Make what was added the row of `step`, all at once: one by one costs ten times.

        With several ranks, what was added on all of them; each calls this at the same steps.
        """
        if not self._loose and world == 1:
            return
        self.open(step)
        row, places = len(self.steps) - 1, list(self._loose)
        values, counts = self._values[row].view(-1), [self._counts.get(p, 0) for p in places]
        if places != self._places[0]:
            self._places = (places, torch.tensor(places, device=self._values.device))
        if places:
            values[self._places[1]] = torch.stack(list(self._loose.values())).to(values.dtype)
        if world > 1:
            self._combine(row, places, counts, world)
        else:
            self._measured[row].reshape(-1)[places] = True
            self._elements[row].reshape(-1)[places] = counts
        self.forget()

    def _combine(self, row: int, places: list[int], counts: list[int], world: int) -> None:
        """Make a row of this rank's norms one of all ranks', which may have measured other places.

        DDP takes the mean of the ranks' losses: to its gradient a rank's own contributes the
        `world`th part. How many elements there were stays on the device as well.
        """
        seen = torch.full((self._values[row].numel(),), -1, dtype=torch.int64)
        seen[places] = torch.tensor(counts, dtype=torch.int64)
        self._seen[row] = gather(seen.to(self._values.device), world)
        self._values[row] *= torch.where(self._is_rms, 1.0, 1 / world)
        self._values[row] = functools.reduce(torch.hypot, gather(self._values[row], world).unbind())

    def forget(self) -> None:
        """Drop what was added since the last row."""
        self._loose.clear()
        self._counts.clear()

    def open(self, step: int) -> None:
        """Begin the row of `step`."""
        self.steps.append(step)

    def fill(self, name: str, values: Tensor, measured: np.ndarray) -> None:
        """Set the last row of a norm for all layers at once."""
        row, column = len(self.steps) - 1, self.index[name]
        self._values[row, :, column] = values
        self._measured[row, :, column] = measured

    def current(self, name: str) -> Tensor:
        """The last row of a quantity, on the device."""
        return self._values[len(self.steps) - 1, :, self.index[name]]

    def drain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps [r], values [r, layers, quantities], measured) so far, and an empty buffer."""
        count = len(self.steps)
        steps = np.array(self.steps, dtype=np.int32)
        values = self._values[:count].cpu().numpy().astype(np.float64)
        for row, by_rank in self._seen.items():
            seen = by_rank.cpu().numpy().reshape(len(by_rank), *self._measured.shape[1:])
            self._measured[row] = (seen >= 0).any(axis=0)
            self._elements[row] = seen.clip(min=0).sum(axis=0)
        measured = self._measured[:count].copy()
        for column, quantity in enumerate(self.chosen):
            if quantity.is_rms:
                values[:, :, column] /= np.sqrt(np.maximum(self._elements[:count, :, column], 1))
        self._values[:count] = 0
        self._measured[:count] = False
        self._elements[:count] = 0
        self._seen.clear()
        self.steps.clear()
        return steps, values, measured


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
        quantities: `default`, `all`, or names (see `gradflow.recording.quantities`).
        schedule: `step -> bool`, for all tables or by table; by default weights every step,
            outputs and blocks every tenth and the first five.
        optimizer: gives the learning rate, and is needed for `update_norm`, which copies the
            parameters on the steps that measure it.
        save: a directory (`runs/NAME`) that becomes a run of the store with `origin: external`.
        meta: what describes that run, `{"depth": 56, "skip": "none", "seed": 0}`: the columns by
            which comparisons pair.
        scaler: the loop's GradScaler, if it has one: a gradient that overflows is then the
            scaler's to skip, and no divergence.
        ranks: this process's place among those that train the model together by
            DistributedDataParallel, in torch.distributed's default group, each with a recorder and
            an equal share of every batch. What is recorded is then of the whole batch, and of
            every other number given to `step` the mean over the ranks. Only rank 0 keeps it, and
            only its `save` counts.

    Attributes:
        latest: the last row of the table `steps`: the loss and the other numbers of the last step.
        divergence: where loss or gradient first became non-finite (`Divergence`), or None. Known
            after the step on a CPU, at the next flush on a GPU.
        seconds: the recorder's own time so far.

    Raises:
        SpecError: an unknown quantity, `update_norm` without an optimizer, or ranks without their
            group.
        StoreError: `save` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        quantities: str | Iterable[str] = "default",
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        save: str | Path | RunWriter | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        ranks: Ranks | None = None,
    ):
        chosen = registry.select(quantities)
        if optimizer is None and any(q.name == "update_norm" for q in chosen.get("weights", ())):
            raise SpecError("update_norm: give the optimizer whose updates are to be measured")
        self.model = model
        self.optimizer = optimizer
        self.divergence: Divergence | None = None
        self.seconds = 0.0
        self.next_step = 0
        self.latest: dict[str, Any] = {}
        self._ranks = ranks or Ranks()
        check_group(self._ranks.world)
        self._save = save if self._ranks.rank == 0 else None
        self._meta = dict(meta or {})
        self._scaled = scaler is not None and scaler.is_enabled()
        self._writer: RunWriter | None = None
        self._schedules = _by_table(schedule)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._nothing = torch.zeros(1, device=self._device)
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        self._dtype = np.float64 if wide else np.float32

        self._find_modules()
        sizes = {"weights": len(self._owners), "outputs": len(self._owners)}
        sizes["blocks"] = len(self._modules) - len(self._owners)
        self._buffers = {
            table: _Buffer(sizes[table], columns, self._device)
            for table, columns in chosen.items()
            if sizes[table]
        }
        self._step_rows: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._metrics: dict[str, float] = {}
        self._tables: dict[str, list[pa.Table]] = {}
        self._before: list[Tensor] | None = None
        self._undo: list[Callable[[], None]] = []
        self._entering: dict[str, Callable[[], None]] = {}  # layer -> undo, once its place is known
        self._calls: dict[str, _Call] = {}  # of layers first executed in the step under way
        self._order: dict[str, tuple[int, int]] = {}  # layer -> its place among them, stage
        self._stage, self._modules_written = 1, 0
        self._stages: dict[tuple[Any, ...], int] = {}
        self._joining = self._paused = False
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

    # --- what is watched --------------------------------------------------------------------------

    def _find_modules(self) -> None:
        seen: set[int] = set()
        self._modules: list[_Module] = []  # owners first, then blocks
        self._owners: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._own: list[list[int]] = []  # places of each owner's among the parameters
        blocks: list[tuple[str, nn.Module]] = []
        for name, module in self.model.named_modules():
            if is_block(module):
                blocks.append((name, module))
            floats = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
            own = [p for p in floats if id(p) not in seen and p.numel()]
            if not own:
                continue
            seen |= {id(parameter) for parameter in own}
            self._own.append([len(self._parameters) + i for i in range(len(own))])
            self._parameters += own
            self._owners.append(module)
            weight = max(own, key=lambda parameter: (parameter.dim(), parameter.numel()))
            row = _Module(
                layer=name or type(module).__name__,
                kind=kind_of(module),
                shape="x".join(map(str, weight.shape)),
                parameters=sum(parameter.numel() for parameter in own),
            )
            self._modules.append(row)
        owners = {row.layer: row for row in self._modules}
        self._blocks = [module for _, module in blocks]
        for name, module in blocks:
            layer = name or type(module).__name__
            row = owners.get(layer, _Module(layer, "block", "", 0))
            row.kind = "block"  # one with parameters of its own is an owner too, with one row
            self._modules.append(row)
        width = max(map(len, self._own), default=0)
        padded = [own + [len(self._parameters)] * (width - len(own)) for own in self._own]
        self._gather = torch.tensor(padded, dtype=torch.int64, device=self._device)

    def __enter__(self) -> Self:
        if self._undo or (self._writer is not None and self._save is not self._writer):
            raise RuntimeError("Recorder: it is watching already, or has saved its run")
        if isinstance(self._save, str | Path):
            self._writer = _external_writer(self._save, self._meta)
        else:
            self._writer = self._save
        self._started = self._flushed = time.monotonic()
        whole = Watch(self._on_pass, ignore)
        self._undo.append(self.model.register_forward_hook(whole, always_call=True).remove)
        for index, module in enumerate(self._owners):
            row = self._modules[index]
            if row.layer not in self._order and row.kind != "block":
                watch = Watch(partial(self._on_enter, row), ignore)
                self._entering[row.layer] = module.register_forward_pre_hook(watch).remove
            watch = Watch(partial(self._on_output, index), ignore)
            self._undo.append(module.register_forward_hook(watch).remove)
        for index, block in enumerate(self._blocks):
            self._undo.append(wrap_terms(block, partial(self._on_terms, index)))
        if self.optimizer is not None and self._wants("weights", "update_norm"):
            hook = self.optimizer.register_step_post_hook(self._on_update)
            self._undo.append(hook.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for undo in (*self._undo, *self._entering.values()):
            undo()
        self._undo.clear()
        self._entering.clear()
        self._forget()
        self.flush()
        if isinstance(self._save, str | Path) and self._writer is not None:
            self._finish_external(self._writer, kind, error)

    # --- measuring --------------------------------------------------------------------------------

    def _wants(self, table: str, name: str) -> bool:
        return table in self._buffers and name in self._buffers[table].index

    def _measures(self, table: str) -> bool:
        return table in self._buffers and self._schedules[table](self.next_step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes in this block leave no trace.

        For what is no part of the step: an evaluation that needs gradients, a penalty's gradient,
        a GAN's other pass.
        """
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outer

    def _watching(self) -> bool:
        return torch.is_grad_enabled() and not self._paused

    def _on_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        """After each forward pass of the model; after one that raised, without an output."""
        if output is None and sys.exception() is not None and self._watching():
            self._forget()

    def _forget(self) -> None:
        """Drop what was seen since the last step."""
        for buffer in self._buffers.values():
            buffer.forget()
        self._calls.clear()
        self._under_way += 1

    def _on_enter(self, row: _Module, *_: Any) -> None:
        if self._watching() and row.layer not in self._order:
            self._calls.setdefault(row.layer, _Call(row))

    def _on_output(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watching():
            return
        tensors = list(tensors_of(output))
        call = self._calls.get(self._modules[index].layer)
        if call is not None and call.row.kind != "block":  # a block is called in its `terms`
            self._note_call(call, tensors)
        if self._measures("outputs"):
            buffer = self._buffers["outputs"]
            for tensor in tensors:
                self._add(buffer, index, "output_rms", tensor.detach())
                self._watch_gradient(buffer, index, "output_grad_norm", tensor)

    def _on_terms(
        self, index: int, original: Callable[..., Any], x: Tensor, branch: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        if not self._watching():
            return original(x, branch)
        row = self._modules[len(self._owners) + index]
        self._on_enter(row)
        if row.layer in self._calls:
            self._calls[row.layer].count += 1
        outer, self._joining = self._joining, True
        try:
            if not self._measures("blocks"):
                return original(x, branch)
            return self._measure_terms(index, original, x, branch)
        finally:
            self._joining = outer

    def _measure_terms(
        self, index: int, original: Callable[..., Any], x: Tensor, branch: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        buffer = self._buffers["blocks"]
        # A view of its own sees the gradient that comes this way alone; none comes where the term
        # does not depend on it, and then it is exactly zero.
        x = x.view_as(x)
        for name, tensor in (("skip_grad_norm", x), ("branch_grad_norm", branch)):
            if name in buffer.index and tensor.requires_grad:
                buffer.expect(index, name)
                self._watch_gradient(buffer, index, name, tensor)
        skip_term, branch_term = original(x, branch)
        if skip_term is not None:
            self._add(buffer, index, "skip_rms", skip_term.detach())
        elif "skip_rms" in buffer.index:
            buffer.expect(index, "skip_rms")
        self._add(buffer, index, "branch_rms", branch_term.detach())
        return skip_term, branch_term

    def _add(self, buffer: _Buffer, index: int, name: str, tensor: Tensor) -> None:
        if name in buffer.index:
            began = time.perf_counter()
            buffer.add(index, name, norm(tensor), tensor.numel())
            self.seconds += time.perf_counter() - began

    def _watch_gradient(self, buffer: _Buffer, index: int, name: str, tensor: Tensor) -> None:
        if name in buffer.index and tensor.requires_grad:
            tensor.register_hook(partial(self._on_gradient, buffer, index, name, self._under_way))

    def _on_gradient(
        self, buffer: _Buffer, index: int, name: str, under_way: int, gradient: Tensor
    ) -> None:
        if under_way == self._under_way and not self._paused:
            self._add(buffer, index, name, gradient.detach())

    def _note_call(self, call: _Call, outputs: list[Tensor]) -> None:
        row = call.row
        call.count += 1
        if self._joining:
            row.kind = "other"  # a gate of the skip, no layer of the branch
        if call.signature is None and row.kind in ("conv", "linear") and outputs:
            # A stage is a size of feature maps, or a width; the first to appear is stage 1.
            shape = outputs[0].shape
            call.signature = (row.kind, *(shape[2:] if row.kind == "conv" else shape[-1:]))

    def _close_order(self) -> None:
        """Give a place to what this step was the first to execute."""
        for layer, call in self._calls.items():
            if call.signature is not None:
                self._stage = self._stages.setdefault(call.signature, len(self._stages) + 1)
            self._order[layer] = (len(self._order), self._stage)
            call.row.calls = call.count
            self._entering.pop(layer, ignore)()
        self._calls.clear()
        self._under_way += 1

    def _nearest(self, layer: str) -> str | None:
        """The layer itself, if it was executed, else the nearest executed one around it.

        PyTorch's attention uses the weights of its `out_proj`, say, without executing it.
        """
        while layer and layer not in self._order:
            layer = layer.rpartition(".")[0]
        return layer or None

    def _place(self, row: _Module, index: int = 0) -> tuple[int, bool, int]:
        """Sorts by position: what was not executed right behind its nearest, or else last."""
        nearest = self._nearest(row.layer)
        place = 10**9 if nearest is None else self._order[nearest][0]
        return (place, nearest != row.layer, index)

    def _on_update(self, *_: Any) -> None:
        if self._before is None or not self._buffers["weights"].steps:
            return  # not measured at this step, or the step has left the buffer
        began = time.perf_counter()
        with torch.no_grad():
            pairs = zip(self._parameters, self._before, strict=True)
            added = [after.detach() - before for after, before in pairs]
            self._fill_weights("update_norm", norms(added))
        self._before = None
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def step(self, loss: Tensor | float | None = None, **values: Tensor | float) -> bool:
        """Record this update's gradients: after `backward`, before the optimizer's step.

        Args:
            loss: the step's training loss.
            values: more numbers for the table `steps`, such as `accuracy`.

        Returns:
            False where this step's loss or gradient is known not to be finite. On a GPU that is
            known at the next flush only, from `divergence`.
        """
        if not self._undo:
            raise RuntimeError("Recorder.step outside its `with` block: nothing is watched there")
        self._before = None
        if self._due():
            self.flush()
        began = time.perf_counter()
        for table, buffer in self._buffers.items():
            if table != "weights" and self._measures(table):
                buffer.close(self.next_step, self._ranks.world)
        self._close_order()
        present = [parameter.grad is not None for parameter in self._parameters]
        gradients = norms([self._gradient(parameter) for parameter in self._parameters])
        total = norm(gradients) if any(present) else None
        if self._measures("weights"):
            self._buffers["weights"].open(self.next_step)
            if self._wants("weights", "weight_grad_norm"):
                self._fill_weights("weight_grad_norm", gradients, present)
            if self._wants("weights", "weight_norm"):
                self._fill_weights("weight_norm", norms(self._parameters))
            if self._wants("weights", "update_norm"):
                self._before = [parameter.detach().clone() for parameter in self._parameters]
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        lr = groups[0].get("lr") if groups else None
        given = self._over_ranks({"loss": loss, **values})
        row = {"loss": given.pop("loss", None), "lr": lr, **given, "grad_norm": total}
        self.latest = {name: _kept(value) for name, value in row.items() if value is not None}
        self._step_rows.append(self.latest | {"step": self.next_step})
        finite = self._device.type != "cpu" or self._non_finite(self._step_rows[-1]) is None
        self.next_step += 1
        self.seconds += time.perf_counter() - began
        if not finite and self.divergence is None:
            self.flush()
        return finite

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

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient's elements; where there are none a zero, which is on the device already."""
        gradient = parameter.grad
        if gradient is None:
            return self._nothing
        return gradient.coalesce().values() if gradient.is_sparse else gradient

    def _fill_weights(self, name: str, values: Tensor, present: list[bool] | None = None) -> None:
        """Combine norms by parameter into norms by module; `present` says which were measured."""
        padded = torch.cat([values, values.new_zeros(1)])
        by_module = torch.linalg.vector_norm(padded[self._gather], dim=1)
        measured = [present is None or any(present[i] for i in own) for own in self._own]
        self._buffers["weights"].fill(name, by_module, np.array(measured))

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
        step's gradients were not measured.
        """
        buffer = self._buffers.get("weights")
        if buffer is None or "weight_grad_norm" not in buffer.index or not buffer.steps:
            return None
        rows = [
            (self._place(row, i), row.kind)
            for i, row in enumerate(self._rows("weights"))
            if row.layer in self._order
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
        return len(self._step_rows) >= _FLUSH_STEPS or (
            self._writer is not None and waited > _FLUSH_SECONDS
        )

    def flush(self) -> None:
        """Empty the buffers into tables (and files). Waits for the device."""
        began = time.perf_counter()
        drained = {name: buffer.drain() for name, buffer in self._buffers.items()}
        steps, self._step_rows = _plain(self._step_rows), []
        if self.divergence is None:
            self.divergence = self._first_divergence(steps, drained)
        if self._writer is not None and steps and len(self._order) > self._modules_written:
            from gradflow import schema

            self._writer.write("modules", schema.table("modules", self._module_columns()))
            self._modules_written = len(self._order)
        for name, (numbers, values, measured) in drained.items():
            self._emit(name, self._long_columns(name, numbers, values, measured))
        if steps:
            self._emit("steps", _columns(steps, "step", np.int32))
        if self._evaluations:
            self._emit("evaluations", _columns(self._evaluations, "step", np.int32))
            self._evaluations = []
        self._flushed = time.monotonic()
        self.seconds += time.perf_counter() - began

    def _emit(self, name: str, columns: dict[str, Any]) -> None:
        if not len(columns["step"]) or self._ranks.rank > 0:
            return
        from gradflow import schema

        data = schema.table(name, columns, registry.meanings(self._ranks.world))
        if self._writer is not None:
            self._writer.append(name, data)
        else:
            self._tables.setdefault(name, []).append(data)

    def _rows(self, table: str) -> list[_Module]:
        count = len(self._owners)
        return self._modules[count:] if table == "blocks" else self._modules[:count]

    def _long_columns(
        self, name: str, steps: np.ndarray, values: np.ndarray, measured: np.ndarray
    ) -> dict[str, Any]:
        """Columns step, layer and one a quantity; layers in order of position, masked if null."""
        import pyarrow as pa

        rows = self._rows(name)
        order = sorted(range(len(rows)), key=lambda i: self._place(rows[i], i))
        values, measured = values[:, order], measured[:, order]
        kept = measured.any(axis=2)
        row, layer = np.nonzero(kept)
        names = pa.array([rows[i].layer for i in order], pa.string())
        indices = pa.array(layer.astype(np.int32))
        columns: dict[str, Any] = {
            "step": steps[row],
            "layer": pa.DictionaryArray.from_arrays(indices, names),
        }
        for column, quantity in enumerate(self._buffers[name].chosen):
            with np.errstate(over="ignore"):  # a norm beyond float32 reads inf there
                numbers = values[:, :, column][kept].astype(self._dtype)
            columns[quantity.name] = np.ma.masked_array(numbers, ~measured[:, :, column][kept])
        return columns

    def _module_columns(self) -> dict[str, list[Any]]:
        different = {row.layer: row for row in self._modules}
        rows = sorted(different.values(), key=self._place)
        labels = ("layer", "kind", "shape", "parameters", "calls")
        columns: dict[str, list[Any]] = {n: [getattr(row, n) for row in rows] for n in labels}
        nearest = [self._nearest(row.layer) for row in rows]
        stages = [None if layer is None else self._order[layer][1] for layer in nearest]
        columns |= {"position": list(range(len(rows))), "stage": stages}
        order = ("layer", "position", "kind", "stage", "shape", "parameters", "calls")
        return {name: columns[name] for name in order}

    # --- divergence -------------------------------------------------------------------------------

    def _non_finite(self, row: Mapping[str, Any]) -> str | None:
        if not math.isfinite(row.get("loss", 0.0)):
            return "loss"
        if not self._scaled and not math.isfinite(row.get("grad_norm", 0.0)):
            return "grad_norm"
        return None

    def _first_divergence(
        self, steps: list[dict[str, Any]], drained: Mapping[str, Any]
    ) -> Divergence | None:
        for row in steps:
            quantity = self._non_finite(row)
            if quantity is not None:
                found = self._origin(row["step"], drained)
                return Divergence(row["step"], *(found or (None, quantity)))
        return None

    def _origin(self, step: int, drained: Mapping[str, Any]) -> tuple[str, str] | None:
        """The module at which `step` went wrong: forward from the input, else backward."""
        forward: list[Any] = []
        backward: list[Any] = []
        for table, (numbers, values, measured) in drained.items():
            rows = self._rows(table)
            for place in np.flatnonzero(numbers == step):
                for column, quantity in enumerate(self._buffers[table].chosen):
                    bad = measured[place, :, column] & ~np.isfinite(values[place, :, column])
                    side = forward if quantity.is_rms else backward
                    if quantity.is_rms or "grad" in quantity.name:
                        side += [
                            (self._place(rows[i], i), rows[i].layer, quantity.name)
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
            for index, module in enumerate(self._owners)
        ]
        try:
            with torch.no_grad():
                forward()
        finally:
            for handle in handles:
                handle.remove()
        if self._ranks.world > 1:
            index = found[0] if found else -1
            place = self._place(self._modules[index])[0] if found else 2**62
            mine = torch.tensor([place, index], device=self._device)
            _, index = min(gather(mine, self._ranks.world).tolist())
            found = [index] if index >= 0 else []
        return self._modules[found[0]].layer if found else None

    # --- what was recorded ------------------------------------------------------------------------

    def table(self, name: str) -> pd.DataFrame:
        """A table so far, as a frame: its own columns and, for layers, those of modules.parquet.

        Args:
            name: weights, outputs, blocks, steps, evaluations or modules.
        """
        import pandas as pd

        from gradflow import schema
        from gradflow.store import Run

        self.flush()
        modules = schema.table("modules", self._module_columns())
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

    def plot(self, step: int | None = None) -> Figure:
        """The profile: gradient norm of each module's weights against position, log scale.

        Args:
            step: which step; by default the first and the last that were recorded.
        """
        from gradflow import plots

        frame = self.table("weights")
        return plots.profile(frame if step is None else frame[frame["step"] == step])

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


def _by_table(schedule: Schedule | Mapping[str, Schedule] | None) -> dict[str, Schedule]:
    if schedule is None:
        return dict(DEFAULTS)
    if isinstance(schedule, Mapping):
        for table in set(schedule) - set(DEFAULTS):
            raise SpecError(f"schedule: {table}: allowed is {', '.join(DEFAULTS)}")
        return DEFAULTS | dict(schedule)
    return dict.fromkeys(DEFAULTS, schedule)


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
