"""A diagnosis in words, from the record: what is wrong with a gradient, where, and what helps.

The one home of these words and their thresholds. Thresholds say what changes training, and stand
beside the constants below with their reasons; none was chosen by looking at networks. What was not
recorded is named as not measured, never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri

from gradflow import tables
from gradflow.errors import GradflowError
from gradflow.store import Run
from gradflow.tables import Rows, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VANISHING, EXPLODING, HEALTHY = "vanishing", "exploding", "healthy"
NON_FINITE, DEAD, SATURATED = "not finite", "dead units", "saturated"
UNDERFLOW, SHATTERED, COLLAPSED = "underflow", "shattered", "collapsed inputs"
CUT_OFF = "cut off"
NAMES = (
    NON_FINITE, CUT_OFF, UNDERFLOW, VANISHING, EXPLODING, DEAD, SATURATED, COLLAPSED, SHATTERED,
    HEALTHY,
)  # fmt: skip
"""All diagnoses, in the order in which they are told: what makes others unreadable first."""

CHANGE = 1e3
"""Gradient norm at one end of the network over that at the other. One learning rate serves all
layers; the usable ones span about three decades, so beyond this some layers stand still or are
torn."""
STEADY_CHANGE = 1e2
"""The same where an exponential fits, the rate's interval excludes 1, and the rate over all layers
explains the change: it is a law of the whole network then, and twice the depth squares it."""
EXPLAINED = 0.5
"""The logarithm of a change over what the rate makes of it over all layers, at least: less is a law
of some layers only."""
DEAD_SHARE = 0.5
"""Share of a layer's units without any gradient. With symmetric weights half of them are off even
where all inputs point the same way; more, beyond what CHANCE allows, is no accident of the
initialisation. Lu et al. 2019 (arXiv 1903.06733)."""
CHANCE = 1e-3
"""Chance that symmetric weights put any of the layers beyond the bound on its dead units."""
SATURATED_SHARE = 0.5
"""Share of a layer's outputs where the slope of the activation that follows is below a twentieth of
its largest: beyond this the median unit passes on less than 5 % of the gradient. Glorot & Bengio
2010 (AISTATS, §3)."""
SUBNORMAL_SHARE = 0.5
"""Share of a layer's non-zero gradient elements that are subnormal: beyond this a typical element
has lost digits, and a factor of 2¹⁰ (fp16) or 2²³ (fp32) remains to nothing. Micikevicius et al.
2018 (arXiv 1710.03740, §3.2)."""
VANISHINGLY_SMALL = 1e-30
"""A gradient norm beside which an exact zero is underflow: no unit that is off leaves such ones."""
COLLAPSE = math.exp(-6)
"""Share of the outputs' mean square that differs between inputs, over that at the first layer.
Networks train up to about six times the depth at which correlations converge by a factor of e:
Schoenholz et al. 2017 (arXiv 1611.01232, Fig. 5)."""
COSINE = 0.5
"""Cosine of the gradients at inputs a thousandth of their norm apart, which is about what a usual
update changes: below it, most of a gradient's direction is lost over the length of its own step.
Balduzzi et al. 2017 (arXiv 1702.08591)."""
NOT_MEASURED, NO_GRADIENT = "not measured", "the gradient of the layers was not measured"
THROUGH_TIME = "vanishing through time"
TOO_FEW = (
    "fewer than two layers to compare have a finite gradient that is not zero, norms and "
    "embeddings apart"
)
NOTHING = "nothing to diagnose: no gradient of the weights was recorded"

ENDS = 3
"""Layers at either end of the network whose median is compared; one each, of fewer than six."""

ADVICE = {
    NON_FINITE: "Lower the learning rate or warm it up, and clip the gradient's norm (Pascanu et "
    "al. 2013, arXiv 1211.5063); in fp16 use a gradient scaler.",
    CUT_OFF: "Behind the last of these layers look for detach(), .data, torch.no_grad(), an "
    "operation without a derivative (argmax), or reentrant checkpointing; what is to stay as it "
    "is, freeze with requires_grad_(False).",
    UNDERFLOW: "Scale the loss (Micikevicius et al. 2018, arXiv 1710.03740), or use bfloat16, "
    "which has float32's range (Kalamkar et al. 2019, arXiv 1905.12322).",
    VANISHING: "Draw the weights for the activation: He's initialisation for ReLU (He et al. 2015, "
    "arXiv 1502.01852), orthogonal for tanh (Saxe et al. 2014, arXiv 1312.6120); or add skips.",
    EXPLODING: "Add skip connections (under batch normalisation nothing less helps: Yang et al. "
    "2019, arXiv 1902.08129); without normalisation, draw smaller weights (He et al. 2015).",
    DEAD: "Use an activation that leaks (Maas et al. 2013, ICML), a lower learning rate, and "
    "biases that start at zero.",
    SATURATED: "Draw smaller weights (Glorot & Bengio 2010, AISTATS), normalise before the "
    "activation (Ioffe & Szegedy 2015, arXiv 1502.03167), or use ReLU.",
    SHATTERED: "Add skip connections with a small branch (Balduzzi et al. 2017, arXiv 1702.08591), "
    "or start linear (their looks-linear initialisation).",
    COLLAPSED: "Look at the inputs, and centre them (LeCun et al. 1998, Efficient BackProp); start "
    "at the edge of chaos (Schoenholz et al. 2017, arXiv 1611.01232); or normalise over the batch "
    "(Daneshmand et al. 2020, arXiv 2003.01652).",
    HEALTHY: "",
}  # fmt: skip

# --- what is said ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """One thing that the record shows.

    Attributes:
        name: one of NAMES.
        sentence: what was measured, with its numbers.
        layers: the modules concerned, input side first.
        evidence: the numbers behind the sentence, by name.
        advice: what usually helps, with its source; empty for `healthy`.
    """

    name: str
    sentence: str
    layers: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def advice(self) -> str:
        return ADVICE[self.name]

    @property
    def told(self) -> str:
        """Name and sentence: one line."""
        return f"{self.name}: {self.sentence}"

    def __str__(self) -> str:
        lines = [self.told]
        lines += [f"  layers: {listed(self.layers)}"] * bool(self.layers)
        lines += [f"  usually helps: {self.advice}"] * bool(self.advice)
        return "\n".join(lines)


@dataclass(frozen=True)
class Examination:
    """The diagnoses of one step; `str()` tells them, `plot()` draws the gradient's profile.

    Attributes:
        step: how many updates the parameters had had; None of a model, which does not know.
        findings: what is wrong, or the one finding `healthy`; empty where nothing is wrong and
            fewer than two layers have a gradient to compare.
        unmeasured: diagnosis -> why the record cannot tell.
        remarks: what looks like trouble and is none.
        tables: the frames examined: `weights`, `outputs`, `probes`.
    """

    step: int | None
    findings: tuple[Diagnosis, ...]
    unmeasured: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the findings."""
        return tuple(finding.name for finding in self.findings)

    @property
    def when(self) -> str:
        """`at initialisation`, `after 263 updates`; `diagnosis` of a model."""
        if self.step is None:
            return "diagnosis"
        return "at initialisation" if self.step == 0 else tables.when([self.step])

    @property
    def _undecided(self) -> str:
        """Why there is no finding, where there is none."""
        return f"no diagnosis: {self.unmeasured[_GROWTH]}"

    def lines(self) -> list[str]:
        """What was found, a line each, and what looks like trouble and is none."""
        told = [finding.told for finding in self.findings] or [self._undecided]
        return [f"{self.when}: {line}" for line in told] + list(self.remarks)

    def __str__(self) -> str:
        told = ", ".join(self.names) or self._undecided
        lines = [f"{self.when}: {told}", *map(str, self.findings), *self.remarks]
        lines += [f"not measured: {name} ({why})" for name, why in self.unmeasured.items()]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The norm of each layer's weight gradient from the input on, the diagnosis for a title.

        Raises:
            GradflowError: the gradient of the weights was not recorded.
        """
        from gradflow import plots

        frame = self.tables.get("weights", pd.DataFrame())
        return plots.profile(frame, title=", ".join(self.names))


def listed(layers: Sequence[str], most: int = 6) -> str:
    """Names of layers, of many the first and the last and their number."""
    if len(layers) <= most:
        return ", ".join(layers)
    return f"{', '.join(layers[: most // 2])}, …, {layers[-1]} ({len(layers)} in all)"


# --- from tables, and from runs -------------------------------------------------------------------


def diagnose_tables(
    weights: pd.DataFrame,
    outputs: pd.DataFrame | None = None,
    probes: pd.DataFrame | None = None,
    *,
    step: int | None = None,
    loss: float | None = None,
) -> Examination:
    """What the tables of one run show at one step.

    Args:
        weights, outputs: with the columns of the modules, as `Recorder.table` and
            `Run.with_modules` give them. A quantity that is missing is not measured.
        probes: probes.parquet's, for `input_gradient_cosine` or `gradient_autocorrelation`.
        step: which; by default the first of `weights`. Outputs and probes are those of the nearest
            step at which they were measured, outputs of `step` alone where a gradient of the
            weights is not finite there.
        loss: of that step, if it is known.

    Raises:
        GradflowError: nothing was recorded, or not at that step.
    """
    if weights.empty:
        raise GradflowError(NOTHING)
    known = np.unique(weights["step"].to_numpy(dtype=int))
    at = int(known[0]) if step is None else step
    if at not in known:
        raise GradflowError(f"step={at}: recorded are {known[0]} to {known[-1]}")
    (found,) = _examined([at], loss, weights=weights, outputs=outputs, probes=probes)
    return found


def diagnose_run(run: Run) -> list[Examination]:
    """What a recorded run, gradflow's or a user's, shows at its first and at its last step.

    Raises:
        GradflowError: no gradient of weights was recorded, or a table is damaged.
    """
    found = _at_ends(run)
    if not found:
        raise GradflowError(NOTHING)
    return found


def _at_ends(run: Run) -> list[Examination]:
    """`diagnose_run`; nothing where no gradient of weights was recorded."""
    run = run.held()
    recorded = run.steps_of("weights")
    if not recorded.size:
        return []
    measured = run.steps_of("outputs")
    ends = sorted({int(recorded[0]), int(recorded[-1])})
    weights = run.with_modules("weights", ends)
    outputs = run.with_modules("outputs", [_before(measured, step) for step in ends])
    return _examined(ends, weights=weights, outputs=outputs, probes=run.frame("probes"))


def diagnoses(run: Run) -> pd.DataFrame:
    """`diagnose_run` as a frame: a row a finding; no row where no gradient was recorded.

    Returns:
        moment (`first`, `last`; of one step `first` alone), step, diagnosis (one of NAMES, or
        `not measured`), sentence, layers (names, input side first), evidence (the numbers behind
        the sentence, as JSON), remarks, unmeasured (the diagnoses that the record cannot tell).

    Raises:
        StoreError: a table is damaged.
    """
    found = zip(("first", "last"), _at_ends(run), strict=False)
    return pd.DataFrame([row for moment, one in found for row in _rows(moment, one)])


def _rows(moment: str, examined: Examination) -> list[dict[str, Any]]:
    about = {"moment": moment, "step": examined.step}
    rest = {"remarks": "; ".join(examined.remarks), "unmeasured": ", ".join(examined.unmeasured)}
    told = [
        {"diagnosis": one.name, "sentence": one.sentence, "layers": ", ".join(one.layers)}
        | {"evidence": json.dumps(dict(one.evidence))}
        for one in examined.findings
    ]
    if not told:
        unknown = {"diagnosis": NOT_MEASURED, "sentence": examined.unmeasured[_GROWTH]}
        told = [unknown | {"layers": "", "evidence": "{}"}]
    return [about | row | rest for row in told]


def _examined(
    steps: Iterable[int], loss: float | None = None, **frames: pd.DataFrame | None
) -> list[Examination]:
    """What `weights`, `outputs` and `probes` show at each of some steps of `weights`."""
    known, found = _layers(frames["weights"], frames["outputs"]), []
    for step in steps:
        here = {name: _nearest(frame, step) for name, frame in frames.items()}
        if not _is_finite(here["weights"]):  # outputs of a step before say nothing of this one
            here["outputs"] = _at(here["outputs"], step)
        found.append(_examine(_Record(**here, loss=loss, known=known), step))
    return found


def _layers(*frames: pd.DataFrame | None) -> tuple[str, ...]:
    """All layers of all steps, input side first: a step has no row of one without any value."""
    names: dict[str, None] = {}
    for frame in frames:
        if frame is not None and not frame.empty:
            first = ~frame["layer"].duplicated().to_numpy()
            layers = np.asarray(frame["layer"].array[first], dtype=object)
            places = tables.floats(frame["position"])[0][first]
            names |= dict.fromkeys(layers[np.argsort(places, kind="stable")])
    return tuple(names)


def _nearest(frame: pd.DataFrame | None, step: int) -> pd.DataFrame:
    if frame is None or frame.empty:
        return pd.DataFrame()
    steps = frame["step"].to_numpy(dtype=int)
    here = np.flatnonzero(steps == _before(steps, step))
    if here.size and here[-1] - here[0] == here.size - 1:  # as recorded: nothing is copied
        return frame.iloc[here[0] : here[-1] + 1]
    return frame.iloc[here]


def _is_finite(weights: pd.DataFrame) -> bool:
    """Whether the gradient of the weights is, as far as it was measured."""
    if "weight_grad_norm" not in weights:
        return True
    values, known = tables.floats(weights["weight_grad_norm"])
    return bool(np.isfinite(values[known]).all())


def _at(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    return frame[frame["step"].to_numpy(dtype=int) == step] if len(frame) else frame


def _before(steps: NDArray[np.int64], step: int) -> int:
    """The last of some steps that is not after `step`; −1 where there is none."""
    return int(steps[steps <= step].max(initial=-1))


_QUANTITIES = {
    "weight_grad_norm": "the norm of the weights' gradient",
    "output_grad_norm": "the norm of the outputs' gradient",
}


@dataclass(frozen=True)
class _Record:
    """The tables of one step, and the names of all layers, this step's or not."""

    weights: pd.DataFrame
    outputs: pd.DataFrame
    probes: pd.DataFrame
    loss: float | None = None
    known: tuple[str, ...] = ()

    @cached_property
    def _modules(self) -> tuple[Rows, Rows]:
        """The rows of `weights` and of `outputs`."""
        return tables.layer_rows(self.weights), tables.layer_rows(self.outputs)

    @cached_property
    def _asked(self) -> dict[str, Rows]:
        return {}

    def everywhere(self, quantity: str) -> Rows:
        """Rows of the modules of all kinds in which it was measured, in the order of the table."""
        if quantity not in self._asked:  # by several checks
            self._asked[quantity] = self._find(quantity)
        return self._asked[quantity]

    def _find(self, quantity: str) -> Rows:
        weights, outputs = self._modules
        if quantity in self.outputs:
            return tables.with_values(outputs, self.outputs[quantity])
        if quantity in self.weights:
            return tables.with_values(weights, self.weights[quantity])
        return weights[:0]

    def layers(self, quantity: str) -> Rows:
        """Rows of convolutions and linear layers in which it was measured, input side first.

        Of other modules with weights as well, where there are fewer than three of those.
        """
        rows = self.everywhere(quantity)
        plain = (rows["kind"] == "conv") | (rows["kind"] == "linear")
        if plain.sum() < ENDS:
            matrix = np.array(["x" in str(shape) for shape in rows["shape"]], dtype=bool)
            plain |= ~np.isin(rows["kind"], ("norm", "embedding", "block")) & matrix
        rows = rows[plain]
        return rows[np.argsort(rows["position"], kind="stable")]

    @cached_property
    def _places(self) -> dict[str, float]:
        rows = np.concatenate(self._modules)
        return _numbers(rows[~np.isnan(rows["position"])], "position")

    def place(self, layer: str) -> float:
        """Of the module of this name, counted from the input; −1 of one that is unknown."""
        return self._places.get(layer, -1.0)

    @cached_property
    def changes(self) -> dict[str, _Change | None]:
        """By quantity, how it changes."""
        return {quantity: _change(self, quantity) for quantity in _QUANTITIES}

    @cached_property
    def unreached(self) -> tuple[str, ...]:
        """Layers that no gradient comes to, not even one of zero, where others have one."""
        norms = self.everywhere("weight_grad_norm")
        if not len(norms):
            return ()
        reached = {*norms["layer"], *self.everywhere("output_grad_norm")["layer"]}
        return tuple(name for name in self.known if name not in reached)

    @cached_property
    def cut_off(self) -> tuple[str, ...]:
        """Those of them that are trainable, and were executed before others with a gradient."""
        rows = self.everywhere("entered")
        places, unreached = rows["value"], _among(rows, self.unreached)
        rows = rows[unreached & (places < places[~unreached].max(initial=-1.0))]
        return tuple(rows["layer"][np.argsort(rows["value"], kind="stable")])

    @cached_property
    def gradients(self) -> Rows:
        """Layers, with the norm of the gradient that comes to what they put out.

        To what their weights are, where that of the outputs was not recorded.
        """
        outputs = self.layers("output_grad_norm")
        return outputs if len(outputs) else self.layers("weight_grad_norm")

    @cached_property
    def passed_by(self) -> tuple[str, ...]:
        """Layers without gradient in branches that the rest goes around: dropped, or unused.

        Layers nearer the input have a gradient, and the output of the next layer that has one
        varies: behind units that are off it would not.
        """
        names, blocked = self.gradients["layer"], self.gradients["value"] == 0
        if blocked.all() or not blocked.any():
            return ()
        spread = _numbers(self.everywhere("output_spread"))
        dull = {name for name, share in spread.items() if share == 0}
        if "output_spread" in self.outputs:
            dull |= {*names} - {*spread}
        first, found, waiting = int(blocked.argmin()), [], []
        for name, stopped in zip(names[first:], blocked[first:], strict=True):
            if stopped:
                waiting.append(name)
            else:
                found += waiting * (name not in dull)
                waiting = []
        return tuple(found)

    @cached_property
    def held_up(self) -> tuple[str, ...]:
        """Layers without gradient because a parameter behind them starts at zero: by design."""
        last = max(map(self.place, self.zero_weights), default=-1.0)
        return tuple(name for name in self.silent if self.place(name) < last)

    @cached_property
    def zero_weights(self) -> tuple[str, ...]:
        """Modules whose weights are all zero."""
        norms = self.everywhere("weight_norm")
        return tuple(norms["layer"][norms["value"] == 0])

    @cached_property
    def starved(self) -> str | None:
        """The first layer, if its inputs are zero: its outputs are, its weights are not.

        Not where the outputs of any layer differ between inputs: other inputs come in elsewhere.
        """
        sizes, norms = (_numbers(self.everywhere(name)) for name in ("output_rms", "weight_norm"))
        first = next(iter(self.layers("output_rms")["layer"]), None)
        if first is None or sizes[first] != 0 or not norms.get(first, 0.0) > 0:
            return None
        return None if (self.everywhere("output_spread")["value"] > 0).any() else first

    @cached_property
    def silent(self) -> tuple[str, ...]:
        """Layers whose whole gradient is exactly zero."""
        rows = self.layers("weight_grad_norm")
        return tuple(rows["layer"][rows["value"] == 0])

    @cached_property
    def underflowing(self) -> dict[str, float]:
        """Layers whose gradient is mostly subnormal, with the share of its elements that are.

        With 0 the silent ones toward the input from there.
        """
        named: dict[str, float] = {}
        for prefix in _GRADIENTS.values():
            zeros = _numbers(self.everywhere(f"{prefix}_zeros"))
            for name, number in _numbers(self.everywhere(f"{prefix}_subnormals")).items():
                share = number / max(1 - zeros.get(name, 0.0), 1e-12)
                if share >= SUBNORMAL_SHARE:
                    named[name] = max(named.get(name, 0.0), min(share, 1.0))
        rows = self.layers("weight_grad_norm")
        tiny = rows["layer"][(rows["value"] > 0) & (rows["value"] < VANISHINGLY_SMALL)]
        last = max(map(self.place, {*tiny, *named}), default=-math.inf)
        lost = [name for name in self.silent if self.place(name) <= last]
        named |= {name: 0.0 for name in lost if name not in named}
        return named if any(named.values()) or self.silent else {}


def _numbers(rows: Rows, column: str = "value") -> dict[str, float]:
    """A column by layer."""
    return dict(zip(rows["layer"], rows[column].tolist(), strict=True))


def _among(rows: Rows, layers: Iterable[str]) -> NDArray[np.bool_]:
    named = set(layers)
    return np.array([name in named for name in rows["layer"]], dtype=bool)


Found = list[Diagnosis] | str
"""What a check found, or why it cannot tell."""


def _examine(record: _Record, step: int) -> Examination:
    # Which layers are trainable and were executed, `diagnose` alone knows.
    is_stored = "entered" not in record.weights
    checks = {name: check for name, check in _CHECKS.items() if not (is_stored and name == CUT_OFF)}
    found: dict[str, Found] = {name: check(record) for name, check in checks.items()}
    findings = [one for part in found.values() if not isinstance(part, str) for one in part]
    findings.sort(key=lambda one: NAMES.index(one.name))
    unmeasured = {name: part for name, part in found.items() if isinstance(part, str)}
    recurrent = tuple(record.everywhere("recurrent")["layer"])
    if recurrent:
        unmeasured[THROUGH_TIME] = f"layers are compared, steps of {listed(recurrent)} are not"
    if not findings and _GROWTH not in unmeasured:
        findings = [_healthy(record, [name for name in found if name not in unmeasured])]
    held = record.held_up
    remarks = [
        f"{_without(held)} yet, as a parameter behind them starts at zero: "
        "look again after an update"
    ] * bool(held)
    apart = [name for name in record.passed_by if name not in held]
    remarks += [
        f"{_without(apart)}, in branches that the rest goes around (dropped or "
        f"unused in this pass): {listed(apart)}"
    ] * bool(apart)
    if is_stored and record.unreached:
        unmeasured[CUT_OFF] = "layers that are frozen or unused have no gradient either"
        remarks.append(
            f"{_without(record.unreached)} (frozen, unused in this step, or cut "
            f"off from the loss by detach, no_grad or the like): {listed(record.unreached)}"
        )
    frames = {name: getattr(record, name) for name in ("weights", "outputs", "probes")}
    return Examination(step, tuple(findings), unmeasured, tuple(remarks), frames)


def _without(layers: Sequence[str]) -> str:
    """`1 layer has no gradient`, `2 layers have no gradient`."""
    return f"{counted(len(layers), 'layer')} {'has' if len(layers) == 1 else 'have'} no gradient"


def _healthy(record: _Record, looked_at: Sequence[str]) -> Diagnosis:
    change = next(filter(None, record.changes.values()))
    absent = ", ".join(name for name in looked_at if name != _GROWTH)
    time = "; through time it was not measured" * bool(len(record.everywhere("recurrent")))
    sentence = (
        f"the gradient's norm {change.words}{_rate_words(change.rate)}{time}; looked for and "
        f"absent: {absent}"
    )
    return Diagnosis(HEALTHY, sentence, evidence=change.evidence)


# --- not finite -----------------------------------------------------------------------------------


def _non_finite(record: _Record) -> Found:
    norms = ("output_rms", "output_grad_norm", "weight_grad_norm")
    values = {name: record.everywhere(name) for name in norms}
    if not any(map(len, values.values())):
        return "not recorded"
    bad = {name: rows["layer"][~np.isfinite(rows["value"])] for name, rows in values.items()}
    names = dict.fromkeys(name for part in bad.values() for name in part)
    lost = record.loss is not None and not math.isfinite(record.loss)
    if not names and not lost:
        return []
    words = {"output_rms": "outputs", "output_grad_norm": "gradients of outputs",
             "weight_grad_norm": "gradients of weights"}  # fmt: skip
    told = [
        f"{words[name]} in {counted(len(part), 'module')}"
        for name, part in bad.items()
        if len(part)
    ]
    if lost:
        own = "" if len(bad["output_rms"]) else " (all outputs of modules are finite)"
        told.insert(0, f"the loss{own}")
    layers = sorted(names, key=record.place)
    evidence = {f"{name}_non_finite": float(len(part)) for name, part in bad.items()}
    return [Diagnosis(NON_FINITE, f"NaN or Inf: {', '.join(told)}", tuple(layers), evidence)]


# --- cut off --------------------------------------------------------------------------------------


def _cut_off(record: _Record) -> Found:
    layers = record.cut_off
    if not layers:
        return []
    sentence = (
        f"no gradient reaches {counted(len(layers), 'layer')}, trainable and executed before "
        "others that have one: it is cut off on its way, or the loss does not use what they put out"
    )
    return [Diagnosis(CUT_OFF, sentence, layers, {"layers": float(len(layers))})]


# --- vanishing and exploding ----------------------------------------------------------------------

_GROWTH = "vanishing and exploding"
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class _Change:
    """How a gradient norm at the input's end compares with that at the output's.

    `layers` are those compared, `depth` the number of all; `bound`: zeros count as the smallest
    norm.
    """

    ratio: float
    depth: int
    first: str
    last: str
    layers: tuple[str, ...]
    values: NDArray[np.float64]
    rate: tables.Rate
    bound: bool

    @property
    def evidence(self) -> dict[str, float]:
        rate = self.rate
        numbers = {"first_over_last": self.ratio, "layers": float(len(self.layers))}
        if rate.factor is not None:
            numbers |= {"rate": rate.factor, "rate_low": rate.low, "rate_high": rate.high}
        return numbers

    @property
    def words(self) -> str:
        """`at A is 2 times that at B`; of medians, it says so."""
        number = f"{'at most ' * self.bound}{tables.short(self.ratio)}"
        if _at_end(self.values) == 1:
            return f"at {self.first} is {number} times that at {self.last}"
        return (
            f"at {ENDS} layers from {self.first} on is in the median {number} times that at {ENDS} "
            f"up to {self.last}"
        )

    @property
    def matters(self) -> bool:
        """Beyond CHANGE, or beyond STEADY_CHANGE at a rate that is not 1."""
        size = abs(math.log(self.ratio))
        if size >= math.log(CHANGE):
            return True
        rate = self.rate
        if rate.factor is None or rate.trend not in (tables.GROWS, tables.SHRINKS):
            return False
        explained = math.log(self.ratio) / (math.log(rate.factor) * (self.depth - 1))
        return size >= math.log(STEADY_CHANGE) and explained >= EXPLAINED


def _growth(record: _Record) -> Found:
    """The weights' gradient first: it is what trains. Of a network that is homogeneous in its
    weights it is the same in all layers whatever happens between, so that the outputs' counts,
    too."""
    known = False
    for quantity, words in _QUANTITIES.items():
        change = record.changes[quantity]
        known |= change is not None
        if change is not None and change.matters:
            return [_grown(record, change, words)]
    if known:
        return []
    recorded = any(len(record.everywhere(quantity)) for quantity in _QUANTITIES)
    return TOO_FEW if recorded else NO_GRADIENT


def _grown(record: _Record, change: _Change, words: str) -> Diagnosis:
    name = EXPLODING if change.ratio > 1 else VANISHING
    typical = median(change.values[-_at_end(change.values) :].tolist())
    far = np.abs(np.log(change.values / typical)) > math.log(STEADY_CHANGE)
    far &= (change.values > typical) == (name == EXPLODING)
    layers = tuple(np.array(change.layers, dtype=object)[far])
    sentence = f"{words} {change.words}{_rate_words(change.rate)}"
    forward, numbers = _forward(record), change.evidence
    if forward is not None:
        numbers["output_rms_last_over_first"] = forward
        way = "grow" if forward > 1 else "shrink"
        if abs(math.log(forward)) >= math.log(STEADY_CHANGE):
            sentence += f"; forward, the outputs {way} to {tables.short(forward)} of the first"
    return Diagnosis(name, sentence, layers, numbers)


def _rate_words(rate: tables.Rate) -> str:
    if rate.factor is None:
        return f" ({rate.reason})"
    spread = f", 95 % {rate.low:.3g} to {rate.high:.3g}" if rate.low == rate.low else ""
    return f", {rate.factor:.3g}× a layer toward the input ({rate.layers} layers{spread})"


def _forward(record: _Record) -> float | None:
    values = record.layers("output_rms")["value"]
    values = values[np.isfinite(values) & (values > 0)]
    return _ratio(values[::-1]) if values.size > 1 else None


def _change(record: _Record, quantity: str) -> _Change | None:
    """The largest change toward the input among like layers that span half the network.

    Like are layers whose names differ in numbers alone; where none such span it, all layers are
    taken together. Zeros count as the smallest norm there is; what an initial zero holds up, or the
    rest goes around, is left out. None where there are fewer than two layers.
    """
    rows = record.layers(quantity)
    held = {*record.held_up, *record.passed_by}
    rows = rows[np.isfinite(rows["value"]) & ~_among(rows, held)]
    if held:
        rows = rows[rows["value"] > 0]  # outputs before an initial zero
    if len(rows) < 2 or not (rows["value"] > 0).any():
        return None
    rate = tables.rate_of(rows)
    found = [_ends(part, rate, rows) for part in _alike(rows)]
    return max(found, key=lambda change: abs(math.log(change.ratio)))


def _alike(rows: Rows) -> list[Rows]:
    roles: dict[tuple[str, str], list[int]] = {}
    for index, (name, kind) in enumerate(zip(rows["layer"], rows["kind"], strict=True)):
        if kind == kind:  # not unknown
            roles.setdefault((_NUMBER.sub("#", name), kind), []).append(index)
    parts = [rows[role] for role in roles.values() if len(role) >= ENDS]
    whole = np.ptp(rows["position"])
    return [part for part in parts if np.ptp(part["position"]) >= whole / 2] or [rows]


def _ends(part: Rows, rate: tables.Rate, rows: Rows) -> _Change:
    smallest = rows["value"][rows["value"] > 0].min()
    bound = bool((part["value"] == 0).any())
    values, layers = np.maximum(part["value"], smallest), tuple(part["layer"])
    return _Change(_ratio(values), len(rows), layers[0], layers[-1], layers, values, rate, bound)


def _at_end(values: NDArray[np.float64]) -> int:
    """How many values are an end of the network: one where there are few."""
    return ENDS if len(values) >= 2 * ENDS else 1


def _ratio(values: NDArray[np.float64]) -> float:
    """First over last, by their medians."""
    count = _at_end(values)
    first, last = median(values[:count].tolist()), median(values[-count:].tolist())
    return min(max(first / last, 1e-300), 1e300)


# --- the number format ----------------------------------------------------------------------------

_GRADIENTS = {"weights": "grad", "outputs": "output_grad"}


def _underflow(record: _Record) -> Found:
    silent, known = record.silent, record.everywhere("weight_grad_norm")["value"]
    # No layer is off: the last one's bias would have a gradient.
    if silent and (known == 0).all() and record.starved is None:
        sentence = (
            f"the gradient is exactly zero in all {len(silent)} layers, the last included: it is "
            "below the smallest number of its format, or the loss is flat here"
        )
        return [Diagnosis(UNDERFLOW, sentence, silent, {"zero_layers": float(len(silent))})]
    named = record.underflowing
    if not named and not any(
        f"{prefix}_subnormals" in getattr(record, table) for table, prefix in _GRADIENTS.items()
    ):
        return "grad_subnormals not recorded"
    if not named:
        return []
    worst = max(named, key=lambda name: named[name])
    lost = [name for name in record.silent if name in named]
    sentence = (
        "the gradient reaches the lower end of its number format in "
        + counted(len(named), "module")
        + (f", and is exactly zero in {len(lost)} of them" if lost else "")
        + f"; of its non-zero elements at {worst} {named[worst]:.0%} are subnormal"
    )
    evidence = {"subnormal_share": named[worst], "zero_layers": float(len(lost))}
    layers = tuple(sorted(named, key=record.place))
    return [Diagnosis(UNDERFLOW, sentence, layers, evidence)]


# --- units ----------------------------------------------------------------------------------------


def _dead(record: _Record) -> Found:
    """Units of hidden layers through which no gradient comes; the last layer's are the loss's."""
    if (record.everywhere("weight_grad_norm")["value"] == 0).all():
        return "no layer has a gradient"
    if record.starved is not None:
        return "the inputs are zero, so that nothing comes to the units"
    by_design, small = {*record.held_up, *record.passed_by}, record.underflowing
    blocked = record.gradients["layer"][record.gradients["value"] == 0]
    silent = tuple(name for name in blocked if name not in by_design and name not in small)
    rows = record.layers("dead_units")
    unknown = "" if len(rows) else "fewer than 16 values to a unit"
    edge = max(map(record.place, small), default=-1.0)
    rows = rows[(rows["position"] > edge) & ~_among(rows, by_design)][:-1]
    if record.held_up:
        rows = rows[rows["value"] < 1]
    many = rows[_beyond_chance(rows)]
    if len(many):
        worst = many[many["value"].argmax()]
        sentence = (
            "no gradient comes through more than half of the units of "
            f"{counted(len(many), 'layer')}, over the whole batch; "
            f"{worst['value']:.0%} of them at {worst['layer']}"
        )
        numbers = {"dead_units": float(worst["value"])}
        return [Diagnosis(DEAD, sentence, tuple(many["layer"]), numbers)]
    if silent:
        sentence = (
            f"no gradient at all reaches {counted(len(silent), 'layer')}: it is exactly zero there"
        )
        return [Diagnosis(DEAD, sentence, silent, {"dead_units": 1.0})]
    return (unknown or []) if "dead_units" in record.outputs else "dead_units not recorded"


def _beyond_chance(rows: Rows) -> NDArray[np.bool_]:
    """Which layers have more dead units than symmetric weights leave: each by itself, or together.

    Where they have too many together, those are meant that have more than half.
    """
    if not len(rows):
        return np.zeros(0, dtype=bool)
    units = [str(shape).partition("x")[0] for shape in rows["shape"]]
    counts = np.array([float(n) if n.isdecimal() else 1.0 for n in units]).clip(min=1)
    shares = rows["value"]
    tests = len(rows) + 1
    bounds = DEAD_SHARE - float(ndtri(CHANCE / tests)) * np.sqrt(0.25 / np.r_[counts, counts.sum()])
    if (shares * counts).sum() / counts.sum() > bounds[-1]:
        return shares > DEAD_SHARE
    return (shares > bounds[:-1]) | (shares == 1)


def _saturated(record: _Record) -> Found:
    if "saturated" not in record.outputs:
        return "saturated not recorded"
    shares = record.everywhere("saturated")
    if not len(shares):
        return "no tanh or sigmoid follows a layer"
    layers = record.layers("output_rms")["layer"]
    last = record.place(layers[-1]) if len(layers) > 1 else math.inf
    inner = np.array([record.place(name) < last for name in shares["layer"]])
    many = shares[inner & (shares["value"] > SATURATED_SHARE)]
    if not len(many):
        return []
    worst = many[many["value"].argmax()]
    sentence = (
        f"behind {counted(len(many), 'layer')} the activation is flat (less than 5 % of its "
        "largest slope) at more than half of the values; "
        f"at {worst['value']:.0%} behind {worst['layer']}"
    )
    numbers = {"saturated": float(worst["value"])}
    return [Diagnosis(SATURATED, sentence, tuple(many["layer"]), numbers)]


# --- inputs ---------------------------------------------------------------------------------------


def _collapsed(record: _Record) -> Found:
    """From some layer to the end all outputs hardly depend on the input."""
    if record.starved is not None:
        sentence = f"the inputs of {record.starved} are exactly zero: all of them are alike"
        return [Diagnosis(COLLAPSED, sentence, (record.starved,), {"output_rms": 0.0})]
    if "output_spread" not in record.outputs:
        return "output_spread not recorded"
    rows = record.layers("output_spread")
    rows = rows[~_among(rows, record.zero_weights)]
    values = rows["value"]
    if len(rows) < 2 or not np.isfinite(values).all():
        return "fewer than two layers with finite outputs for several inputs"
    below = values < COLLAPSE * (values[0] if values[0] >= COLLAPSE else 1.0)
    count = int(below[::-1].argmin()) if not below.all() else len(below)
    if count < 2:
        return []
    first, last, layers = rows["layer"][0], rows["layer"][-1], tuple(rows["layer"][-count:])
    sentence = (
        f"of the outputs' mean square only {tables.short(values[-1])} differs between inputs at "
        f"{last}, {tables.short(values[0])} at {first}: all inputs look alike from {layers[0]} on"
    )
    evidence = {"output_spread": float(values[-1]), "output_spread_first": float(values[0])}
    return [Diagnosis(COLLAPSED, sentence, layers, evidence)]


def _shattered(record: _Record) -> Found:
    if record.probes.empty:
        return "no probe of the gradient at neighbouring inputs"
    probe = record.probes["probe"].astype(object)
    values = record.probes["value"].to_numpy(dtype=float, na_value=np.nan)
    x = record.probes["x"].to_numpy(dtype=float, na_value=np.nan)
    for name, where, words in (
        ("input_gradient_cosine", x == x, "cosine of the input's gradients at inputs {:.1%} apart"),
        ("gradient_autocorrelation", x == 1, "correlation of gradients at neighbours on a line"),
    ):
        chosen = (probe == name).to_numpy() & where
        if chosen.any():
            value = float(values[chosen].mean())
            if not math.isfinite(value):
                return "the input's gradient is zero, cut off, constant or not finite"
            told = words.format(float(x[chosen][0]))
            sentence = f"{told}: {value:.2f} on average"
            return [Diagnosis(SHATTERED, sentence, (), {name: value})] if value < COSINE else []
    return "no probe of the gradient at neighbouring inputs"


_CHECKS: dict[str, Callable[[_Record], Found]] = {
    NON_FINITE: _non_finite,
    CUT_OFF: _cut_off,
    UNDERFLOW: _underflow,
    _GROWTH: _growth,
    DEAD: _dead,
    SATURATED: _saturated,
    COLLAPSED: _collapsed,
    SHATTERED: _shattered,
}
