"""The layers of a model: which modules are recorded, and in which order they are executed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gradflow.recording.modules import class_name, is_block, is_compiled, kind_of, name_of
from gradflow.recording.shards import is_sharded

_LAST = 10**9
_Slot = tuple[dict[str, nn.Parameter | None], str]
_NOWHERE: _Slot = ({"": None}, "")


@dataclass
class Layer:
    """One row of modules.parquet."""

    layer: str
    kind: str
    shape: str = ""
    parameters: int = 0
    calls: int = 0


@dataclass
class _Call:
    """What was seen of a layer without a place, in the step under way."""

    row: Layer
    count: int = 0
    signature: tuple[Any, ...] | None = None


class Layers:
    """Owners (modules with floating-point parameters of their own), then blocks.

    Attributes:
        rows: a `Layer` of each.
        owners, blocks: the modules.
        own: of each owner the places of its parameters among `parameters()`.
        version: grows with what is found out about them.
        sharded: whether this process has parts of parameters only.
        device, on_cpu: where the parameters lie.
    """

    def __init__(self, model: nn.Module):
        self.rows: list[Layer] = []
        self.owners: list[nn.Module] = []
        self.blocks: list[nn.Module] = []
        self.own: list[list[int]] = []
        self.version = 0
        self._slots: list[_Slot] = []
        self._told: set[str] = set()  # layers whose parameters are known to be others now
        self._waits = True  # for parameters that may have no elements yet
        self._passes: list[dict[str, None]] = [{}]  # of the step: what each has entered, in order
        self._calls: dict[str, _Call] = {}
        self._order: dict[str, tuple[int, int]] = {}  # layer -> its place, its stage
        self._signatures: dict[str, tuple[Any, ...] | None] = {}  # of all that were executed
        self._waiting: set[str] = set()  # for a step that follows all layers, to find their place
        self._model = model
        self._compiled = _compiled(model)
        self._tree: dict[str, int] = {}  # layer -> its place among all modules
        self._find(model)
        self._contents = _contents(model)
        self.sharded = any(map(is_sharded, self.parameters()))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.on_cpu = self.device.type == "cpu"

    def _find(self, model: nn.Module) -> None:
        blocks: list[str] = []
        for place, (layer, (module, own)) in enumerate(_modules(model).items()):
            self._tree[layer] = place
            if is_block(module):
                blocks.append(layer)
                self.blocks.append(module)
            if own:
                self.own.append([len(self._slots) + i for i in range(len(own))])
                self._slots += [(module._parameters, label) for label in own]
                self.owners.append(module)
                self.rows.append(Layer(layer, kind_of(module)))
                self._describe(len(self.owners) - 1)
        owners = {row.layer: row for row in self.rows}
        for layer in blocks:
            row = owners.get(layer, Layer(layer, "block"))
            row.kind = "block"  # one with parameters of its own is an owner too, with one row
            self.rows.append(row)

    def _describe(self, index: int) -> None:
        """Shape, size and kind; those of a lazy module are known once it has been called."""
        row = self.rows[index]
        own = [p for p in map(self._parameter, self.own[index]) if p is not None and not is_lazy(p)]
        if own and not row.shape:
            weight = max(own, key=lambda parameter: (parameter.dim(), parameter.numel()))
            row.shape = "x".join(map(str, weight.shape))
            row.parameters = sum(parameter.numel() for parameter in own)
            row.kind = kind_of(self.owners[index]) if row.kind == "other" else row.kind

    def _parameter(self, place: int) -> nn.Parameter | None:
        parameters, label = self._slots[place]
        try:
            return parameters[label]
        except KeyError:
            return None

    def parameters(self) -> list[nn.Parameter | None]:
        """The owners' parameters as they are now: a model may put others in their place.

        None for one that has no elements yet, and for all of a module that has lost one.
        """
        try:
            found: list[Any] = list(starmap(operator.getitem, self._slots))
        except KeyError:
            self._drop_incomplete()
            return self.parameters()
        if self._waits and any(p is not None and is_lazy(p) for p in found):
            return [None if p is None or is_lazy(p) else p for p in found]
        self._waits = False
        return found

    def _drop_incomplete(self) -> None:
        for index, own in enumerate(self.own):
            if not all(label in parameters for parameters, label in self._of(own)):
                self._drop(index)

    def _of(self, own: Sequence[int]) -> list[_Slot]:
        return [self._slots[place] for place in own]

    def _drop(self, index: int) -> None:
        """Let go of a module's own parameters: from now on they are null."""
        for place in self.own[index]:
            self._slots[place] = _NOWHERE

    def drop_changed(self) -> list[str]:
        """Let go of modules that are in the model no more, or whose own parameters are others.

        Returns:
            their layers, and those that are new in the model, each the first time only.
        """
        contents = _contents(self._model)
        if contents == self._contents:  # almost always
            return []
        self._contents = contents
        present = {id(m): (layer, own) for layer, (m, own) in _modules(self._model).items()}
        changed = []
        for index, owner in enumerate(self.owners):
            _, own = present.pop(id(owner), ("", []))
            if {label for _, label in self._of(self.own[index])} != set(own):
                changed.append(self.rows[index].layer)
                self._drop(index)
        changed += [layer for layer, own in present.values() if own]
        new = [layer for layer in dict.fromkeys(changed) if layer not in self._told]
        self._told.update(new)
        return new

    def is_inside(self, layer: str, other: str) -> bool:
        """Whether a layer is a part of the other."""
        return layer != other and (self._tree[other] == 0 or layer.startswith(f"{other}."))

    def select(self, table: str) -> list[Layer]:
        """The rows that a table has values of."""
        count = len(self.owners)
        return self.rows[count:] if table == "blocks" else self.rows[:count]

    # --- in which order they are executed ---------------------------------------------------------

    def is_placed(self, row: Layer) -> bool:
        """Whether its place is known: a step has executed it."""
        return row.layer in self._order

    @property
    def follows_all(self) -> bool:
        """Whether the step under way is to see all layers in order, to find the places of some."""
        return not self._order or bool(self._waiting)

    def follows(self, row: Layer) -> bool:
        """Whether the step under way is to see when this one is executed."""
        return self.follows_all or not self.is_placed(row)

    def was_executed(self, row: Layer) -> bool:
        """Whether it, or one around it, has been seen."""
        return self.nearest(row.layer) is not None or row.layer in self._waiting

    def begin(self) -> None:
        """A forward pass of the model begins."""
        if self._passes[-1]:
            self._passes.append({})

    def enter(self, row: Layer, *, again: bool = False) -> None:
        """Note that a layer is being executed; `again`: its call that counts comes later."""
        self._passes[-1].setdefault(row.layer)
        if not (again or self.is_placed(row)):
            self._calls.setdefault(row.layer, _Call(row))

    def called(self, row: Layer, outputs: Sequence[Tensor] | None, *, joining: bool) -> None:
        """Note a call that is over, of a block without outputs; `joining`: in a block's terms."""
        call = self._calls.get(row.layer)
        if call is None or (row.kind == "block") != (outputs is None):
            return
        call.count += 1
        if joining and outputs is not None:
            row.kind = "other"  # a gate of the skip, no layer of the branch
        if call.signature is None and row.kind in ("conv", "linear") and outputs:
            # A stage is a size of feature maps, or a width; the first to appear is stage 1.
            shape = outputs[0].shape
            call.signature = (row.kind, *(shape[2:] if row.kind == "conv" else shape[-1:]))

    def forget(self) -> None:
        """Drop what was noted in the step under way."""
        self._passes = [{}]
        self._calls.clear()

    def close(self) -> None:
        """Note what was executed for the first time; give it a place, if this step followed all."""
        if self._calls:
            for layer, call in self._calls.items():
                if layer not in self._signatures:
                    self._signatures[layer] = call.signature
                    call.row.calls = call.count
            if self.follows_all:
                self._arrange()
            self._waiting = self._signatures.keys() - self._order.keys()
            for index in range(len(self.owners)):
                self._describe(index)
            self._compiled = _compiled(self._model)
            self.version += 1
        self.forget()

    def _arrange(self) -> None:
        """Merge the order of each of the step's passes into the known one."""
        names = list(self._order)
        for entered in self._passes:
            self._merge(names, [layer for layer in entered if layer in self._signatures])
        stages: dict[tuple[Any, ...], int] = {}
        stage = 1
        for place, layer in enumerate(names):
            signature = self._signatures[layer]
            if signature is not None:
                stage = stages.setdefault(signature, len(stages) + 1)
            self._order[layer] = (place, stage)
        self._order = {layer: self._order[layer] for layer in names}

    def _merge(self, names: list[str], entered: Sequence[str]) -> None:
        """Put what is new between the layers that the pass has executed before it and after it.

        Of others that stand there, and which the pass has left out, behind those that come before
        it in the model.
        """
        known = set(names)
        behind: dict[str, str | None] = {}  # layer -> the next in the pass that has a place
        following = None
        for layer in reversed(entered):
            behind[layer] = following
            following = layer if layer in known else following
        place = 0
        for layer in entered:
            if layer in known:
                place = names.index(layer) + 1
                continue
            following = behind[layer]
            end = len(names) if following is None else names.index(following)
            while place < end and self._tree[names[place]] < self._tree[layer]:
                place += 1
            names.insert(place, layer)
            place += 1

    def nearest(self, layer: str) -> str | None:
        """The layer itself, if it was executed, else the nearest executed one around it.

        PyTorch's attention uses the weights of its `out_proj`, say, without executing it.
        """
        while layer and layer not in self._order:
            layer = layer.rpartition(".")[0]
        return layer or None

    def place(self, row: Layer, index: int = 0) -> tuple[int, bool, int]:
        """Sorts by position: what was not executed right behind its nearest, or else last.

        Behind what comes before it in the model stands what is compiled, as it is not seen, and,
        until a step shows its place, what was executed later than others.
        """
        if row.layer not in self._waiting:
            nearest = self.nearest(row.layer)
            if nearest is not None:
                return (self._order[nearest][0], nearest != row.layer, index)
            if not any(f"{row.layer}.".startswith(path) for path in self._compiled):
                return (_LAST, True, index)
        before = [layer for layer in self._order if self._tree[layer] < self._tree[row.layer]]
        behind = max(before, key=self._tree.__getitem__, default=None)
        return (-1 if behind is None else self._order[behind][0], True, index)

    def columns(self) -> dict[str, list[Any]]:
        """Those of modules.parquet."""
        different = {row.layer: row for row in self.rows}
        rows = sorted(different.values(), key=self.place)
        labels = ("layer", "kind", "shape", "parameters", "calls")
        columns: dict[str, list[Any]] = {n: [getattr(row, n) for row in rows] for n in labels}
        nearest = [self.nearest(row.layer) for row in rows]
        stages = [None if layer is None else self._order[layer][1] for layer in nearest]
        columns |= {"position": list(range(len(rows))), "stage": stages}
        order = ("layer", "position", "kind", "stage", "shape", "parameters", "calls")
        return {name: columns[name] for name in order}


def _modules(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """Layer -> module, and labels of its own parameters; one that is shared is the first's."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    modules = {name_of(name): module for name, module in model.named_modules()}
    root = class_name(modules[""])
    root = f"{root}()" if root in modules else root
    seen: set[int] = set()
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, module in modules.items():
        own: list[str] = []
        found[name or root] = module, own
        for label, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen and _is_recorded(parameter):
                seen.add(id(parameter))
                own.append(label)
    return found


def _contents(model: nn.Module) -> list[tuple[Any, ...]]:
    """Modules and the labels of their parameters: what is quickly compared."""
    return [
        (id(module), *(label for label, p in module._parameters.items() if p is not None))
        for module in model.modules()
    ]


def _is_recorded(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and (is_lazy(parameter) or bool(parameter.numel()))


def _compiled(model: nn.Module) -> set[str]:
    """Paths of the modules that torch.compile or TorchScript runs, each ending in a dot."""
    paths = {name_of(name) for name, module in model.named_modules() if is_compiled(module)}
    return {f"{path}." if path else "" for path in paths}
