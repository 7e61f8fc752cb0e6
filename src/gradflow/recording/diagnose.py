"""A diagnosis of anyone's model in one call: one pass recorded, and two of a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError
from gradflow.recording import observe
from gradflow.recording.modules import tensors_of
from gradflow.recording.probes import gradient_cosine
from gradflow.recording.probes.passes import Reading, output_of, readout, untouched
from gradflow.recording.recorder import Recorder

if TYPE_CHECKING:
    import pandas as pd

    from gradflow.diagnosis import Examination


def diagnose(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor] | None = None,
    *,
    seed: int = 0,
) -> Examination:
    """What is wrong with the gradient of a model, where, and what usually helps: `print` it.

    One forward and backward pass, and two passes for the gradients of neighbouring inputs, in the
    mode in which the model is. It is left as it was: parameters, `.grad`, buffers, modes, hooks,
    and torch's random generators.

    Args:
        model: any module with parameters, at initialisation or later.
        batch: inputs, or the pair (inputs, targets), a tuple or list. Inputs are a tensor
            (samples, …), or a mapping of keyword arguments. From 16 samples on, dead units can be
            told.
        loss: `loss(output, targets)`, or `loss(output)` where the batch has no targets; by default
            a random linear readout of the output, as theory takes it.
        seed: of the readout, and of the direction to neighbouring inputs.

    Returns:
        `.findings`, `.unmeasured`, `.tables`, `.plot()`; see `gradflow.diagnosis.Examination`.

    Raises:
        GradflowError: no parameter has a gradient.
    """
    from gradflow.diagnosis import diagnose_tables

    inputs, *targets = batch if isinstance(batch, tuple | list) else (batch,)
    with _without_gradients(model), untouched(model), _Observer(model, inputs) as observer:
        with observer.forward():
            output = _forward(model, inputs)
        value = _readout(output, seed) if loss is None else loss(output, *targets)
        if not value.requires_grad:
            raise GradflowError("diagnose: the loss depends on no parameter that has a gradient")
        value.backward()
        weights, outputs = observer.finish(value)
    return replace(diagnose_tables(weights, outputs, _probed(model, inputs, seed)), step=None)


def _forward(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _readout(output: Any, seed: int) -> Tensor:
    tensor = output_of(output)
    return (readout(tensor, seed) * tensor).sum()


def _samples(inputs: Any) -> int:
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(t) for t in tensors if isinstance(t, Tensor) and t.dim()), 0)


def _probed(model: nn.Module, inputs: Any, seed: int) -> pd.DataFrame:
    import pandas as pd

    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return pd.DataFrame()  # whole numbers have no neighbours
    readings = gradient_cosine(model, inputs, seed=seed)
    columns = {name: [getattr(r, name) for r in readings] for name in Reading.__slots__}
    return pd.DataFrame({"step": 0, **columns})


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters have no `.grad` in this block, and theirs again afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


class _Observer:
    """A `Recorder`, and beside it what a diagnosis needs and the recorder lacks."""

    def __init__(self, model: nn.Module, inputs: Any):
        quantities = ("weight_grad_norm", "weight_norm", "output_rms", "output_grad_norm")
        self._recorder = Recorder(model, quantities, schedule=lambda step: True)
        layers = self._recorder._layers
        self._owners = layers.owners
        self._layers = [row.layer for row in layers.select("weights")]
        self._samples = _samples(inputs)
        self._latest: int | None = None  # the module that was entered or left last
        self._flat: dict[int, list[float]] = {}  # flat elements, elements
        self._spread: dict[int, list[float]] = {}
        self._alive: dict[int, Tensor] = {}
        self._gradients: dict[int, list[int]] = {}  # zeros, subnormals, elements

    def __enter__(self) -> _Observer:
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(self._recorder)
        for index, module in enumerate(self._owners):
            enter = module.register_forward_pre_hook(partial(self._on_enter, index))
            leave = module.register_forward_hook(partial(self._on_output, index))
            self._undo.callback(enter.remove)
            self._undo.callback(leave.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.__exit__(*error)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass, in which activations are looked at."""
        with observe.Slopes(self._on_activation):
            yield

    def _on_enter(self, index: int, *_: Any) -> None:
        self._latest = index

    def _on_output(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._latest = index
        tensor = next(iter(tensors_of(output)), None)
        if tensor is None:
            return
        share = observe.output_spread(tensor.detach(), self._samples)
        if share is not None:
            self._spread.setdefault(index, []).append(share)
        if tensor.requires_grad:
            axis = observe.unit_axis(module, tensor)
            tensor.register_hook(partial(self._on_gradient, index, axis))

    def _on_gradient(self, index: int, axis: int, gradient: Tensor) -> None:
        alive = observe.alive_units(gradient, axis)
        if alive is not None:
            before = self._alive.get(index)
            self._alive[index] = alive if before is None else before | alive
        counts = self._gradients.setdefault(index, [0, 0, 0])
        for place, count in enumerate(_counts(gradient)):
            counts[place] += count

    def _on_activation(self, flat: float, elements: int) -> None:
        if self._latest is not None:
            counts = self._flat.setdefault(self._latest, [0.0, 0])
            counts[0] += flat
            counts[1] += elements

    def finish(self, value: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables `weights` and `outputs`, with what was looked at beside the recorder."""
        self._recorder.step(value.detach())
        weights = self._recorder.table("weights")
        outputs = self._recorder.table("outputs")
        for column, place in (("grad_zeros", 0), ("grad_subnormals", 1)):
            shares = {i: c[place] / c[2] for i, c in self._of_parameters().items()}
            _add(weights, column, self._named(shares))
            shares = {i: c[place] / c[2] for i, c in self._gradients.items()}
            _add(outputs, f"output_{column}", self._named(shares))
        spread = {i: sum(values) / len(values) for i, values in self._spread.items()}
        dead = {i: 1 - float(alive.double().mean()) for i, alive in self._alive.items()}
        flat = {i: part / whole for i, (part, whole) in self._flat.items()}
        for column, numbers in {
            "output_spread": spread, "dead_units": dead, "saturated": flat,
        }.items():  # fmt: skip
            _add(outputs, column, self._named(numbers))
        return weights, outputs

    def _of_parameters(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        parameters = self._recorder._layers.parameters()
        for index, own in enumerate(self._recorder._layers.own):
            grads = [getattr(parameters[place], "grad", None) for place in own]
            parts = [_counts(g) for g in grads if g is not None and not g.is_sparse]
            if parts:
                found[index] = [sum(part) for part in zip(*parts, strict=True)]
        return found

    def _named(self, numbers: Mapping[int, float]) -> dict[str, float]:
        return {self._layers[index]: value for index, value in numbers.items()}


def _counts(gradient: Tensor) -> tuple[int, int, int]:
    """Exact zeros, subnormals, elements."""
    zeros = gradient.numel() - int(torch.count_nonzero(gradient))
    return zeros, int(observe.subnormals(gradient).sum()), gradient.numel()


def _add(frame: pd.DataFrame, column: str, values: Mapping[str, float]) -> None:
    import pandas as pd
    import pyarrow as pa

    if len(frame):
        numbers = [values.get(str(layer)) for layer in frame["layer"]]
        kind = pd.ArrowDtype(pa.float64())
        frame[column] = pd.Series(pa.array(numbers, pa.float64()), dtype=kind, index=frame.index)
