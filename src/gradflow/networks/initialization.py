"""Initial parameters, each drawn from a generator of its own: seed and parameter name decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gradflow.errors import SpecError
from gradflow.seeding import derived_seed


@dataclass(frozen=True)
class Scale:
    """What an initialisation's variance may depend on, beside the fans."""

    activation: str
    negative_slope: float | None = None
    sigma_w: float | None = None
    sigma_b: float | None = None

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
        rectifier = self.activation in ("relu", "leaky_relu")
        return self.squared_gain**0.5 if rectifier else 1.0


def initialize(
    model: nn.Module,
    init: str,
    *,
    seed: int,
    activation: str,
    negative_slope: float | None = None,
    sigma_w: float | None = None,
    sigma_b: float | None = None,
) -> None:
    """Give every parameter and buffer of `model` its initial value, in place.

    Weights of convolutions and linear layers, with fan_in inputs to an output and fan_out outputs
    of an input (kernel included):

        he                N(0, 2/((1 + a²)·fan_in)), a the slope of leaky_relu, else 0
        xavier            N(0, 2/(fan_in + fan_out))
        lecun             N(0, 1/fan_in)
        pytorch           U(±1/√fan_in), biases too
        orthogonal        rows or columns orthogonal, of norm √(2/(1 + a²)) for relu and
                          leaky_relu, else 1 (Saxe et al. 2013, arXiv 1312.6120)
        delta_orthogonal  the same in the centre of the kernel, zero elsewhere (Xiao et al. 2018,
                          arXiv 1806.05393, algorithm 2)
        gaussian          N(0, σ_w²/fan_in), biases N(0, σ_b²)

    Other biases are 0. All other modules take the start values of their `reset_parameters`: norms
    1 and 0, a skip's parameters its own. A parameter's numbers come from a generator seeded with
    (seed, its name in `model`), in float32 on the CPU: they do not depend on other parameters, nor
    on device, type or memory format, and torch's global generator is left as it was.

    Raises:
        SpecError: an unknown `init`, or `gaussian` without its σ.
    """
    if init not in INITIALIZATIONS:
        raise SpecError(f"init={init}: allowed is {', '.join(INITIALIZATIONS)}")
    if init == "gaussian" and (sigma_w is None or sigma_b is None):
        raise SpecError("init=gaussian: set sigma_w and sigma_b")
    draw_weight, draw_bias = INITIALIZATIONS[init]
    scale = Scale(activation, negative_slope, sigma_w, sigma_b)

    def fill(parameter: Tensor, name: str, draw: _Draw, shape: torch.Size) -> None:
        generator = Generator().manual_seed(derived_seed(seed, name))
        parameter.copy_(draw(shape, generator, scale))

    with torch.no_grad():
        # Children first: a highway skip sets its gate's bias after the gate, a linear layer.
        for prefix, module in reversed(list(model.named_modules())):
            dot = f"{prefix}." if prefix else ""
            if isinstance(module, nn.Linear | nn.Conv2d):
                fill(module.weight, f"{dot}weight", draw_weight, module.weight.shape)
                if module.bias is not None:
                    fill(module.bias, f"{dot}bias", draw_bias, module.weight.shape)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()


_Draw = Callable[[torch.Size, Generator, Scale], Tensor]
"""(shape of a layer's weight, generator, scale) -> its weight, or its bias."""


def _fans(shape: torch.Size) -> tuple[int, int]:
    kernel = shape[2:].numel()
    return shape[1] * kernel, shape[0] * kernel


def _normal(shape: Sequence[int], generator: Generator, variance: float) -> Tensor:
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.mul_(variance**0.5)


def _uniform(shape: Sequence[int], generator: Generator, bound: float) -> Tensor:
    numbers = torch.empty(shape, dtype=torch.float32, device="cpu")
    return numbers.uniform_(-bound, bound, generator=generator)


def _he(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return _normal(shape, generator, scale.squared_gain / _fans(shape)[0])


def _xavier(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return _normal(shape, generator, 2 / sum(_fans(shape)))


def _lecun(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return _normal(shape, generator, 1 / _fans(shape)[0])


def _pytorch(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return _uniform(shape, generator, _fans(shape)[0] ** -0.5)


def _pytorch_bias(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return _uniform(shape[:1], generator, _fans(shape)[0] ** -0.5)


def _orthogonal(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    return nn.init.orthogonal_(weight, scale.orthogonal_gain, generator)


def _delta_orthogonal(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    weight = torch.zeros(shape, dtype=torch.float32, device="cpu")
    centre = weight
    for size in shape[2:]:
        centre = centre.select(2, size // 2)
    centre.copy_(_orthogonal(shape[:2], generator, scale))
    return weight


def _gaussian(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    assert scale.sigma_w is not None
    return _normal(shape, generator, scale.sigma_w**2 / _fans(shape)[0])


def _gaussian_bias(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    assert scale.sigma_b is not None
    return _normal(shape[:1], generator, scale.sigma_b**2)


def _zero_bias(shape: torch.Size, generator: Generator, scale: Scale) -> Tensor:
    return torch.zeros(shape[:1], dtype=torch.float32, device="cpu")


INITIALIZATIONS: dict[str, tuple[_Draw, _Draw]] = {
    "he": (_he, _zero_bias),
    "xavier": (_xavier, _zero_bias),
    "lecun": (_lecun, _zero_bias),
    "pytorch": (_pytorch, _pytorch_bias),
    "orthogonal": (_orthogonal, _zero_bias),
    "delta_orthogonal": (_delta_orthogonal, _zero_bias),
    "gaussian": (_gaussian, _gaussian_bias),
}
"""name -> how it draws weights, and biases."""
