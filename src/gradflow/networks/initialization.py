"""Initial parameters, each drawn from a generator of its own: seed and parameter name decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from gradflow.errors import SpecError
from gradflow.networks.activations import MirroredLinear
from gradflow.seeding import derived_seed
from gradflow.spec import RunSpec


@dataclass(frozen=True)
class Conditions:
    """What a layer's numbers may depend on, beside its shape and their generator.

    Attributes:
        mirrored: whether the layer reads what `crelu` made.
        dtype: type of the parameter, in which orthogonal maps are made so; the random numbers are
            float32's in any.
    """

    activation: str
    negative_slope: float | None = None
    sigma_w: float | None = None
    sigma_b: float | None = None
    mirrored: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def squared_gain(self) -> float:
        """2/(1 + a²), the *squared* gain of a rectifier with slope a below zero (0 for others).

        He et al. 2015b (arXiv 1502.01852, eq. 15).
        """
        slope = (self.negative_slope or 0.0) if self.activation == "leaky_relu" else 0.0
        return 2 / (1 + slope**2)

    @property
    def orthogonal_gain(self) -> float:
        """Singular values of orthogonal maps: √(2/(1 + a²)) before rectifiers, 1 before others."""
        rectifier = self.activation in ("relu", "leaky_relu", "crelu")
        return self.squared_gain**0.5 if rectifier else 1.0


Network = TypeVar("Network", bound=nn.Module)


def initialized(
    make: Callable[[], Network],
    spec: RunSpec,
    *,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
    init: str | None = None,
    others: Mapping[str, str] | None = None,
) -> Network:
    """What `make` builds, on the CPU, in `dtype` and with a spec's initial parameters.

    torch's global generator is used and changed only where `seed` is None: it draws the seed.

    Args:
        spec: its activation, σ and, unless `init` is given, its initialisation are meant.
        others: as for `initialize`.
    """
    init = init or spec.init
    assert init is not None
    assert spec.activation is not None
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    # The layers' constructors draw numbers, which `initialize` replaces.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        network = make().to(dtype)
    initialize(
        network,
        init,
        seed=seed,
        activation=spec.activation,
        negative_slope=spec.negative_slope,
        sigma_w=spec.sigma_w,
        sigma_b=spec.sigma_b,
        others=others,
    )
    return network


def initialize(
    model: nn.Module,
    init: str,
    *,
    seed: int,
    activation: str,
    negative_slope: float | None = None,
    sigma_w: float | None = None,
    sigma_b: float | None = None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Give every parameter and buffer of `model` its initial value, in place.

    Weights of convolutions and linear layers, with fan_in inputs to an output and fan_out outputs
    of an input (kernel included):

        he                N(0, 2/((1 + a²)·fan_in)), a the slope of leaky_relu, else 0
        xavier            N(0, 2/(fan_in + fan_out))
        lecun             N(0, 1/fan_in)
        pytorch           U(±1/√fan_in), biases too
        orthogonal        rows or columns orthogonal, of norm √(2/(1 + a²)) for relu, leaky_relu
                          and crelu, else 1 (Saxe et al. 2013, arXiv 1312.6120)
        delta_orthogonal  the same in the centre of the kernel, zero elsewhere (Xiao et al. 2018,
                          arXiv 1806.05393, algorithm 2)
        gaussian          N(0, σ_w²/fan_in), biases N(0, σ_b²)
        looks_linear      [Ω, −Ω] where the input comes from crelu, else Ω; Ω orthogonal, of norm
                          1: the network is linear (Balduzzi et al. 2017, arXiv 1702.08591, §4)

    Other biases are 0. All other modules take the start values of their `reset_parameters`: norms
    1 and 0, a skip's parameters its own. A parameter's numbers come from a generator seeded with
    (seed, its name in `model`), in float32 on the CPU: they do not depend on other parameters, nor
    on device, type or memory format, and torch's global generator is left as it was. Orthogonal
    maps are made from them in the parameter's type, and so are orthogonal to its precision.

    Args:
        others: layers, by name, that have another `init`.

    Raises:
        SpecError: an unknown `init`, `gaussian` without its σ, `looks_linear` without `crelu`.
    """
    inits = others or {}
    for name in (init, *inits.values()):
        if name not in INITIALIZATIONS:
            raise SpecError(f"init={name}: allowed is {', '.join(INITIALIZATIONS)}")
        if name == "gaussian" and (sigma_w is None or sigma_b is None):
            raise SpecError("init=gaussian: set sigma_w and sigma_b")
        if name == "looks_linear" and activation != "crelu":
            raise SpecError("init=looks_linear: only activation=crelu uses it")
    usual = Conditions(activation, negative_slope, sigma_w, sigma_b)

    def fill(parameter: Tensor, name: str, draw: _Draw, layer: nn.Linear | nn.Conv2d) -> None:
        generator = Generator().manual_seed(derived_seed(seed, name))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        mirrored = isinstance(layer, MirroredLinear)
        conditions = replace(usual, mirrored=mirrored, dtype=dtype)
        parameter.copy_(draw(layer.weight.shape, generator, conditions))

    with torch.no_grad():
        # Children first: a highway skip sets its gate's bias after the gate, a linear layer.
        for prefix, module in reversed(list(model.named_modules())):
            dot = f"{prefix}." if prefix else ""
            if isinstance(module, nn.Linear | nn.Conv2d):
                draw_weight, draw_bias = INITIALIZATIONS[inits.get(prefix, init)]
                fill(module.weight, f"{dot}weight", draw_weight, module)
                if module.bias is not None:
                    fill(module.bias, f"{dot}bias", draw_bias, module)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()


_Draw = Callable[[torch.Size, Generator, Conditions], Tensor]
"""(shape of a layer's weight, generator, conditions) -> its weight, or its bias."""


def _fans(shape: torch.Size) -> tuple[int, int]:
    kernel = shape[2:].numel()
    return shape[1] * kernel, shape[0] * kernel


def _normal(shape: Sequence[int], generator: Generator, variance: float) -> Tensor:
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.mul_(variance**0.5)


def _uniform(shape: Sequence[int], generator: Generator, bound: float) -> Tensor:
    numbers = torch.empty(shape, dtype=torch.float32, device="cpu")
    return numbers.uniform_(-bound, bound, generator=generator)


def _he(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return _normal(shape, generator, given.squared_gain / _fans(shape)[0])


def _xavier(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return _normal(shape, generator, 2 / sum(_fans(shape)))


def _lecun(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return _normal(shape, generator, 1 / _fans(shape)[0])


def _pytorch(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return _uniform(shape, generator, _fans(shape)[0] ** -0.5)


def _pytorch_bias(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return _uniform(shape[:1], generator, _fans(shape)[0] ** -0.5)


def _orthonormal(shape: Sequence[int], generator: Generator, dtype: torch.dtype) -> Tensor:
    """Rows, or where they are more than the columns, columns of length 1 and orthogonal.

    Uniform among those: the signs of QR's factors are fixed (Mezzadri 2006, math-ph/0609050).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    numbers = _normal((rows, columns), generator, 1.0).to(dtype)
    q, r = torch.linalg.qr(numbers.T if rows < columns else numbers)
    q = q * r.diagonal().sign()
    return (q.T if rows < columns else q).reshape(shape)


def _orthogonal(shape: Sequence[int], generator: Generator, given: Conditions) -> Tensor:
    return given.orthogonal_gain * _orthonormal(shape, generator, given.dtype)


def _delta_orthogonal(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    weight = torch.zeros(shape, dtype=given.dtype, device="cpu")
    centre = weight
    for size in shape[2:]:
        centre = centre.select(2, size // 2)
    centre.copy_(_orthogonal(shape[:2], generator, given))
    return weight


def _looks_linear(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    if not given.mirrored:
        return _orthonormal(shape, generator, given.dtype)
    half = _orthonormal((shape[0], shape[1] // 2), generator, given.dtype)
    return torch.cat([half, -half], dim=1)


def _gaussian(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    assert given.sigma_w is not None
    return _normal(shape, generator, given.sigma_w**2 / _fans(shape)[0])


def _gaussian_bias(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    assert given.sigma_b is not None
    return _normal(shape[:1], generator, given.sigma_b**2)


def _zero_bias(shape: torch.Size, generator: Generator, given: Conditions) -> Tensor:
    return torch.zeros(shape[:1], dtype=torch.float32, device="cpu")


INITIALIZATIONS: dict[str, tuple[_Draw, _Draw]] = {
    "he": (_he, _zero_bias),
    "xavier": (_xavier, _zero_bias),
    "lecun": (_lecun, _zero_bias),
    "pytorch": (_pytorch, _pytorch_bias),
    "orthogonal": (_orthogonal, _zero_bias),
    "delta_orthogonal": (_delta_orthogonal, _zero_bias),
    "gaussian": (_gaussian, _gaussian_bias),
    "looks_linear": (_looks_linear, _zero_bias),
}
"""name -> how it draws weights, and biases."""
