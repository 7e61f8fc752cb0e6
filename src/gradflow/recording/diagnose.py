"""A diagnosis of anyone's model in one call: one pass recorded, and two of a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradflow.errors import GradflowError
from gradflow.recording.modules import all_tensors, takes_hooks, tensors_of
from gradflow.recording.probes import gradient_cosine
from gradflow.recording.probes.passes import (
    Reading,
    output_of,
    readout,
    untouched,
    without_gradients,
)
from gradflow.recording.recorder import Recorder, unseen
from gradflow.recording.slopes import Slopes

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
    mode in which the model is. It is left as it was: parameters (of which a copy is held
    meanwhile), `.grad`, buffers, modes, hooks, and torch's random generators. Lazy modules alone
    are initialised, as by any first pass.

    Args:
        model: any module with parameters, at initialisation or later.
        batch: inputs, or the pair (inputs, targets), a tuple or list. Inputs are a tensor
            (samples, …), a tuple or list of positional arguments, or a mapping of keyword
            arguments: `((a, b), targets)` runs `model(a, b)`, and so does `((a, b),)`. From 16
            samples on, dead units can be told.
        loss: `loss(output, targets)`, or `loss(output)` where the batch has no targets: a tensor of
            one element. By default a random linear readout of the output, as theory takes it.
        seed: of the readout, and of the direction to neighbouring inputs.

    Returns:
        `.findings`, `.unmeasured`, `.tables`, `.plot()`; see `gradflow.diagnosis.Examination`.

    Raises:
        GradflowError: no parameter has a gradient, the batch is empty, or the loss is not one
            number.
    """
    if not isinstance(model, nn.Module):
        raise GradflowError(f"diagnose: model is {type(model).__name__}, wants a torch.nn.Module")
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    first = next(all_tensors(parts[:1]), None)
    if not parts or (first is not None and not first.numel()):
        raise GradflowError("diagnose: the batch is empty; it wants one sample or more")
    inputs, *targets = parts
    with torch.inference_mode(False), unseen(model), _restored(model):
        return _diagnosed(model, inputs, targets, loss, seed)


def _diagnosed(
    model: nn.Module,
    inputs: Any,
    targets: Sequence[Any],
    loss: Callable[..., Tensor] | None,
    seed: int,
) -> Examination:
    from gradflow.diagnosis import diagnose_tables

    recorder = Recorder(model, _QUANTITIES, schedule=lambda step: True)
    seen = _Forward(recorder)
    with without_gradients(model), untouched(model), recorder:
        with seen.watching():
            output = _forward(model, inputs)
        value = _readout(output, seed) if loss is None else loss(output, *targets)
        _check_loss(value)
        value.backward()
        recorder.step(value.detach())
    weights, outputs = recorder.table("weights"), recorder.table("outputs")
    _add(outputs, "saturated", seen.shares())
    _add(weights, "entered", seen.entered)
    _add(weights, "recurrent", seen.recurrent)
    probes = _probed(model, inputs, seed) if tensors_of(output) else None
    found = diagnose_tables(weights, outputs, probes, loss=value.item())
    return replace(found, step=None)


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Parameters that a pass changes, as an embedding's `max_norm` does, are as before after it."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if not is_lazy(p)]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                if not torch.equal(parameter, values):
                    parameter.copy_(values)


def _forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        is_tensor = isinstance(value, Tensor)
        what = f"of shape {tuple(value.shape)}" if is_tensor else f"a {type(value).__name__}"
        raise GradflowError(f"diagnose: the loss has to be a tensor of one element, and is {what}")
    if not value.requires_grad:
        raise GradflowError("diagnose: the loss depends on no parameter that has a gradient")


def _readout(output: Any, seed: int) -> Tensor:
    tensor = output_of(output)
    return (readout(tensor, seed) * tensor).sum()


def _probed(model: nn.Module, inputs: Any, seed: int) -> pd.DataFrame:
    import pandas as pd

    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return pd.DataFrame()  # whole numbers have no neighbours
    readings = gradient_cosine(model, inputs, seed=seed)
    columns = {name: [getattr(r, name) for r in readings] for name in Reading.__slots__}
    return pd.DataFrame({"step": 0, **columns})


_QUANTITIES = (
    "weight_grad_norm", "weight_norm", "grad_zeros", "grad_subnormals",
    "output_rms", "output_grad_norm", "output_spread", "output_grad_zeros",
    "output_grad_subnormals", "dead_units",
)  # fmt: skip


class _Forward:
    """What a diagnosis wants to know beside what is recorded.

    Which share of activations is flat, by the module that was entered or left last.

    Attributes:
        entered: trainable layers -> the place of each in the order of execution, which counts what
            runs without gradients, too.
        recurrent: layers that go through time by themselves, 1 each.
    """

    def __init__(self, recorder: Recorder):
        layers = recorder._layers
        self._modules = dict(zip(layers.owners, layers.select("outputs"), strict=True))
        self.entered: dict[str, float] = {}
        self.recurrent = {
            row.layer: 1.0
            for module, row in self._modules.items()
            if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        }
        self._latest: str | None = None
        self._flat: dict[str, list[float]] = {}  # layer -> flat elements, elements

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The forward pass, in which activations are looked at."""

        def note(module: nn.Module, *_: Any) -> None:
            self._latest = self._modules[module].layer

        def enter(module: nn.Module, *_: Any) -> None:
            note(module)
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                self.entered.setdefault(self._modules[module].layer, len(self.entered))

        with contextlib.ExitStack() as undo:
            for module in filter(takes_hooks, self._modules):
                undo.callback(module.register_forward_pre_hook(enter).remove)
                undo.callback(module.register_forward_hook(note).remove)
            undo.enter_context(Slopes(self._on_activation))
            yield

    def _on_activation(self, flat: float, elements: int) -> None:
        if self._latest is not None:
            counts = self._flat.setdefault(self._latest, [0.0, 0])
            counts[0] += flat
            counts[1] += elements

    def shares(self) -> dict[str, float]:
        return {layer: flat / elements for layer, (flat, elements) in self._flat.items()}


def _add(frame: pd.DataFrame, column: str, values: Mapping[str, float]) -> None:
    import pandas as pd
    import pyarrow as pa

    if len(frame):
        numbers = [values.get(str(layer)) for layer in frame["layer"]]
        kind = pd.ArrowDtype(pa.float64())
        frame[column] = pd.Series(pa.array(numbers, pa.float64()), dtype=kind, index=frame.index)
