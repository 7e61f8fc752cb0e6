"""The layers that networks are made of: linear maps, normalisations, activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gradflow.errors import SpecError
from gradflow.networks.activations import CReLU, MirroredLinear
from gradflow.spec import RunSpec


def check_sizes(**sizes: object) -> None:
    """Raise SpecError in one line where one of these is no whole number from 1."""
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"{key}={value}: allowed is a whole number from 1")


@dataclass(frozen=True)
class Layers:
    """Makes a network's layers, all of one style; names and values as in `gradflow.spec`.

    Attributes:
        groups: groups of channels, used by norm `group` alone.
        negative_slope: slope below zero, used by activation `leaky_relu` alone.
    """

    norm: str
    groups: int | None
    activation: str
    negative_slope: float | None
    padding: str

    @classmethod
    def of(cls, spec: RunSpec) -> Layers:
        """Those of a spec's network."""
        assert spec.norm is not None
        assert spec.activation is not None
        return cls(
            norm=spec.norm,
            groups=spec.groups,
            activation=spec.activation,
            negative_slope=spec.negative_slope,
            padding=spec.padding or "zeros",
        )

    def convolution(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1
    ) -> nn.Conv2d:
        """A convolution that keeps H and W, divided by the stride and rounded up.

        It has a bias exactly where no normalisation follows to take it away.
        """
        return nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            stride,
            padding=kernel // 2,
            padding_mode=self.padding,  # type: ignore[arg-type]  # one of spec.PADDINGS
            bias=self.norm == "none",
        )

    def linear(self, features_in: int, features_out: int, *, activated: bool) -> nn.Linear:
        """A hidden linear map, with a bias exactly where no normalisation takes it away.

        Args:
            activated: whether its input comes from the activation; that of `crelu` made
                2·features_in of features_in.
        """
        return self._linear_kind(activated)(features_in, features_out, bias=self.norm == "none")

    def readout(self, features_in: int, num_classes: int) -> nn.Linear:
        """The linear map from the last activation to the logits, always with a bias."""
        return self._linear_kind(True)(features_in, num_classes)

    def _linear_kind(self, activated: bool) -> type[nn.Linear]:
        return MirroredLinear if activated and self.activation == "crelu" else nn.Linear

    def normalize_maps(self, channels: int) -> nn.Module:
        """The normalisation of feature maps (N, C, H, W)."""
        return NORMS[self.norm][0](channels, self.groups)

    def normalize_vectors(self, channels: int) -> nn.Module:
        """The normalisation of vectors (N, C)."""
        return NORMS[self.norm][1](channels, self.groups)

    def activate(self) -> nn.Module:
        """The activation, never in place."""
        return ACTIVATIONS[self.activation](self.negative_slope)


def _group(channels: int, groups: int | None) -> nn.Module:
    if not groups or channels % groups:
        raise SpecError(f"groups={groups}: does not divide {channels} channels")
    return nn.GroupNorm(groups, channels)


_Norm = Callable[[int, int | None], nn.Module]
NORMS: dict[str, tuple[_Norm, _Norm]] = {
    "batch": (lambda c, _: nn.BatchNorm2d(c), lambda c, _: nn.BatchNorm1d(c)),
    "layer": (lambda c, _: nn.GroupNorm(1, c), lambda c, _: nn.LayerNorm(c)),
    "group": (_group, _group),
    "none": (lambda c, _: nn.Identity(), lambda c, _: nn.Identity()),
}
"""name -> the normalisation of C channels in groups: of feature maps, and of vectors."""


def _leaky_relu(slope: float | None) -> nn.Module:
    if slope is None:
        raise SpecError("negative_slope=null: activation=leaky_relu needs a number")
    return nn.LeakyReLU(slope)


ACTIVATIONS: dict[str, Callable[[float | None], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "leaky_relu": _leaky_relu,
    "tanh": lambda _: nn.Tanh(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "gelu": lambda _: nn.GELU(),
    "silu": lambda _: nn.SiLU(),
    "linear": lambda _: nn.Identity(),
    "crelu": lambda _: CReLU(),
}
"""name -> the activation with that slope below zero."""
