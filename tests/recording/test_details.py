"""Quantities beyond norms, each against a slow computation by hand in float64."""

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import ALWAYS, TOLERANCE, cells, column, near, on_ranks, record
from test_any_model import (
    CHECKPOINTED,
    MODELS,
    Built,
    Tables,
    built,
    cloned,
    floats,
    owned,
    quiet,
    seeded,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow import Recorder, Skip
from gradflow.recording import elements
from gradflow.recording.quantities import DETAILS
from gradflow.recording.schedules import every
from gradflow.store import Run

EXACT = {
    "grad_max", "grad_nonfinite", "grad_zeros", "grad_subnormals", "output_max",
    "output_nonfinite", "output_grad_zeros", "output_grad_subnormals", "dead_units",
}  # fmt: skip


# --- by hand --------------------------------------------------------------------------------------


def array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).double().numpy().copy()


def flat(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([array(tensor).ravel() for tensor in tensors])


def largest(tensors: list[Tensor]) -> float:
    return max(abs(value) for value in flat(tensors).tolist())


def share_of_zeros(tensors: list[Tensor]) -> float:
    values = flat(tensors).tolist()
    return sum(value == 0 for value in values) / len(values)


def nonfinite(tensors: list[Tensor]) -> int:
    return sum(not math.isfinite(value) for value in flat(tensors).tolist())


_BITS = {
    torch.float64: (torch.int64, 52, 11), torch.float32: (torch.int32, 23, 8),
    torch.float16: (torch.int16, 10, 5), torch.bfloat16: (torch.int16, 7, 8),
}  # fmt: skip


def share_of_subnormals(tensors: list[Tensor]) -> float:
    """By their bits: an exponent of zeros alone, before others."""
    count = 0
    for tensor in tensors:
        dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
        whole, mantissa, exponent = _BITS[tensor.dtype]
        bits = dense.detach().contiguous().view(whole)
        small = bits & ((1 << mantissa) - 1), bits & (((1 << exponent) - 1) << mantissa)
        count += int(((small[0] != 0) & (small[1] == 0)).sum())
    return count / sum(tensor.numel() for tensor in tensors)


def rank_of(matrix: np.ndarray) -> float | None:
    """e to the entropy of the singular values' shares."""
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.any():
        return None
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0))


def spread_of(output: np.ndarray) -> float | None:
    """Variance over mean square, each summed up over the elements of a sample."""
    rows = output.reshape(len(output), -1)
    mean = rows.sum(axis=0) / len(rows)
    within = ((rows - mean) ** 2).sum()
    whole = (rows**2).sum()
    return float(within / whole) if whole else None


def axis_of_units(module: nn.Module, output: Tensor, samples: int) -> int | None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm1d):
        return 1
    if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        return 1
    of_features = nn.Linear | nn.LayerNorm | nn.Embedding | nn.EmbeddingBag | nn.LSTMCell
    if isinstance(module, of_features | nn.RNNBase | nn.MultiheadAttention):
        return output.dim() - 1
    return 1 if output.dim() == 2 and len(output) == samples else None


def dead_share(module: nn.Module, outputs: list[Tensor], samples: list[int]) -> float | None:
    """Of units whose every value has gradient zero; null below 16 values, and where none is."""
    units: dict[int, list[float]] = {}
    for output, count in zip(outputs, samples, strict=True):
        axis = axis_of_units(module, output, count)
        if output.grad is None or output.dim() < 2 or axis is None:
            continue
        by_unit = np.moveaxis(array(output.grad), axis, 0)
        for unit, values in enumerate(by_unit):
            units.setdefault(unit, []).extend(values.ravel().tolist())
    if not units or min(map(len, units.values())) < 16:
        return None
    return sum(not any(values) for values in units.values()) / len(units)


def mean(values: list[float | None]) -> float | None:
    """Null where one is not defined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def by_hand(model: nn.Module, run: Callable[[Any], Tensor]) -> Tables:
    """What one step should record; blocks split their x themselves."""
    outputs: dict[nn.Module, dict[int, Tensor]] = {}
    firsts: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    samples: list[int] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        samples.append(len(given[0]) if given and given[0].dim() else 0)

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        found = list(floats(getattr(output, "data", output) if is_packed(output) else output))
        for tensor in found:
            outputs.setdefault(module, {})[id(tensor)] = tensor
            if tensor.requires_grad:
                tensor.retain_grad()
        if found:
            firsts.setdefault(module, []).append((found[0], samples[-1]))
        return cloned(output)

    handles: list[Any] = [module.register_forward_hook(keep) for module in model.modules()]
    handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, Residual)}
    for block in blocks.values():
        block.splits = []
    run(model).backward()
    for handle in handles:
        handle.remove()

    of_weights: dict[str, Callable[[list[Tensor]], float | None]] = {
        "grad_max": largest, "grad_nonfinite": nonfinite, "grad_zeros": share_of_zeros,
        "grad_subnormals": share_of_subnormals, "grad_rank": rank_of_weight,
    }  # fmt: skip
    tables: Tables = {"weights": {name: {} for name in of_weights}, "outputs": {}, "blocks": {}}
    for layer, (module, own) in owned(model).items():
        gradients = [p.grad for p in own if p.grad is not None]
        for name, measure in of_weights.items():
            tables["weights"][name][layer] = measure(gradients) if gradients else None
        kept = list(outputs.get(module, {}).values())
        back = [t.grad for t in kept if t.grad is not None]
        first = firsts.get(module, [])
        spreads = [spread_of(array(t)) for t, n in first if t.dim() > 1 and 1 < n == len(t)]
        found = {
            "output_max": largest(kept) if kept else None,
            "output_nonfinite": nonfinite(kept) if kept else None,
            "output_spread": mean(spreads),
            "output_grad_zeros": share_of_zeros(back) if back else None,
            "output_grad_subnormals": share_of_subnormals(back) if back else None,
            "dead_units": dead_share(module, [t for t, _ in first], [n for _, n in first]),
        }
        for name, value in found.items():
            tables["outputs"].setdefault(name, {})[layer] = value
    for name, block in blocks.items():
        parts = [block.gradients(split) for split in block.splits]
        norms = [float(np.sqrt((rest**2).sum())) for _, rest in parts]
        tables["blocks"].setdefault("branch_x_grad_norm", {})[f"{name}.skip"] = math.hypot(*norms)
        tables["blocks"].setdefault("x_grad_cosine", {})[f"{name}.skip"] = mean(
            [cosine_of(*part) for part in parts]
        )
    return tables


def is_packed(output: Any) -> bool:
    return isinstance(output, nn.utils.rnn.PackedSequence)


def rank_of_weight(gradients: list[Tensor]) -> float | None:
    matrix = max((array(g) for g in gradients), key=lambda g: (g.ndim, g.size))
    return None if matrix.ndim < 2 else rank_of(matrix.reshape(len(matrix), -1))


def cosine_of(one: np.ndarray, other: np.ndarray) -> float | None:
    length = math.sqrt((one**2).sum()) * math.sqrt((other**2).sum())
    return float((one * other).sum() / length) if length else None


def check(recorder: Recorder, expected: Tables, dtype: torch.dtype, step: int = 0) -> None:
    """Counts, shares and maxima exactly, real numbers within tolerance; null is null."""
    wrong = {}
    for table, quantities in expected.items():
        frame = recorder.table(table)
        for quantity, values in quantities.items():
            found = {} if frame.empty else column(recorder, table, quantity, step)
            for layer in {**values, **found}:
                pair = found.get(layer), values.get(layer)
                if not same(*pair, quantity, dtype):
                    wrong[quantity, layer] = pair
    assert not wrong, f"(found, by hand): {wrong}"


def same(found: float | None, value: float | None, quantity: str, dtype: torch.dtype) -> bool:
    if found is None or value is None:
        return found is value
    if quantity in EXACT:  # as the column's own format has it
        value = float(np.float32(value)) if dtype == torch.float32 else value
        return found == value or (math.isnan(found) and math.isnan(value))
    tolerance = TOLERANCE[dtype]  # a cosine's own is one of the angle
    of_angle = tolerance if quantity.endswith("cosine") else 0
    return math.isclose(found, value, rel_tol=tolerance, abs_tol=of_angle)


# --- models ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + F(x), or doses of either; `outside` times x is added to it, past the skip.

    With `splits`, by hand: x is copied for each of its three uses.
    """

    def __init__(self, inner: nn.Module, outside: float = 0.0, **doses: float) -> None:
        super().__init__()
        self.inner, self.outside = inner, outside
        self.skip = Skip("dosed" if doses else "identity", **doses)
        self.doses = {"skip_forward": 1.0, "skip_backward": 1.0, "branch_scale": 1.0} | doses
        self.splits: list[list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.splits is None:
            y = self.skip(x, self.inner(x))
            return y + self.outside * x if self.outside else y
        split = [x.clone() for _ in range(3)]
        for part in split:
            part.retain_grad()
        self.splits.append(split)
        branch = self.doses["branch_scale"] * self.inner(split[0])
        a, b = self.doses["skip_forward"], self.doses["skip_backward"]
        skip = a * split[1].detach() + b * (split[1] - split[1].detach())
        return branch + skip + self.outside * split[2]

    def gradients(self, split: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Through the skip, and not."""
        branch, skip, outside = (np.zeros(t.shape) if t.grad is None else array(t.grad)
                                 for t in split)  # fmt: skip
        return skip, branch + outside


def inner(width: int) -> nn.Module:
    conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv)


class Convolutional(nn.Module):
    """Plain and dosed blocks, one called twice, and one whose input is used outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.plain, self.twice = Residual(inner(4)), Residual(inner(4))
        self.dosed = Residual(inner(4), skip_forward=0.5, skip_backward=2.0, branch_scale=-1.5)
        self.backward_only = Residual(inner(4), skip_forward=0.0, skip_backward=1.0)
        self.used = Residual(inner(4), outside=0.75)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.stem(x))
        x = self.twice(self.twice(x).relu())
        x = self.used(self.backward_only(self.dosed(x)))
        return self.head(x.mean((2, 3)))


def convolutional() -> Built:
    x, labels = torch.randn(18, 3, 5, 5), torch.arange(18) % 5
    return Convolutional(), lambda model: F.cross_entropy(model(x), labels)


def with_dead_units() -> Built:
    """3 of 8 units are below zero for every sample, and 1 of 6 is read by nothing."""
    first, second, last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
    with torch.no_grad():
        first.bias[[0, 2, 7]] = -100.0
        last.weight[:, 4] = 0.0
    x = torch.randn(40, 4)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Tanh(), last)
    return model, lambda model: model(x).square().mean()


def transformer() -> Built:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(4, 5, 8)
    return nn.Sequential(layer, nn.Linear(8, 3)), lambda model: model(x).pow(3).mean()


def frozen_residual() -> Built:
    """No gradient reaches the first block's x; the second one's branch is frozen."""
    x = torch.randn(20, 3, 4, 4)
    model = nn.Sequential(Residual(inner(3)), Residual(inner(3)), nn.Conv2d(3, 3, 1))
    model[0].requires_grad_(False)
    model[1].inner[2].requires_grad_(False)
    return model, lambda model: model(x).square().mean()


HERE: dict[str, Callable[[], Built]] = {
    "convolutional": convolutional, "dead units": with_dead_units, "transformer": transformer,
}  # fmt: skip
OPTIONS: dict[str, Any] = {"quantities": ("all", "details"), "schedule": ALWAYS}


def watched(model: nn.Module, run: Callable[[Any], Tensor], **options: Any) -> Recorder:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return record(model, lambda: run(model), **OPTIONS, optimizer=optimizer, **options)


# --- one step of every model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HERE, *MODELS])
def test_details_of_every_model_are_as_by_hand(name: str, dtype: torch.dtype) -> None:
    build = (HERE | MODELS)[name]
    model, run = built(build)
    expected = by_hand(model, seeded(run))
    copy, run = built(build)
    with quiet(name):
        recorder = watched(copy, seeded(run))
    check(recorder, expected, dtype)
    assert set(recorder.table("weights")) >= set(expected["weights"])


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_leaves_no_trace(name: str, reentrant: bool) -> None:
    """But for noise, as a reentrant one goes back through each forward pass by itself; and where
    passes have several sizes, as it is not known which one is being repeated."""

    def details(kind: bool | None) -> Tables:
        model, run = built(CHECKPOINTED[name], kind)
        recorder = watched(model, seeded(run))
        return {
            table: {n: column(recorder, table, n) for n in recorder.table(table) if n in wanted}
            for table in ("weights", "outputs", "blocks")
        }

    several = (name, reentrant) == ("accumulated", True)
    wanted = {*DETAILS} - {"noise_scale"} - ({"output_spread"} if several else set())
    expected, found = details(None), details(reentrant)
    for table, quantities in expected.items():
        for quantity, values in quantities.items():
            for layer, value in values.items():
                pair = found[table][quantity].get(layer), value
                assert same(*pair, quantity, torch.float32), (quantity, layer, pair)
    assert expected["blocks"]["x_grad_cosine"]


def test_a_pass_that_is_repeated_has_its_own_samples_or_none() -> None:
    """With reentrant checkpointing outputs are seen in backward, after all forward passes."""
    model = CHECKPOINTED["accumulated"](True)[0]
    for sizes in ((4, 4), (4, 2)):
        passes = [torch.randn(size, 4) for size in sizes]
        with Recorder(model, "output_spread", ALWAYS) as recorder:
            sum(model(x).square().mean() for x in passes).backward()  # type: ignore[union-attr]
            recorder.step()
        found = column(recorder, "outputs", "output_spread")
        assert found["head"] is not None
        assert (found.get("blocks.0.first") is None) == (sizes == (4, 2))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_an_evaluation_before_the_pass_back_leaves_no_trace(reentrant: bool) -> None:
    """A repeated pass has as many samples as the first time, not as many as the evaluation."""

    def spread(evaluated: bool) -> dict[str, Any]:
        model, _ = built(CHECKPOINTED["chain"], reentrant)
        with Recorder(model, "output_spread", ALWAYS) as recorder:
            loss = model(torch.randn(6, 4)).square().mean()
            if evaluated:
                model.reentrant = None  # type: ignore[assignment]
                with torch.no_grad():
                    model(torch.randn(3, 4))
            torch.manual_seed(1)
            loss.backward()
            recorder.step()
        return column(recorder, "outputs", "output_spread")

    expected = spread(False)
    assert expected["blocks.0.first"] is not None
    assert spread(True) == expected


@pytest.mark.parametrize("name", [*HERE, *MODELS])
def test_parameters_are_bitwise_those_without_a_recorder(name: str) -> None:
    """All there is, at every step of three, and buffers too."""

    def train(recorded: bool) -> dict[str, Tensor]:
        model, run = built((HERE | MODELS)[name])
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        recorder = Recorder(model, **OPTIONS, optimizer=optimizer)
        with recorder if recorded else contextlib.nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                loss = seeded(run)(model)
                loss.backward()
                if recorded:
                    recorder.step(loss)
                optimizer.step()
        return model.state_dict()

    without = train(False)
    with quiet(name):
        measured = train(True)
    for key, value in without.items():
        if not isinstance(value, nn.UninitializedParameter):
            assert torch.equal(measured[key], value), key


# --- updates, and the gradient of the step before -------------------------------------------------


def layers() -> nn.Sequential:
    """The last one's parameters are zero."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3))
    for parameter in model[3].parameters():
        nn.init.zeros_(parameter)
    return model


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_ratio_is_of_parameters_before_and_after(name: str, dtype: torch.dtype) -> None:
    model = layers()
    optimizer = OPTIMIZERS[name](model.parameters())
    expected: dict[tuple[int, str], float | None] = {}
    with Recorder(model, "update_ratio", ALWAYS, optimizer) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            (model(torch.randn(5, 4)) - 1).square().mean().backward()
            recorder.step()
            before = {n: array(p) for n, p in model.named_parameters()}
            optimizer.step()
            after = {n: array(p) for n, p in model.named_parameters()}
            for layer in ("0", "2", "3"):
                names = [n for n in before if n.startswith(layer)]
                moved = math.sqrt(sum(((after[n] - before[n]) ** 2).sum() for n in names))
                length = math.sqrt(sum((before[n] ** 2).sum() for n in names))
                expected[step, layer] = moved / length if length else None
    found = cells(recorder.table("weights"), "update_ratio")
    assert expected[0, "3"] is None
    assert expected[1, "3"] is not None
    expected = {key: value for key, value in expected.items() if key != (0, "3")}
    # A difference of parameters in their own format has its rounding: 2⁻²⁴ of what is subtracted.
    assert found == near(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_updates_of_half_precision_are_subtracted_in_float32(kind: torch.dtype) -> None:
    model = nn.Linear(8, 8, bias=False, dtype=kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.37)
    before = array(model.weight)
    with Recorder(model, "update_ratio", ALWAYS, optimizer) as recorder:
        model.weight.grad = torch.randn(8, 8).to(kind)
        recorder.step()
        optimizer.step()
    moved = math.sqrt(((array(model.weight) - before) ** 2).sum())
    expected = moved / math.sqrt((before**2).sum())
    assert column(recorder, "weights", "update_ratio")["Linear"] == near(expected, rel=1e-6)


def with_gradients(recorder: Recorder, parameter: nn.Parameter, gradients: list[Any]) -> None:
    for gradient in gradients:
        parameter.grad = gradient
        recorder.step()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_cosine_with_the_step_before_whatever_the_schedule(scale: float) -> None:
    model = nn.Linear(3, 4, bias=False)
    gradients = [torch.randn(4, 3) * scale for _ in range(8)]
    with Recorder(model, "grad_cosine", {"grad_cosine": every(3)}) as recorder:
        with_gradients(recorder, model.weight, gradients)
    expected = {
        (step, "Linear"): cosine_of(array(gradients[step]), array(gradients[step - 1]))
        for step in (3, 6)
    }
    assert cells(recorder.table("weights"), "grad_cosine") == near(expected, rel=1e-6)


def test_cosine_of_opposite_equal_zero_absent_and_other_gradients() -> None:
    model = nn.Linear(3, 4, bias=False)
    one = torch.randn(4, 3)
    gradients = [one, -2 * one, -one, 0 * one, one, None, one, torch.full_like(one, math.nan), one]
    with Recorder(model, ("weight_grad_norm", "grad_cosine"), ALWAYS) as recorder:
        with_gradients(recorder, model.weight, gradients)
        model.weight = nn.Parameter(torch.randn(1, 3))  # would broadcast
        with_gradients(recorder, model.weight, [torch.ones(1, 3)])
    found = cells(recorder.table("weights"), "grad_cosine")
    cosines = [found.get((step, "Linear")) for step in range(10)]
    assert cosines[1:3] == near([-1, 1], rel=1e-6)
    assert cosines[:1] + cosines[3:] == [None] * 8


def test_cosine_of_a_module_s_parameters_together_dense_and_sparse(dtype: torch.dtype) -> None:
    model, run = built(MODELS["sparse gradients"])
    kept: list[dict[str, np.ndarray]] = []
    with Recorder(model, "grad_cosine", ALWAYS) as recorder:
        for _ in range(3):
            model.zero_grad()
            (run(model) * torch.rand(())).backward()
            kept.append({n: array(p.grad) for n, p in model.named_parameters() if p.grad.numel()})
            recorder.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    found = cells(recorder.table("weights"), "grad_cosine")
    for step in (1, 2):
        for layer in ("table", "bag", "last"):
            now, then = (
                np.concatenate([v.ravel() for n, v in at.items() if n.startswith(layer)])
                for at in (kept[step], kept[step - 1])
            )
            expected = cosine_of(now, then)
            assert found[step, layer] == near(expected, rel=TOLERANCE[dtype])


# --- noise ----------------------------------------------------------------------------------------


def noise_of(passes: list[np.ndarray]) -> float | None:
    """McCandlish et al. 2018, appendix A.1, with B_small = 1 pass and B_big = n of them.

    Their gradients are those of mean losses: of one pass n times its part of the sum.
    """
    n = len(passes)
    big = (sum(passes) ** 2).sum()
    small = sum(((n * h) ** 2).sum() for h in passes) / n
    signal = (n * big - small) / (n - 1)
    noise = (small - big) / (1 - 1 / n)
    return float(noise / signal) if signal > 1e-6 * big else None


class Passes:
    """A model whose passes' gradients are known: of Σ x·w, x."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        self.recorder = Recorder(self.model, "noise_scale", ALWAYS, **options)

    def run(self, *gradients: Tensor, between: Callable[[], Any] = lambda: None) -> float | None:
        """One step."""
        with self.recorder:
            for gradient in gradients:
                self.model(gradient).sum().backward()
                between()
            self.recorder.step()
        frame = self.recorder.table("weights")
        return None if frame.empty else column(self.recorder, "weights", "noise_scale")["Linear"]


def parts(n: int, noise: float = 1.0) -> list[Tensor]:
    signal = torch.ones(1, 6, dtype=torch.float64)
    return [signal + noise * torch.randn(1, 6, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_noise_scale_of_micro_batches(n: int, scale: float) -> None:
    passes = [scale * part for part in parts(n)]
    expected = noise_of([array(part) for part in passes])
    assert expected is not None
    assert Passes().run(*passes) == near(expected, rel=1e-12)


def test_noise_scale_by_its_closed_form() -> None:
    """h = (1, ±a): |G|² is 4 of 4 + 0, tr(Σ) 2·2a²: passes have a variance of 4a² around (2, 0)."""
    x = torch.zeros(2, 1, 6, dtype=torch.float64)
    x[:, 0, 0], x[:, 0, 1] = 1, torch.tensor([0.5, -0.5])
    assert Passes().run(*x) == near(2 * 0.25 / (1 - 0.25), rel=1e-12)
    assert Passes().run(x[0], x[0]) == 0


def test_noise_scale_is_null_where_it_cannot_be_told() -> None:
    """One pass; opposite ones; ones without anything in common, whose rounding is no signal."""
    one, other = torch.rand(1, 6, dtype=torch.float64), torch.rand(1, 6, dtype=torch.float64)
    one[0, 3:], other[0, :3] = 0, 0
    assert Passes().run(one) is None
    assert Passes().run(one, -0.9 * one) is None
    for _ in range(20):
        assert Passes().run(one * torch.rand(()), other * torch.rand(())) is None
    assert Passes().run(one, math.nan * one) is None


def test_noise_scale_over_steps_and_modules(dtype: torch.dtype) -> None:
    """Own parameters together, tied ones once; a pass that does not meet an expert counts, as 0."""
    model, _ = built(MODELS["tied weights"])
    model.register_module("expert", nn.Linear(6, 6))
    passes: dict[str, list[np.ndarray]] = {}
    with Recorder(model, "noise_scale", ALWAYS) as recorder:
        for _ in range(3):
            model.zero_grad()
            passes = {}
            for index in range(3):
                x = 1 + 0.3 * torch.randn(5, 6)
                loss = (model(x) - x).square().mean()
                loss = loss if index == 1 else loss + model.expert(x).sum()
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True,
                                                allow_unused=True)  # fmt: skip
                for layer, (_, own) in owned(model).items():
                    known = dict(zip(map(id, model.parameters()), gradients, strict=True))
                    own_gradients = [
                        torch.zeros_like(p) if known[id(p)] is None else known[id(p)] for p in own
                    ]
                    passes.setdefault(layer, []).append(flat(own_gradients))
                loss.backward()
            recorder.step()
    found = column(recorder, "weights", "noise_scale", 2)
    expected = {layer: noise_of(of_layer) for layer, of_layer in passes.items()}
    assert None not in expected.values()
    # |H|² is of sums in float32, and Σ|h|² is taken from it.
    assert found == near(expected, rel=2e-5 if dtype == torch.float32 else 1e-11)


def test_nothing_beside_the_passes_disturbs_their_noise() -> None:
    passes = parts(4, 0.5)
    expected = near(noise_of([array(part) for part in passes]), rel=1e-12)
    case = Passes()
    weight = case.model.weight
    x = torch.randn(3, 6, dtype=torch.float64)

    def differentiate() -> None:
        with case.recorder.paused():
            torch.autograd.grad(case.model(x).square().sum(), weight)
        with torch.no_grad():
            case.model(x)

    assert case.run(*passes, between=differentiate) == expected
    case = Passes()
    weight = case.model.weight
    assert case.run(*passes, between=lambda: torch.autograd.grad((weight * 3).sum(), weight)) == (
        expected
    )
    sparse = nn.Embedding(6, 1, sparse=True, dtype=torch.float64)
    with Recorder(sparse, "noise_scale", ALWAYS) as recorder:
        for part in passes:
            (sparse(torch.tensor([5, 0, 1, 2, 3, 4, 5])) * part[0, [5, 0, 1, 2, 3, 4, 5], None]
             / torch.tensor([2, 1, 1, 1, 1, 1, 2])[:, None]).sum().backward()  # fmt: skip
        recorder.step()
    assert column(recorder, "weights", "noise_scale")["Embedding"] == expected


@pytest.mark.parametrize("unscaled", [True, False])
def test_noise_under_a_scaler(unscaled: bool) -> None:
    passes = parts(4)
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Recorder(model, ("noise_scale", "grad_max"), ALWAYS, optimizer, scaler=scaler) as recorder:
        for part in passes:
            scaler.scale(model(part).sum()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        recorder.step()
        scaler.step(optimizer)
        scaler.update()
    expected = noise_of([array(part) for part in passes])
    assert column(recorder, "weights", "noise_scale")["Linear"] == near(expected, rel=1e-12)
    highest = float(sum(array(part) for part in passes).max())
    assert column(recorder, "weights", "grad_max")["Linear"] == near(highest, rel=1e-12)


def test_a_gradient_that_is_not_its_passes_alone_has_no_noise_scale() -> None:
    """What a step before left, or a pass in `paused`; zeros are nothing."""
    passes = parts(3, 0.1)
    case = Passes()
    with case.recorder as recorder:
        for to_none in (True, None, False):
            if to_none is not None:
                case.model.zero_grad(set_to_none=to_none)
            for part in passes:
                case.model(part).sum().backward()
            recorder.step()
    expected = near(noise_of([array(part) for part in passes]), rel=1e-12)
    found = cells(recorder.table("weights"), "noise_scale")
    assert found == {(0, "Linear"): expected, (2, "Linear"): expected}
    case = Passes()

    def add() -> None:
        with case.recorder.paused():
            case.model(passes[0]).sum().backward()

    assert case.run(*passes, between=add) is None


def test_two_losses_of_one_batch_are_no_noise() -> None:
    case = Passes()
    with case.recorder as recorder:
        y = case.model(torch.ones(1, 6, dtype=torch.float64))
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        recorder.step()
    assert recorder.table("weights").empty


def test_passes_count_once_after_a_state_was_loaded() -> None:
    passes = parts(2)
    case = Passes()
    with case.recorder as recorder:
        recorder.load_state_dict(recorder.state_dict() | {"next_step": 3})
        for part in passes:
            case.model(part).sum().backward()
        recorder.step()
    expected = noise_of([array(part) for part in passes])
    found = column(case.recorder, "weights", "noise_scale", 3)
    assert found["Linear"] == near(expected, rel=1e-12)


class Again(nn.Module):
    """A layer that reentrant checkpointing goes back through twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.shared, self.first(x).square(), use_reentrant=True)
        return x


def test_a_reentrant_checkpoint_that_comes_twice_is_not_two_passes() -> None:
    model = Again()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    options: dict[str, Any] = {"quantities": "noise_scale", "schedule": ALWAYS}
    recorder = record(model, lambda: model(torch.rand(3, 4)).sum(), **options)
    assert recorder.table("weights").empty


def test_parameters_may_change_their_shape_between_steps() -> None:
    model, passes = nn.Linear(2, 1, bias=False, dtype=torch.float64), parts(2)
    with Recorder(model, "noise_scale", ALWAYS) as recorder:
        for index in range(2):
            model.zero_grad()
            if index:
                model.weight = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
            model.weight.data = torch.ones(1, 6, dtype=torch.float64)
            for part in passes:
                model(part).sum().backward()
            recorder.step()
    expected = near(noise_of([array(part) for part in passes]), rel=1e-12)
    found = cells(recorder.table("weights"), "noise_scale")
    assert found == {(step, "Linear"): expected for step in range(2)}


def test_parameters_may_change_their_format_between_steps() -> None:
    model, passes = nn.Linear(6, 1, bias=False), [part.float() for part in parts(2)]
    with Recorder(model, "noise_scale", ALWAYS) as recorder:
        for kind in (torch.float32, torch.float64):
            model.zero_grad()
            model.to(kind)
            for part in passes:
                model(part.to(kind)).sum().backward()
            recorder.step()
    expected = near(noise_of([array(part) for part in passes]), rel=1e-6)
    found = cells(recorder.table("weights"), "noise_scale")
    assert found == {(step, "Linear"): expected for step in range(2)}


# --- ranks ----------------------------------------------------------------------------------------


def rank_found(gradient: Tensor) -> float | None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros_like(gradient))
    model.bias = nn.Parameter(gradient.new_zeros(max(gradient.shape, default=1)))
    with Recorder(model, ("grad_rank", "grad_max"), ALWAYS) as recorder:
        model.weight.grad = gradient
        model.bias.grad = torch.ones_like(model.bias)
        recorder.step()
    return column(recorder, "weights", "grad_rank")["Module"]


TWO_ONE = math.exp(2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_ranks_of_known_matrices(scale: float, dtype: torch.dtype) -> None:
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    given = {
        "one": torch.outer(torch.randn(7).sign(), torch.randn(4)),
        "orthogonal": turn,
        "two to one": turn[:, :2] @ torch.diag(torch.tensor([2.0, 1.0]).double()) @ turn[:2],
        "convolution": torch.eye(6)[:4].reshape(4, 2, 1, 3),
    }
    expected = {"one": 1, "orthogonal": 5, "two to one": TWO_ONE, "convolution": 4}
    found = {name: rank_found((matrix * scale).to(dtype)) for name, matrix in given.items()}
    assert found == near(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)


def test_no_rank_of_zero_vectors_numbers_and_what_is_not_finite() -> None:
    for gradient in (torch.zeros(3, 4), torch.ones(5), torch.tensor(2.0)):
        assert rank_found(gradient) is None
    for bad in (math.nan, math.inf):
        assert rank_found(torch.full((2, 2), bad)) is None


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_ranks_of_half_precision(kind: torch.dtype) -> None:
    gradient = torch.randn(9, 5).to(kind)
    assert rank_found(gradient) == near(rank_of(array(gradient)), rel=1e-6)


# --- formats and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**83], ids=["1e-30", "1e25"])
@pytest.mark.parametrize("name", HERE)
def test_gradients_of_any_size(name: str, scale: float) -> None:
    def scaled() -> Built:
        model, run = built(HERE[name])
        return model, lambda model: seeded(run)(model) * scale

    expected = by_hand(*scaled())
    check(watched(*scaled()), expected, torch.float32)
    known = [value or 0 for value in expected["weights"]["grad_max"].values()]
    assert 1e-3 < max(known) / scale < 1e3


class Given(nn.Module):
    """Its output is its parameter; the gradient is what the loss is multiplied by."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        return self.values * 1


def measured(values: Tensor, gradient: Tensor) -> dict[str, Any]:
    """All that is recorded of one layer."""
    model = Given(values)
    recorder = watched(model, lambda model: (model() * gradient).sum())
    rows = [recorder.table(table).to_dict("records") for table in ("weights", "outputs")]
    assert list(map(len, rows)) == [1, 1]
    return rows[0][0] | rows[1][0]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_subnormals_and_zeros_of_every_format(kind: torch.dtype) -> None:
    tiny, least = torch.finfo(kind).tiny, torch.finfo(kind).smallest_normal
    assert tiny == least
    gradient = torch.tensor([0, -0.0, 1, -1, tiny, -tiny, 2 * tiny, 1], dtype=kind)
    gradient = torch.cat([gradient, torch.tensor([tiny, -tiny, tiny], dtype=kind) / 4])
    gradient[10] *= 3
    found = measured(torch.ones(11, dtype=kind), gradient)
    wanted = near(share_of_subnormals([gradient]), rel=1e-7)
    assert found["grad_subnormals"] == found["output_grad_subnormals"] == wanted == near(3 / 11)
    assert found["grad_zeros"] == found["output_grad_zeros"] == near(2 / 11, rel=1e-7)
    assert found["grad_max"] == 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_counted(kind: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([1, inf, -inf, nan, nan, 2, 0], dtype=kind)
    found = measured(values, torch.tensor([1, nan, inf, 0, 2, -3, 1], dtype=kind))
    assert (found["grad_nonfinite"], found["output_nonfinite"]) == (2, 4)
    assert math.isnan(found["grad_max"])
    assert math.isnan(found["output_max"])
    assert found["grad_zeros"] == near(1 / 7, rel=1e-6)
    found = measured(torch.tensor([1, -inf, 3], dtype=kind), torch.tensor([inf, 1, 2], dtype=kind))
    assert (found["grad_max"], found["output_max"]) == (inf, inf)


def test_the_largest_of_several_parameters_calls_and_steps() -> None:
    """Also where it is NaN."""
    shared = nn.Linear(2, 2)
    nn.init.constant_(shared.weight, 1.0)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    for x, is_nan in ((3.0, False), (math.nan, True)):
        recorder = record(model, lambda x=x: model(torch.full((1, 2), x)).sum(), **OPTIONS,
                          optimizer=torch.optim.SGD(model.parameters(), 0.0))  # fmt: skip
        highest = column(recorder, "outputs", "output_max")["0"]
        assert math.isnan(highest) == is_nan
        if not is_nan:
            assert highest == near(largest([shared(torch.full((1, 2), x))]), rel=1e-6)
            known = [p.grad for p in shared.parameters() if p.grad is not None]
            assert column(recorder, "weights", "grad_max")["0"] == near(largest(known), rel=1e-6)
        shared.zero_grad()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_blocks_in_half_precision(kind: torch.dtype) -> None:
    """The two parts, as they are in memory, in wider numbers."""
    model = nn.Sequential(nn.Linear(6, 6), Residual(nn.Linear(6, 6))).to(kind)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        seen.extend([args[0], args[1]])
        args[0].retain_grad()
        args[1].retain_grad()

    handle = model[1].skip.register_forward_pre_hook(keep)
    upstream = torch.randn(20, 6).to(kind)
    recorder = watched(model, lambda model: (model(torch.randn(20, 6).to(kind)) * upstream).sum())
    handle.remove()
    rest = array(seen[0].grad) - array(upstream)  # type: ignore[arg-type]
    (found,) = recorder.table("blocks").to_dict("records")
    assert found["branch_x_grad_norm"] == near(math.sqrt((rest**2).sum()), rel=1e-6)
    assert found["x_grad_cosine"] == near(cosine_of(array(upstream), rest), rel=1e-5)


class Prompted(nn.Module):
    """Its block's x is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.block = nn.Parameter(torch.randn(1, 4)), Residual(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.prompt) * x


def test_an_x_that_several_passes_share() -> None:
    model = Prompted()
    upstream = torch.randn(2, 1, 4)
    recorder = watched(model, lambda model: sum(model(x).sum() for x in upstream))
    assert model.prompt.grad is not None
    rest = model.prompt.grad - upstream.sum(0)
    found = {name: column(recorder, "blocks", name)["block.skip"] for name in (
        "branch_x_grad_norm", "x_grad_cosine"
    )}  # fmt: skip
    assert found["branch_x_grad_norm"] == near(math.sqrt((array(rest) ** 2).sum()), rel=1e-6)
    expected = cosine_of(array(upstream.sum(0)), array(rest))
    assert found["x_grad_cosine"] == near(expected, rel=1e-5)


def test_rounding_is_no_direction() -> None:
    """A branch whose gradient is lost in that of the skip has no cosine."""
    model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1].inner.weight.normal_(std=2e-8)
    recorder = watched(model, lambda model: model(torch.randn(8, 4)).pow(3).sum())
    assert column(recorder, "blocks", "x_grad_cosine")["1.skip"] is None
    total = column(recorder, "blocks", "skip_grad_norm")["1.skip"]
    assert column(recorder, "blocks", "branch_x_grad_norm")["1.skip"] <= 1e-7 * total


# --- units and samples ----------------------------------------------------------------------------


def dead(module: nn.Module, x: Tensor, upstream: Tensor) -> float | None:
    recorder = record(module, lambda: (module(x) * upstream).sum(), quantities="dead_units",
                      schedule=ALWAYS)  # fmt: skip
    frame = recorder.table("outputs")
    return None if frame.empty else frame["dead_units"].item()


def upstream(shape: tuple[int, ...], axis: int, off: int) -> Tensor:
    found = torch.rand(shape) + 0.5
    found.movedim(axis, 0)[:off] = 0
    return found


def test_units_of_layers_of_every_kind() -> None:
    x = torch.randn(4, 3, 4, 5)
    for module, given, axis, units in (
        (nn.Conv2d(3, 8, 1), x, 1, 8),
        (nn.Conv2d(3, 8, 1), x[0], 0, 8),  # without samples
        (nn.Conv1d(3, 8, 1), x[0, :, 0].repeat(1, 4), 0, 8),
        (nn.ConvTranspose2d(3, 4, 1), x, 1, 4),
        (nn.BatchNorm2d(3), x, 1, 3),
        (nn.GroupNorm(1, 3), x, 1, 3),
        (nn.InstanceNorm2d(3, affine=True), x, 1, 3),
        (nn.InstanceNorm2d(3, affine=True), x[0], 0, 3),
        (nn.LayerNorm(5), x, 3, 5),
        (nn.Linear(5, 2), x, 3, 2),
        (nn.LSTMCell(5, 6), x.flatten(0, 2), 1, 6),
    ):
        net = First(module) if isinstance(module, nn.LSTMCell) else module
        found = dead(net, given, upstream(net(given).shape, axis, 1))
        assert found == near(1 / units, rel=1e-6), module


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Scale(nn.Module):
    """Somebody's own: who knows which axis are its units?"""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_units_that_are_not_known_are_not_guessed() -> None:
    x = torch.randn(32, 3, 4, 5)
    off = torch.zeros_like(x)
    assert dead(Scale(), x, off) is None
    assert dead(nn.LayerNorm([3, 4, 5]), x, off) is None
    assert dead(nn.PReLU(3), x, off) is None
    assert dead(Scale(), x[:, 0, 0], upstream((32, 5), 1, 2)) == near(0.4, rel=1e-6)
    assert dead(nn.Linear(5, 4), x[0, 0, 0], torch.zeros(4)) is None
    assert dead(Scale(), x[0, 0, 0, 0], torch.tensor(0.0)) is None


def test_sixteen_values_in_the_step_s_calls_together() -> None:
    """A unit that only a small call reaches is not dead."""
    linear = nn.Linear(4, 3)
    model = nn.Sequential(linear)
    for sizes, expected in (((15,), None), ((16,), 2 / 3), ((8, 8), 1 / 3), ((20, 2), 1 / 3)):
        with Recorder(model, "dead_units", ALWAYS) as recorder:
            for unit, size in enumerate(sizes):
                weights = torch.zeros(size, 3)
                weights[-1, unit] = 1
                (model(torch.randn(size, 4)) * weights).sum().backward()
            recorder.step()
        frame = recorder.table("outputs")
        found = None if frame.empty else frame["dead_units"].item()
        assert found == (None if expected is None else near(expected, rel=1e-6))


def test_spread_is_of_samples_and_of_the_mean_over_passes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    given = [torch.randn(5, 4), 1 + torch.randn(7, 4)]
    with Recorder(model, "output_spread", ALWAYS) as recorder:
        for x in given:
            model(x).sum().backward()
        recorder.step()
    spreads = [spread_of(array(model(x))) for x in given]
    found = column(recorder, "outputs", "output_spread")["0"]
    assert found == near(mean(spreads), rel=TOLERANCE[dtype])
    for x in (torch.randn(1, 4), torch.randn(4), torch.full((3, 4), math.nan)):
        recorder = record(model, lambda x=x: model(x).sum(), quantities="output_spread",
                          schedule=ALWAYS)  # fmt: skip
        assert recorder.table("outputs").empty
    recorder = record(model, lambda: model[0](given[0]).sum(), quantities="output_spread",
                      schedule=ALWAYS)  # fmt: skip
    assert recorder.table("outputs").empty  # the model itself was not called


# --- odd shapes -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A 0-d parameter, whole-numbered input, a tuple with an empty and a detached tensor, and one
    call without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gain = nn.Embedding(5, 4), nn.Parameter(torch.tensor(2.0))
        self.parts, self.quiet = Parts(), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _, z, _ = self.parts(self.table(tokens))
        with torch.no_grad():
            y = y + self.quiet(y.detach())
        return self.gain * (y + z[..., None]).mean()


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = x * self.weight
        return y, y[:0], y.detach().sum(-1), tokens_of(y)


def tokens_of(y: Tensor) -> Tensor:
    return y.argmax(-1)


def test_odd_shapes(dtype: torch.dtype) -> None:
    def build() -> Built:
        tokens = torch.arange(20).reshape(4, 5) % 5
        return Odd(), lambda model: model(tokens)

    expected = by_hand(*built(build))
    # Called without gradients: no trace.
    for values in expected["outputs"].values():
        values["quiet"] = None
    check(watched(*built(build)), expected, dtype)
    assert expected["weights"]["grad_rank"]["Odd"] is None
    assert expected["weights"]["grad_max"]["Odd"] is not None


# --- schedules ------------------------------------------------------------------------------------


def test_each_quantity_at_its_own_steps_and_no_row_without_any() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4)))
    schedule = {
        "details": every(0), "grad_max": every(3), "grad_zeros": every(2),
        "output_max": lambda step: step == 5, "x_grad_cosine": lambda step: step in (1, 5),
    }  # fmt: skip
    with Recorder(model, "details", schedule, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        for _ in range(7):
            model.zero_grad()
            model(torch.randn(3, 4)).square().mean().backward()
            recorder.step()
    expected = {
        "weights": {"grad_max": {0, 3, 6}, "grad_zeros": {0, 2, 4, 6}},
        "outputs": {"output_max": {5}},
        "blocks": {"x_grad_cosine": {1, 5}},
    }
    for table, quantities in expected.items():
        frame = recorder.table(table)
        assert set(frame["step"]) == set.union(*quantities.values())
        for name in frame.columns.intersection(DETAILS):
            known = frame.loc[frame[name].notna(), "step"]
            assert set(known) == quantities.get(name, set()), name


def test_the_files_say_under_which_conditions(tmp_path: Path) -> None:
    model, optimizer = layers(), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    options = OPTIONS | {"optimizer": optimizer, "scaler": scaler, "save": tmp_path / "run"}
    with Recorder(model, **options) as recorder:
        for _ in range(2):
            scaler.scale(model(torch.randn(20, 4)).square().mean()).backward()
        recorder.step()
        scaler.step(optimizer)
    run = Run(tmp_path / "run")
    notes = {
        field.name: field.metadata[b"meaning"].decode().rpartition("; ")[2]
        for table in ("weights", "outputs")
        for field in run.table(table).schema
        if field.name in DETAILS
    }
    passes = "accumulated over 2 forward passes"
    assert notes.pop("grad_max") == f"after unscaling, {passes}, before clipping, eager"
    of_outputs = ("output_max", "output_nonfinite", "output_spread")
    assert {notes.pop(name) for name in of_outputs} == {f"{passes}, eager"}
    assert notes.pop("update_ratio").startswith("null where")
    assert set(notes.values()) == {f"{passes}, before clipping, eager"}
    assert len(notes) == 9


def test_diagnose_finds_dead_units_and_leaves_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(6)))
    nn.init.constant_(model[3][0].bias[:20], -100.0)
    found = gradflow.diagnose(model, torch.randn(64, 24))
    assert found.tables["outputs"].set_index("layer")["dead_units"]["3.0"] >= 20 / 24
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_recorder_s_own_time_is_that_of_details_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slowly(real: Callable[..., Any], *args: Any) -> Any:
        time.sleep(0.002)
        calls.append(real)
        return real(*args)

    for name in ("spread", "reached_units", "cosine"):
        monkeypatch.setattr(elements, name, partial(slowly, getattr(elements, name)))
    model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4)))
    recorder = watched(model, lambda model: model(torch.randn(20, 4)).square().mean())
    assert len(calls) == 5
    assert recorder.seconds >= 0.002 * len(calls)


# --- what stays -----------------------------------------------------------------------------------


def alive(shape: tuple[int, ...]) -> int:
    tensors = (found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter))
    return sum(tensor.shape == shape for tensor in tensors)


def test_nothing_stays_when_the_block_ends() -> None:
    """Neither gradients of the step before nor copies of parameters, nor the recorder by a hook."""
    model = nn.Linear(13, 17, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = Recorder(model, **OPTIONS, optimizer=optimizer)
    before = alive((17, 13))
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), recorder:
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(torch.randn(20, 13)).square().mean()
                loss.backward(retain_graph=True)
                recorder.step()
                optimizer.step()
            if error is not None:
                raise error
        optimizer.zero_grad()
        gc.collect()
        assert alive((17, 13)) == before
    loss.backward()  # a graph that is still there
    left = weakref.ref(recorder)
    del recorder, loss
    gc.collect()
    assert left() is None
    assert not model.weight._backward_hooks
    assert not model._forward_hooks


def test_the_gradient_before_is_kept_for_the_step_that_wants_it_only() -> None:
    model = nn.Linear(13, 17, bias=False)
    counts = []
    with Recorder(model, "grad_cosine", every(3)) as recorder:
        for _ in range(7):
            model.zero_grad()
            model(torch.randn(20, 13)).square().mean().backward()
            recorder.step()
            model.zero_grad()
            counts.append(alive((17, 13)))
    kept = [count - min(counts) for count in counts]
    assert kept == [0, 0, 1, 0, 0, 1, 0]


# --- on a GPU, and on several ranks ---------------------------------------------------------------


class Everything(nn.Module):
    """A convolution, normalisation, a block, a sparse format, several tensors and calls."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Convolutional()
        self.lstm, self.small = nn.LSTM(5, 4), nn.Linear(4, 4, dtype=torch.bfloat16)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.network(x)[:, None])
        return self.small(y.bfloat16())


def test_no_detail_looks_at_a_value_but_ranks() -> None:
    """On the meta device, where that raises; `grad_rank` does not raise there, and waits on a GPU:
    a singular value decomposition asks whether it has converged."""
    names = ["all", *(name for name in DETAILS if name != "grad_rank")]
    model, x = Everything().to("meta"), torch.zeros(20, 3, 5, 5, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recorder: Any = Recorder(model, names, ALWAYS, optimizer)
    recorder.__enter__()
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(x).square().mean()
            loss.backward()
        with recorder.paused():
            model(x).sum().backward()
        assert recorder.step(loss)
        optimizer.step()
    measured = {
        name: buffer._measured[2, :, column].any()
        for buffer in recorder._buffers.values()
        for name, column in buffer.index.items()
    }
    assert all(measured.values()), measured
    with pytest.raises(NotImplementedError, match="no data"):
        recorder.flush()


LOOP = """
import json, os, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradflow

torch.set_num_threads(1)
rank, world, port, parts = map(int, sys.argv[1:5])
way, save = sys.argv[5:7]


class Experts(nn.Module):
    # Each sample goes through one of three layers, by its first value: not all on every rank.

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.skip, self.last = gradflow.Skip("identity"), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        h = self.first(x).relu()
        chosen, out = (x[:, 0] * 3).long(), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            mine = torch.nonzero(chosen == number).flatten()
            if len(mine) or way == "fsdp":
                out = out.index_add(0, mine, expert(h[mine]))
        return self.last(self.skip(h, out).relu()) * self.gain


torch.manual_seed(0)
model = Experts().double()
x = torch.rand(4, 12, 6, dtype=torch.float64)
x[:, :, 0] = torch.linspace(0, 0.99, 12)
y = torch.randint(0, 4, (4, 12))
trained = model
if world > 1:
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if way == "ddp":
        trained = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (world // parts, parts), mesh_dim_names=("copies", "parts"))
        fully_shard(model, mesh=mesh if parts < world else mesh["parts"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    recorder = gradflow.Recorder(
        trained, ("all", "details"), lambda step: step != 2, optimizer, save=save
    )
with recorder:
    for inputs, labels in zip(x, y):
        optimizer.zero_grad()
        share = slice(rank * 12 // world, (rank + 1) * 12 // world)
        loss = nn.functional.cross_entropy(trained(inputs[share]), labels[share])
        loss.backward()
        recorder.step(loss)
        optimizer.step()
print(json.dumps([str(one.message) for one in said if "gradflow" in str(one.message)]))
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a Python that is ending
"""


OF_BATCH = ["noise_scale", "output_spread", "dead_units", "x_grad_cosine"]
OF_PARAMETERS = ["update_ratio", "grad_cosine", "grad_rank"]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "parts"), [("ddp", 1), ("fsdp", 2), ("fsdp", 1)])
def test_several_ranks_record_what_one_process_does(tmp_path: Path, way: str, parts: int) -> None:
    """What cannot be put together is said once on each rank, by name, and is not there."""
    absent = OF_BATCH + (OF_PARAMETERS if way == "fsdp" else [])
    assert on_ranks(LOOP, 1, parts, way, tmp_path / "one") == [[]]
    for (said,) in on_ranks(LOOP, 2, parts, way, tmp_path / "two"):
        start, _, names = said.partition(": not recorded with 2 ranks, which have parts of it each")
        assert start == "gradflow"
        assert sorted(names.removeprefix(": ").split(", ")) == sorted(absent)
    found = set()
    for table in ("weights", "outputs", "blocks"):
        one, two = (Run(tmp_path / name).frame(table) for name in ("one", "two"))
        one, two = (
            frame.assign(layer=frame["layer"].astype(str)).set_index(["step", "layer"]).sort_index()
            for frame in (one, two)
        )
        assert (one.index == two.index).all()
        assert not set(two) & set(absent)
        for name in set(two) & set(DETAILS):
            alone, together = (f[name].to_numpy(float, na_value=-2.0) for f in (one, two))
            rtol = 0 if name in EXACT and not name.endswith("max") else 1e-9
            np.testing.assert_allclose(together, alone, rtol=rtol, err_msg=name)
            found |= {name} if (alone != -2).any() else set()
    assert found == set(DETAILS) - set(absent)
