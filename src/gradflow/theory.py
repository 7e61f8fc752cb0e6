"""What mean-field theory says of a network at initialisation: closed forms and recursions.

Wide layers with independent Gaussian weights of variance σ_w²/fan_in and biases of variance σ_b²
make every pre-activation z_l Gaussian; its *length* q_l is its mean square over units. g_l is the
sum of squares of the gradient with respect to z_l, and goes backward by g_l = ρ_l·g_{l+1}.

Every quantity is *squared* (lengths, growths, variances, σ_w², σ_b²) but for cosines, means, path
lengths and depths, and names that end in `_norm`. Layers are square unless it says otherwise: with
fan-in initialisation g needs no factor where the width changes, the mean square per unit takes
fan_out/fan_in on the way back.

Activations are those of `gradflow.spec.ACTIVATIONS` and `erf`. `crelu`, twice as many outputs as
inputs, is `relu` in every formula here: moments are means over its outputs, as σ_w² counts all
of a layer's fan_in. (Lengths and growths hold under `looks_linear` as well; cosines there are those
of `linear`.) `negative_slope` is needed for `leaky_relu` and ignored by the others.
Numbers come one at a time, no arrays, unless it says otherwise. An unknown activation, or a number
that cannot be (a negative length or variance, a depth below 1), raises `SpecError`.

Sources: Poole et al. 2016 (arXiv 1606.05340), Schoenholz et al. 2017 (arXiv 1611.01232); others
stand with their formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import erf, expit, ndtr, ndtri

from gradflow.errors import SpecError

Array = NDArray[np.float64]
_Function = Callable[[Array], Array]


def _check(
    low: float = 0.0,
    high: float = math.inf,
    /,
    *,
    whole: bool = False,
    above: bool = False,
    **values: object,
) -> None:
    """Raises SpecError unless each of the values is one finite number from (or above) low to high.

    Args:
        values: by the name that the caller knows them by.
    """
    for key, value in values.items():
        if isinstance(value, Integral if whole else Real):
            number = float(value)
            if low <= number <= high and number < math.inf and not (above and number == low):
                continue
        shown = f"{value:g}" if isinstance(value, Real) else " ".join(f"{value}".split())
        kind, start = "a whole number" if whole else "a number", "above" if above else "from"
        end = "" if high == math.inf else f" to {high:g}"
        raise SpecError(f"{key}={shown}: allowed is {kind} {start} {low:g}{end}")


# --- Gaussian quadrature --------------------------------------------------------------------------

_REACH = 10.0
"""z beyond ±10 has a chance of 1e-23."""
_NODES, _RATIO = 16, 3.0


@lru_cache(maxsize=64)
def _graded(panels: int) -> tuple[Array, Array]:
    """Gauss–Legendre nodes and weights on [0, 1], in panels that shrink threefold towards 0."""
    edges = np.concatenate([[0.0], _RATIO ** -np.arange(panels, -1.0, -1.0)])
    half, centre = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return (centre + half * nodes).ravel(), (half * weights).ravel()


def _grid(q: float) -> tuple[Array, Array]:
    """The graded grid fine enough for φ(√q z), whose features near 0 are 1/√q wide."""
    _check(q=q)
    return _graded(math.ceil(math.log(max(20.0, 4 * math.sqrt(q)), _RATIO)))


def _density(z: Array) -> Array:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def expectation(function: _Function, q: float) -> float:
    """E[f(√q z)], z ~ N(0, 1), for an f that is smooth but at 0, where it may have a kink or jump.

    Composite quadrature over [−10, 10]: exact to about 1e-14 for all q. (Gauss–Hermite is not: the
    nodes miss a feature of width 1/√q.)
    """
    nodes, weights = _grid(q)
    z = _REACH * nodes
    u = math.sqrt(q) * z
    return float((_REACH * weights * _density(z)) @ (function(u) + function(-u)))


def pair_expectation(function: _Function, q: float, c: float) -> float:
    """E[f(u) f(v)] for u, v ~ N(0, q) with correlation c, for f as in `expectation`.

    With x, y ~ N(0, 1), u and v are √q(αx ± βy), α² = (1 + c)/2, β² = (1 − c)/2. Of x and y the one
    with the greater factor is integrated first, in panels that shrink towards the two places where
    u or v is 0: so it holds to about 1e-13 up to c = ±1.
    """
    _check(-1.0, 1.0, c=c)
    nodes, weights = _grid(q)
    major, minor = math.sqrt((1 + abs(c)) / 2), math.sqrt((1 - abs(c)) / 2)
    outer, outer_weights = _REACH * nodes, _REACH * weights * _density(_REACH * nodes)
    if c >= 0:  # exchanging u and v changes the sign of y, and nothing else
        outer_weights = 2 * outer_weights
    else:
        outer = np.concatenate([-outer, outer])
        outer_weights = np.concatenate([outer_weights, outer_weights])
    kink = (minor / major * np.abs(outer))[:, None]
    pieces = [(kink, _REACH), (kink, 0.0), (-kink, 0.0), (-kink, -_REACH)]
    inner = np.concatenate([start + (end - start) * nodes for start, end in pieces], axis=1)
    inner_weights = np.concatenate([abs(end - start) * weights for start, end in pieces], axis=1)
    x, y = math.sqrt(q) * major * inner, math.sqrt(q) * minor * outer[:, None]
    u, v = x + y, math.copysign(1.0, c) * (x - y)
    return float(
        outer_weights @ (inner_weights * _density(inner) * function(u) * function(v)).sum(1)
    )


# --- activations and their moments ----------------------------------------------------------------


@dataclass(frozen=True)
class _Activation:
    """φ, φ' and their moments at z ~ N(0, q); pairs are at correlation c."""

    function: _Function
    derivative: _Function
    mean: Callable[[float], float]
    second: Callable[[float], float]  # E[φ²]
    slope: Callable[[float], float]  # E[φ'²]
    product: Callable[[float, float], float]  # E[φ(u)φ(v)]
    slope_product: Callable[[float, float], float]  # E[φ'(u)φ'(v)]
    rectifier: float | None = None  # the slope below 0 of a piecewise linear φ
    odd: bool = False


def _by_quadrature(function: _Function, derivative: _Function, *, odd: bool = False) -> _Activation:
    return _Activation(
        function,
        derivative,
        mean=lambda q: 0.0 if odd else expectation(function, q),
        second=lambda q: expectation(lambda u: function(u) ** 2, q),
        slope=lambda q: expectation(lambda u: derivative(u) ** 2, q),
        product=lambda q, c: pair_expectation(function, q, c),
        slope_product=lambda q, c: pair_expectation(derivative, q, c),
        odd=odd,
    )


def _rectifier(a: float) -> _Activation:
    """x above 0, a·x below: ReLU at a = 0, linear at a = 1. Cho & Saul 2009 for a = 0."""
    half = (1 + a**2) / 2
    return _Activation(
        lambda u: np.where(u > 0, u, a * u),
        lambda u: np.where(u > 0, 1.0, a),
        mean=lambda q: (1 - a) * math.sqrt(q / (2 * math.pi)),
        second=lambda q: half * q,
        slope=lambda q: half,
        product=lambda q, c: half * q * float(relu_cosine_map(c, a)),
        slope_product=lambda q, c: half * gradient_correlation([c], a),
        rectifier=a,
        odd=a == 1,
    )


def _erf() -> _Activation:
    """erf(x). Williams 1997, "Computing with infinite networks"."""
    return replace(
        _by_quadrature(erf, lambda u: 2 / math.sqrt(math.pi) * np.exp(-(u**2)), odd=True),
        second=lambda q: 2 / math.pi * math.asin(2 * q / (1 + 2 * q)),
        slope=lambda q: 4 / math.pi / math.sqrt(1 + 4 * q),
        product=lambda q, c: 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q)),
        slope_product=lambda q, c: (
            4 / math.pi / math.sqrt((1 + 2 * q * (1 - c)) * (1 + 2 * q * (1 + c)))
        ),
    )


def _gelu() -> _Activation:
    """x·Φ(x), by Gaussian integration by parts; Tsuchida et al. 2020 (arXiv 2002.08517)."""

    def product(q: float, c: float) -> float:
        both = 1 / 4 + math.asin(q * c / (1 + q)) / (2 * math.pi)  # E[Φ(u)Φ(v)]
        root = math.sqrt((1 + q - q * c) * (1 + q + q * c))  # 1/(2π·root) is E[Φ'(u)Φ'(v)]
        rest = q**2 * (1 + q + (1 - q) * c**2) / (2 * math.pi * (1 + q) * root)
        return q * c * both + rest

    def slope(q: float) -> float:
        both = 1 / 4 + math.asin(q / (1 + q)) / (2 * math.pi)
        root = math.sqrt(1 + 2 * q)
        return both + q / (math.pi * (1 + q) * root) + q / (2 * math.pi * root**3)

    return replace(
        _by_quadrature(lambda u: u * ndtr(u), lambda u: ndtr(u) + u * _density(u)),
        mean=lambda q: q / math.sqrt(2 * math.pi * (1 + q)),
        second=lambda q: product(q, 1.0),
        slope=slope,
        product=product,
    )


def _sigmoid_slope(u: Array) -> Array:
    return expit(u) * expit(-u)


_RECTIFIERS = {"relu": 0.0, "crelu": 0.0, "linear": 1.0}
_SMOOTH = {
    "tanh": _by_quadrature(np.tanh, lambda u: 1 - np.tanh(u) ** 2, odd=True),
    "sigmoid": replace(_by_quadrature(expit, _sigmoid_slope), mean=lambda q: 0.5),
    "gelu": _gelu(),
    "silu": _by_quadrature(lambda u: u * expit(u), lambda u: expit(u) + u * _sigmoid_slope(u)),
    "erf": _erf(),
}
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "linear", "crelu", "erf")
"""Whose moments are known here."""


def _activation(name: str, negative_slope: float | None) -> _Activation:
    if name == "leaky_relu":
        if negative_slope is None:
            raise SpecError("negative_slope=null: activation=leaky_relu needs a number")
        return _rectifier(negative_slope)
    if name in _RECTIFIERS:
        return _rectifier(_RECTIFIERS[name])
    if name not in _SMOOTH:
        raise SpecError(f"activation={name}: allowed is {', '.join(ACTIVATIONS)}")
    return _SMOOTH[name]


# --- moments, maps of one layer -------------------------------------------------------------------


def mean(activation: str, q: float, negative_slope: float | None = None) -> float:
    """E[φ(√q z)]."""
    _check(q=q)
    return _activation(activation, negative_slope).mean(q)


def second_moment(activation: str, q: float, negative_slope: float | None = None) -> float:
    """E[φ(√q z)²]."""
    _check(q=q)
    return _activation(activation, negative_slope).second(q)


def slope_moment(activation: str, q: float, negative_slope: float | None = None) -> float:
    """E[φ'(√q z)²]."""
    _check(q=q)
    return _activation(activation, negative_slope).slope(q)


def length_map(
    activation: str,
    q: float,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
) -> float:
    """The next layer's length, σ_w² E[φ(√q z)²] + σ_b². Poole et al. 2016."""
    _check(sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    return sigma_w2 * second_moment(activation, q, negative_slope) + sigma_b2


def chi(
    activation: str, q: float, *, sigma_w2: float, negative_slope: float | None = None
) -> float:
    """χ₁ = σ_w² E[φ'(√q z)²], the squared growth of the gradient from z_{l+1} to z_l at q = q_l.

    At a fixed point of the length it is also the slope of the correlation map at 1; elsewhere that
    slope is χ₁·q/q'. Schoenholz et al. 2017.
    """
    _check(sigma_w2=sigma_w2)
    return sigma_w2 * slope_moment(activation, q, negative_slope)


def correlation_map(
    activation: str,
    c: float,
    q: float,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
) -> float:
    """The next layer's correlation of two inputs, of length q and correlation c in this layer.

    (σ_w² E[φ(u)φ(v)] + σ_b²)/q': the uncentred cosine of the two vectors of pre-activations.
    Poole et al. 2016.
    """
    _check(q=q, sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    _check(-1.0, 1.0, c=c)
    phi = _activation(activation, negative_slope)
    product = sigma_w2 * phi.product(q, c) + sigma_b2
    return _cosine(product, sigma_w2 * phi.second(q) + sigma_b2)


def _cosine(product: float, second: float) -> float:
    """product/second, not beyond ±1 by rounding."""
    if second == 0:
        raise SpecError("q=0: vectors of length 0 have no cosine")
    return min(1.0, max(-1.0, product / second))


# --- fixed points and depth scales ----------------------------------------------------------------

_SMALLEST, _LARGEST = 1e-12, 1e12
"""Lengths beyond these count as 0 and infinite."""


def length_fixed_point(
    activation: str,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
    q0: float = 1.0,
) -> float:
    """q*, the length that deep layers tend to from q0; 0 or infinite if it has no other limit.

    The nearest fixed point in the direction in which the length map moves q0: for tanh the only
    stable one; for He-initialised rectifiers, which keep any length, q0 itself.
    """

    def excess(q: float) -> float:
        mapped = length_map(
            activation, q, sigma_w2=sigma_w2, sigma_b2=sigma_b2, negative_slope=negative_slope
        )
        return mapped - q

    _check(q0=q0)
    q0 = max(q0, _SMALLEST)
    grows = excess(q0) > 0
    if abs(excess(q0)) <= 1e-12 * q0:
        return q0
    root = _first_crossing(excess, q0, _LARGEST if grows else _SMALLEST)
    if root is None:
        return math.inf if grows else 0.0
    return root


def _first_crossing(function: Callable[[float], float], start: float, end: float) -> float | None:
    """The root nearest to `start` on the way to `end`, both positive; None if there is none."""
    before, sign = start, function(start) > 0
    for after in map(float, np.geomspace(start, end, 241)[1:]):
        if (function(after) > 0) != sign:
            return float(brentq(function, before, after, xtol=1e-18, rtol=1e-14))
        before = after
    return None


class CriticalPoint(NamedTuple):
    """Where gradients neither vanish nor explode: σ_w², and the length fixed point q there."""

    sigma_w2: float
    q: float


def critical_sigma_w2(
    activation: str, sigma_b2: float = 0.0, negative_slope: float | None = None
) -> CriticalPoint:
    """The σ_w² at which χ₁(q*) = 1, for biases of variance σ_b², and q*.

    q is NaN for rectifiers, where any length is a fixed point. For GELU and SiLU q* repels lengths:
    only a network that starts there stays.

    Raises:
        SpecError: there is none: rectifiers are critical without biases alone.
    """
    _check(sigma_b2=sigma_b2)
    phi = _activation(activation, negative_slope)
    if phi.rectifier is not None and sigma_b2 == 0:
        return CriticalPoint(1 / phi.slope(1.0), math.nan)
    if sigma_b2 == 0 and phi.second(0.0) == 0:
        return CriticalPoint(1 / phi.slope(0.0), 0.0)

    def excess(q: float) -> float:
        return q - phi.second(q) / phi.slope(q) - sigma_b2

    q = None if phi.rectifier is not None else _first_crossing(excess, _SMALLEST, _LARGEST)
    if q is None:
        raise SpecError(f"sigma_b2={sigma_b2:g}: no sigma_w2 is critical for {activation}")
    return CriticalPoint(1 / phi.slope(q), q)


def _bounded_fixed_point(
    activation: str,
    sigma_w2: float,
    sigma_b2: float,
    negative_slope: float | None,
    q0: float,
) -> float:
    q = length_fixed_point(
        activation, sigma_w2=sigma_w2, sigma_b2=sigma_b2, negative_slope=negative_slope, q0=q0
    )
    if math.isinf(q):
        raise SpecError(f"sigma_w2={sigma_w2:g}: lengths grow without end, no fixed point")
    return q


def correlation_fixed_point(
    activation: str,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
    q0: float = 1.0,
) -> float:
    """c*, the correlation that deep layers give any two inputs of length q*.

    The map is convex with a fixed point at 1: that is the stable one where χ₁(q*) ≤ 1, else there
    is one other, in [0, 1).

    Raises:
        SpecError: the length has no fixed point.
    """
    q = _bounded_fixed_point(activation, sigma_w2, sigma_b2, negative_slope, q0)
    if chi(activation, q, sigma_w2=sigma_w2, negative_slope=negative_slope) <= 1 + 1e-12:
        return 1.0

    def excess(c: float) -> float:
        mapped = correlation_map(
            activation, c, q, sigma_w2=sigma_w2, sigma_b2=sigma_b2, negative_slope=negative_slope
        )
        return mapped - c

    if excess(0.0) <= 1e-14:
        return 0.0
    below = next(1 - e for e in np.geomspace(0.1, 1e-15, 60) if excess(1 - e) < 0)
    return float(brentq(excess, 0.0, below, xtol=1e-15))


def depth_scale(
    activation: str,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
    q0: float = 1.0,
) -> float:
    """ξ_c, in layers: correlations near their fixed point c* close in on it as exp(−l/ξ_c).

    −1/ln(σ_w² E[φ'(u)φ'(v)]) at (q*, c*), so −1/ln χ₁ in the ordered phase, where the squared
    gradient falls as exp(−l/ξ_c) too; infinite at criticality. Schoenholz et al. 2017.

    Raises:
        SpecError: the length has no fixed point.
    """
    options = {"sigma_w2": sigma_w2, "sigma_b2": sigma_b2, "q0": q0}
    q = _bounded_fixed_point(activation, sigma_w2, sigma_b2, negative_slope, q0)
    c = correlation_fixed_point(activation, negative_slope=negative_slope, **options)
    phi = _activation(activation, negative_slope)
    return _scale(sigma_w2 * (phi.slope(q) if c == 1 else phi.slope_product(q, c)))


def length_depth_scale(
    activation: str,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    negative_slope: float | None = None,
    q0: float = 1.0,
) -> float:
    """ξ_q, in layers: lengths near q* close in on it as exp(−l/ξ_q). Schoenholz et al. 2017.

    −1/ln of the length map's slope there, σ_w² E[z φ(√q z) φ'(√q z)]/√q.

    Raises:
        SpecError: the length has no fixed point.
    """
    q = max(_bounded_fixed_point(activation, sigma_w2, sigma_b2, negative_slope, q0), _SMALLEST)
    phi = _activation(activation, negative_slope)
    moment = expectation(lambda u: u * phi.function(u) * phi.derivative(u), q)
    return _scale(sigma_w2 * moment / q)


def _scale(factor: float) -> float:
    if factor <= 0:
        return 0.0
    return math.inf if abs(factor - 1) < 1e-12 else -1 / math.log(factor)


# --- initialisations ------------------------------------------------------------------------------


class Sigmas(NamedTuple):
    """fan_in·Var W, and Var b."""

    sigma_w2: float
    sigma_b2: float


def sigmas(
    init: str,
    activation: str,
    *,
    negative_slope: float | None = None,
    sigma_w: float | None = None,
    sigma_b: float | None = None,
    width: int | None = None,
) -> Sigmas:
    """σ_w² and σ_b² of gradflow's initialisations in square layers that read an activation.

    σ_w² is 2/(1 + a²) for `he` (a: slope of leaky_relu, else 0), and for `orthogonal` and
    `delta_orthogonal` before rectifiers, 1 before others; 1 for `xavier` and `lecun`; 1/3 for
    `pytorch`, with σ_b² = 1/(3·fan_in). Layers that are normalised have no bias. Convolutions as
    linear layers; the first layer of a network is square only if it has as many inputs as outputs.

    Args:
        sigma_w, sigma_b: not squared, for `gaussian` alone.
        width: outputs of a layer, for `pytorch` alone.

    Raises:
        SpecError: an unknown init, or one without the value that it needs.
    """
    a = negative_slope if activation == "leaky_relu" else 0.0
    if a is None:
        raise SpecError("negative_slope=null: activation=leaky_relu needs a number")
    if init == "gaussian":
        if sigma_w is None or sigma_b is None:
            raise SpecError("init=gaussian: set sigma_w and sigma_b")
        _check(sigma_w=sigma_w, sigma_b=sigma_b)
        return Sigmas(sigma_w**2, sigma_b**2)
    if init == "pytorch":
        if width is None:
            raise SpecError("width=null: init=pytorch needs a whole number from 1")
        _check(1, whole=True, width=width)
        return Sigmas(1 / 3, 1 / (3 * width * (2 if activation == "crelu" else 1)))
    rectified = 2 / (1 + a**2)
    orthogonal = rectified if activation in ("relu", "leaky_relu", "crelu") else 1.0
    known = {
        "he": rectified,
        "xavier": 4 / 3 if activation == "crelu" else 1.0,  # 2·fan_in/(fan_in + fan_out)
        "lecun": 1.0,
        "orthogonal": orthogonal,
        "delta_orthogonal": orthogonal,
        "looks_linear": orthogonal,
    }
    if init not in known:
        raise SpecError(f"init={init}: allowed is {', '.join([*known, 'pytorch', 'gaussian'])}")
    return Sigmas(known[init], 0.0)


# --- normalisation --------------------------------------------------------------------------------


class _Normalised(NamedTuple):
    """Moments of φ after a normalisation, over a large width."""

    second: float
    variance: float  # what the next normalisation divides by, up to σ_w²
    slope: float


def _normalised(
    norm: str, activation: str, negative_slope: float | None, batch: int | None = None
) -> _Normalised:
    phi = _activation(activation, negative_slope)
    second, slope = phi.second(1.0), phi.slope(1.0)
    if norm != "batch":
        return _Normalised(second, second, slope)
    if batch is None:
        return _Normalised(second, second - phi.mean(1.0) ** 2, slope)
    if batch < 4:
        raise SpecError(f"batch={batch}: allowed is null or a whole number from 4")
    if phi.rectifier is None:
        raise SpecError(f"batch={batch}: allowed is null with activation={activation}")
    c = -1 / (batch - 1)
    variance = second - phi.product(1.0, c)
    spread = variance * (batch - 1) / batch
    trace = ((batch - 1) ** 2 * slope + (batch - 1) * phi.slope_product(1.0, c)) / batch - spread
    return _Normalised(second, variance, trace * batch / ((batch - 1) * (batch - 3)))


def batch_norm_growth(
    activation: str, negative_slope: float | None = None, *, batch: int | None = None
) -> float:
    """ρ of a plain network with batch normalisation: E[φ'(z)²]/Var[φ(z)], whatever σ_w².

    For a large batch of decorrelated samples; ReLU: π/(π − 1). Yang et al. 2019 (arXiv 1902.08129).

    With `batch`, its value for B samples and infinite width, for piecewise linear φ. A normalised
    neuron's outputs are √B·u, u uniform on the unit sphere of vectors of sum zero. With
    D = diag φ'(u), G = I − 11ᵀ/B and σ_w²s² the unbiased batch variance of a neuron,
    ρ = E tr[(I − uuᵀ)GDGDG(I − uuᵀ)]/(s²(B − 1)) · B/(B − 3): gradients are spread as G over the
    samples, and 1/‖Gz‖² has the mean 1/(σ_w²s²(B − 3)).

    Raises:
        SpecError: a batch below 4, or given for another φ.
    """
    moments = _normalised("batch", activation, negative_slope, batch)
    return moments.slope / moments.variance


def layer_norm_growth(activation: str, negative_slope: float | None = None) -> float:
    """ρ of a plain network with layer normalisation: E[φ'(z)²]/E[φ(z)²], whatever σ_w².

    1 for ReLU. Group normalisation with many units a group is the same.
    """
    moments = _normalised("layer", activation, negative_slope)
    return moments.slope / moments.second


# --- profiles, layer by layer ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Profile:
    """Lengths and gradients along a network, from the input on; all squared.

    Attributes:
        length: (n,) mean square over units and samples: of the pre-activations z_1 … z_n of a plain
            network, of the stream x_0 … x_n−1 of a residual one.
        growth: (n − 1,) ρ, the gradient's sum of squares at each place over that at the next.
        variance: (n,) the unbiased batch variance of the same, where the network has batch
            normalisation; it is what the normalisation divides by.
    """

    length: Array
    growth: Array
    variance: Array | None = None

    @property
    def log_gradient(self) -> Array:
        """(n,) ln g, the natural logarithm; 0 at the last place."""
        with np.errstate(divide="ignore"):
            logs = np.log(self.growth)
        return np.append(np.cumsum(logs[::-1])[::-1], 0.0)

    @property
    def gradient(self) -> Array:
        """(n,) g, the gradient's sum of squares over that at the last place."""
        return np.exp(self.log_gradient)

    def mean_growth(self, trim: int = 0) -> float:
        """ρ of the whole: exp(−slope) of ln g by least squares, `trim` places off at each end."""
        logs = self.log_gradient[trim : len(self.length) - trim]
        if trim < 0 or len(logs) < 2:
            raise SpecError(f"trim={trim}: allowed is what leaves 2 of {len(self.length)} places")
        return float(np.exp(-np.polyfit(np.arange(len(logs)), logs, 1)[0]))

    def weight_gradient(self, *, sigma_w2: float, sigma_b2: float = 0.0) -> Array:
        """(n,) E‖∂L/∂W_l‖² over that of the last layer, in a plain network.

        g_l·‖h_{l−1}‖² for each sample, h_{l−1} what W_l multiplies; for samples whose gradients do
        not correlate.
        """
        _check(above=True, sigma_w2=sigma_w2)
        values = self.gradient * (self.length - sigma_b2) / sigma_w2
        return values / values[-1]


def plain_profile(
    depth: int,
    activation: str,
    *,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    q0: float = 1.0,
    norm: str = "none",
    negative_slope: float | None = None,
    batch: int | None = None,
) -> Profile:
    """The pre-activations z_1 … z_depth of a plain network, z_{l+1} = W φ(norm(z_l)) + b.

    Without normalisation g_l = χ₁(q_l)·g_{l+1}, at the layer's own length. Normalised samples are
    taken as decorrelated: orthogonal inputs, of mean zero.

    Args:
        q0: mean square of the input's features: z_1 has length σ_w² q0 + σ_b². Where the first
            layer has another σ_w², give the q0 that leads to z_1's length.
        norm: `none`, `batch`, `layer`, `group` (of many units).
        batch: samples of a batch; see `batch_norm_growth`. None is a large one.

    Raises:
        SpecError: an unknown activation or norm, or a batch that the theory does not cover.
    """
    if norm not in ("none", "batch", "layer", "group"):
        raise SpecError(f"norm={norm}: allowed is none, batch, layer, group")
    _check(1, whole=True, depth=depth)
    _check(sigma_b2=sigma_b2)
    _check(above=norm != "none", sigma_w2=sigma_w2, q0=q0)  # a normalisation divides by them
    first = sigma_w2 * q0 + sigma_b2
    if norm == "none":
        phi = _activation(activation, negative_slope)
        lengths = [first]
        while len(lengths) < depth:
            lengths.append(sigma_w2 * phi.second(lengths[-1]) + sigma_b2)
        growth = [sigma_w2 * phi.slope(q) for q in lengths[:-1]]
        return Profile(np.array(lengths), np.array(growth))
    moments = _normalised(norm, activation, negative_slope, batch)
    length = np.full(depth, sigma_w2 * moments.second + sigma_b2)
    length[0] = first
    if norm != "batch":
        return Profile(length, sigma_w2 * moments.slope / length[:-1])
    variance = np.full(depth, sigma_w2 * moments.variance)
    variance[0] = sigma_w2 * q0
    return Profile(length, sigma_w2 * moments.slope / variance[:-1], variance)


class _Passed(NamedTuple):
    """What leaves a branch, and the squared growth of the gradient through it."""

    second: float
    variance: float
    growth: float


@dataclass(frozen=True)
class _Branch:
    """A composition of maps, such as W f W for x -> W₂φ(W₁x): see `residual_profile`."""

    word: str
    phi: _Activation
    sigma_w2: tuple[float, ...]
    sigma_b2: float

    @classmethod
    def of(
        cls, word: str, phi: _Activation, sigma_w2: float | Sequence[float], sigma_b2: float
    ) -> _Branch:
        maps = word.count("W")
        if not word or set(word) - set("WfBL"):
            raise SpecError(f"branch={word}: allowed is a word of W, f, B and L, such as WfB")
        if word[0] == "f" and not phi.odd:
            raise SpecError(f"branch={word}: f comes last only if it is odd: tanh, erf, linear")
        if "B" in word and re.search("f[^B]", word):
            raise SpecError(f"branch={word}: with B, f stands left of a B or at the right end")
        each = (sigma_w2,) * maps if isinstance(sigma_w2, int | float) else tuple(sigma_w2)
        if len(each) != maps:
            raise SpecError(f"sigma_w2={list(each)}: branch={word} has {maps} W")
        _check(sigma_b2=sigma_b2)
        for scale in each:
            _check(sigma_w2=scale)
        return cls(word, phi, each, sigma_b2)

    def forward(self, second: float, variance: float) -> _Passed:
        """What leaves it for an input with this mean square and batch variance."""
        growth, sigmas_w2 = 1.0, iter(self.sigma_w2)
        for letter in reversed(self.word):
            if letter == "W":
                scale = next(sigmas_w2)
                second, variance = scale * second + self.sigma_b2, scale * variance
                growth *= scale
            elif letter == "f":
                growth *= self.phi.slope(second)
                average = self.phi.mean(second)
                second = self.phi.second(second)
                variance = second - average**2
            else:
                divisor = variance if letter == "B" else second
                if divisor == 0:
                    raise SpecError(f"branch={self.word}: {letter} is given a variance of 0")
                growth /= divisor
                second, variance = 1.0, variance / divisor
        return _Passed(second, variance, growth)

    def product(self, second: float, product: float) -> tuple[float, float]:
        """What becomes of the mean square, and of the mean product of two inputs of that length."""
        sigmas_w2 = iter(self.sigma_w2)
        for letter in reversed(self.word):
            if letter == "W":
                scale = next(sigmas_w2)
                second, product = scale * second + self.sigma_b2, scale * product + self.sigma_b2
            elif letter == "f":
                product = self.phi.product(second, _cosine(product, second))
                second = self.phi.second(second)
            elif letter == "L":
                second, product = 1.0, _cosine(product, second)
            else:
                raise SpecError(f"branch={self.word}: cosines have no theory here with B")
        return second, product


def residual_profile(
    blocks: int,
    activation: str,
    *,
    branch: str = "Wf",
    sigma_w2: float | Sequence[float],
    sigma_b2: float = 0.0,
    q0: float = 1.0,
    branch_scale: float = 1.0,
    skip_forward: float = 1.0,
    skip_backward: float = 1.0,
    negative_slope: float | None = None,
) -> Profile:
    """The stream x_0 … x_blocks of a network of x_{l+1} = skip·x_l + β·F(x_l).

    q_{l+1} = a²q_l + β²·E F², ρ_l = b² + β²·(growth through F), as random weights decorrelate skip
    and branch. `branch` spells F as one writes it, the first map on the right: W a linear map, f
    the activation, B and L batch and layer normalisation, of decorrelated samples, large batches:

        Wf, WfWf      pre-activation without normalisation, one and two linear maps
        WfB, WfBWfB   the same with batch normalisation: for ReLU and He initialisation
                      ρ_l = 1 + c/(l + l₀), l from 0, c = (π/(π − 1))^k, l₀ = q0·π/(π − 1)
        WfL           with layer normalisation
        fW            x + φ(Wx), φ odd; Yang & Schoenholz 2017 (arXiv 1712.08969)
        WfW           x + W₂φ(W₁x); Taki 2017 (arXiv 1709.02956)
        BWf           batch normalisation last; De & Smith 2020 (arXiv 2002.10444)

    gradflow's `mlp` of order `pre` has these blocks from the output of `layers.0` on; order `post`,
    with an activation after the sum, has no closed recursion here. Theory of fW usually follows
    q = σ_w²·length, of the pre-activations.

    Args:
        sigma_w2: of every W, or one value for each, the first applied first.
        q0: mean square of x_0, and its batch variance.
        branch_scale: β, not squared; skip_forward, skip_backward: a and b, not squared.

    Raises:
        SpecError: a branch that is none of these, an unknown activation.
    """
    phi = _activation(activation, negative_slope)
    _check(1, whole=True, blocks=blocks)
    _check(q0=q0)
    through = _Branch.of(branch, phi, sigma_w2, sigma_b2)
    second = variance = q0
    lengths, variances, growths = [second], [variance], []
    for _ in range(blocks):
        passed = through.forward(second, variance)
        second = skip_forward**2 * second + branch_scale**2 * passed.second
        variance = skip_forward**2 * variance + branch_scale**2 * passed.variance
        growths.append(skip_backward**2 + branch_scale**2 * passed.growth)
        lengths.append(second)
        variances.append(variance)
    return Profile(
        np.array(lengths), np.array(growths), np.array(variances) if "B" in branch else None
    )


def cosine_profile(
    blocks: int,
    activation: str,
    *,
    branch: str = "Wf",
    sigma_w2: float | Sequence[float],
    sigma_b2: float = 0.0,
    q0: float = 1.0,
    cosine: float = 0.0,
    branch_scale: float = 1.0,
    skip_forward: float = 0.0,
    negative_slope: float | None = None,
) -> Array:
    """(blocks + 1,) cosines of two inputs of equal length along a network, from `cosine` on.

    Plain unless `skip_forward` is set: with the branch `Wf` the cosines of pre-activations, or of
    activations' inputs. Arguments as in `residual_profile`; B is not covered.

    Raises:
        SpecError: a branch that is not covered, an unknown activation.
    """
    phi = _activation(activation, negative_slope)
    _check(1, whole=True, blocks=blocks)
    _check(q0=q0)
    _check(-1.0, 1.0, cosine=cosine)
    through = _Branch.of(branch, phi, sigma_w2, sigma_b2)
    second, product = q0, q0 * cosine
    cosines = [cosine]
    for _ in range(blocks):
        branch_second, branch_product = through.product(second, product)
        second = skip_forward**2 * second + branch_scale**2 * branch_second
        product = skip_forward**2 * product + branch_scale**2 * branch_product
        cosines.append(_cosine(product, second))
    return np.array(cosines)


# --- skips ----------------------------------------------------------------------------------------


def power_law_exponent(branch_layers: int, activation: str = "relu") -> float:
    """p in g_l ∝ v_l^(−p), v_l the batch variance of the stream, with pre-activation batch norm.

    The ρ of the plain network to the power of the linear maps in a branch: 1.467, 2.152 for ReLU.
    """
    _check(1, whole=True, branch_layers=branch_layers)
    return batch_norm_growth(activation) ** branch_layers


def ratio_to_one(depth: int, branch_layers: int = 2) -> float:
    """‖∂L/∂x_l‖/‖∂L/∂x_{l+1}‖ − 1, *not* squared, in the middle of `depth` blocks.

    Pre-activation batch norm, ReLU, He initialisation, unit variance of the input: p/2 over
    depth/2 + π/(π − 1). Zaeemzadeh et al. 2018 (arXiv 1805.07477).
    """
    _check(1, whole=True, depth=depth)
    return power_law_exponent(branch_layers) / 2 / (depth / 2 + batch_norm_growth("relu"))


def mean_path_length(growth: ArrayLike) -> float:
    """Σ (ρ_l − 1)/ρ_l: blocks whose branch the gradient takes, on average over paths.

    Paths weigh as they carry squared gradient. Veit et al. 2016 (arXiv 1605.06431).

    Args:
        growth: ρ_l of each block, of skips that pass the gradient unscaled.
    """
    values = np.asarray(growth, dtype=float)
    for value in values.ravel():
        _check(above=True, growth=value)
    return float(((values - 1) / values).sum())


class PathLengths(NamedTuple):
    """Mean and standard deviation in blocks, and the share of paths in a range of lengths."""

    mean: float
    sd: float
    share: float


def path_length_binomial(blocks: int, low: int = 5, high: int = 17) -> PathLengths:
    """Path lengths when each block's branch is taken or not: Binomial(blocks, ½). Veit et al. 2016.

    Args:
        low, high: of the share, both included.
    """
    _check(1, whole=True, blocks=blocks)
    _check(whole=True, low=low, high=high)
    paths = sum(math.comb(blocks, length) for length in range(low, min(high, blocks) + 1))
    return PathLengths(blocks / 2, math.sqrt(blocks) / 2, paths / 2**blocks)


def expected_depth(blocks: int, drop_rate: float = 0.5) -> float:
    """Blocks that stochastic depth keeps on average, if block l drops with drop_rate·l/blocks.

    (3·blocks − 1)/4 at the default. Huang et al. 2016 (arXiv 1603.09382, §3).
    """
    _check(1, whole=True, blocks=blocks)
    _check(0.0, 1.0, drop_rate=drop_rate)
    return blocks - drop_rate * (blocks + 1) / 2


def highway_growth(gate: float, branch_chi: float = 1.0) -> float:
    """ρ of y = T·F(x) + (1 − T)·x with a constant gate T: T²χ + (1 − T)².

    Args:
        branch_chi: χ, squared growth through F.
    """
    _check(0.0, 1.0, gate=gate)
    _check(branch_chi=branch_chi)
    return gate**2 * branch_chi + (1 - gate) ** 2


# --- cosines of rectifiers ------------------------------------------------------------------------


def relu_cosine_map(c: ArrayLike, negative_slope: float = 0.0) -> Array:
    """The next layer's cosine of two inputs, without biases: x above 0, a·x below.

    c + (1 − a)²/(π(1 + a²))·(√(1 − c²) − c·arccos c), elementwise. Cho & Saul 2009.
    """
    cosine = np.asarray(c, dtype=float)
    bend = (1 - negative_slope) ** 2 / (math.pi * (1 + negative_slope**2))
    return np.minimum(cosine + bend * (np.sqrt(1 - cosine**2) - cosine * np.arccos(cosine)), 1.0)


def gradient_correlation(cosines: ArrayLike, negative_slope: float = 0.0) -> float:
    """Correlation of two inputs' gradients after layers without normalisation.

    The product over layers of E[φ'(u)φ'(v)]/E[φ'²], for ReLU 1 − θ_l/π, θ_l the angle of the
    pre-activations. Balduzzi et al. 2017 (arXiv 1702.08591).

    Args:
        cosines: cos θ_l of each layer that the gradient passes.
    """
    bend = (1 - negative_slope) ** 2 / (math.pi * (1 + negative_slope**2))
    return float(np.prod(1 - bend * np.arccos(np.asarray(cosines, dtype=float))))


def tailored_slope(depth: int, cosine: float = 0.9) -> float:
    """Leaky ReLU's slope that takes orthogonal inputs to this cosine over `depth` activations.

    Zhang et al. 2022 (arXiv 2203.08120): .181, .431, .570 at 20, 50, 100.

    Raises:
        SpecError: ReLU itself stays below that cosine.
    """

    _check(1, whole=True, depth=depth)

    def excess(slope: float) -> float:
        c = np.zeros(())
        for _ in range(depth):
            c = relu_cosine_map(c, slope)
        return float(c) - cosine

    if not 0 < cosine < 1 or excess(0.0) < 0:
        most = excess(0.0) + cosine
        raise SpecError(f"cosine={cosine:g}: allowed is above 0 and up to {most:.4g} at {depth=}")
    return float(brentq(excess, 0.0, 1.0, xtol=1e-14))


# --- convolutions ---------------------------------------------------------------------------------


def _padded_map(size: int, kernel: int) -> Array:
    """(size, size) share of the squared signal from place to place along one dimension."""
    _check(1, whole=True, size=size, kernel=kernel)
    if kernel % 2 == 0:
        raise SpecError(f"kernel={kernel}: allowed is an odd number")
    places = np.arange(size)
    return (abs(places[:, None] - places) <= kernel // 2) / kernel


def _both_sizes(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def padding_leak(size: int | tuple[int, int], kernel: int = 3) -> float:
    """ρ of deep convolutions with zero padding and stride 1, over that with circular padding.

    Windows over the edge lose what they read there, forward and backward: the greatest eigenvalue
    of the map between places, for an odd kernel. [(1 + 2cos(π/(H + 1)))/3]² for 3×3 on H×H.

    Args:
        size: H, or (H, W).
    """
    return math.prod(
        float(np.linalg.eigvalsh(_padded_map(length, kernel))[-1]) for length in _both_sizes(size)
    )


def padding_profile(depth: int, size: int | tuple[int, int], kernel: int = 3) -> Array:
    """(depth + 1,) squared norm left by 0 … depth such convolutions, from a uniform start.

    Activations that scale with their input (rectifiers) leave it as it is; others do not.
    """
    _check(whole=True, depth=depth)
    left = np.ones(depth + 1)
    for length in _both_sizes(size):
        places = np.full(length, 1 / length)
        for layer in range(depth + 1):
            left[layer] *= places.sum()
            places = _padded_map(length, kernel) @ places
    return left


# --- finite width and precision -------------------------------------------------------------------


def jacobian_variance(
    activation: str,
    depth: int,
    *,
    orthogonal: bool = False,
    q: float = 1.0,
    negative_slope: float | None = None,
) -> float:
    """Var(s²)/mean(s²)² over the singular values s of the input-output Jacobian of wide layers.

    L·E[φ'⁴]/E[φ'²]² for Gaussian weights, L less for orthogonal ones: linear L and 0, ReLU 2L, L.
    Pennington et al. 2017 (arXiv 1711.04735).

    Args:
        q: the length in every layer.
    """
    _check(1, whole=True, depth=depth)
    phi = _activation(activation, negative_slope)
    fourth = expectation(lambda u: phi.derivative(u) ** 4, q)
    return depth * (fourth / phi.slope(q) ** 2 - 1 + (not orthogonal))


def log_length_variance(widths: Sequence[int]) -> float:
    """Var ln(‖x_L‖²/‖x_0‖²) over He-initialised ReLU networks: Σ 5/n_l.

    The ratio's mean is 1, so its median is exp(−variance/2). Hanin & Rolnick 2018 (arXiv
    1803.01719).

    Args:
        widths: n_l of each layer.
    """
    for width in widths:
        _check(1, whole=True, widths=width)
    return sum(5 / width for width in widths)


class _Format(NamedTuple):
    smallest: float  # subnormal
    largest: float


FORMATS = {
    "fp16": _Format(2.0**-24, 65504.0),
    "bf16": _Format(2.0**-133, (2 - 2.0**-7) * 2.0**127),
    "fp32": _Format(2.0**-149, (2 - 2.0**-23) * 2.0**127),
    "fp64": _Format(5e-324, 1.7976931348623157e308),
}


def underflow_depth(growth: float, format: str, *, rms: float = 1.0, elements: int = 1) -> float:
    """Layers after which a gradient is all zero (growth < 1), or overflows (growth > 1).

    Where the largest of its elements, taken as Gaussian, has come to half the smallest subnormal
    number, which rounds to zero, or to the largest number. Infinite at growth 1.

    Args:
        growth: ρ, *squared*, per layer.
        format: `fp16`, `bf16`, `fp32`, `fp64`.
        rms: of the gradient's elements at the last layer.
        elements: how many there are: samples × width.

    Raises:
        SpecError: an unknown format.
    """
    if format not in FORMATS:
        raise SpecError(f"format={format}: allowed is {', '.join(FORMATS)}")
    _check(above=True, growth=growth, rms=rms)
    _check(1, whole=True, elements=elements)
    if growth == 1:
        return math.inf
    smallest, most = FORMATS[format]
    limit = math.log(most) if growth > 1 else math.log(smallest) - math.log(2)
    largest = rms * max(1.0, -float(ndtri(1 / (2 * elements))))
    return 2 * (limit - math.log(largest)) / math.log(growth)
