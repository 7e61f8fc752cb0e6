"""Activations that torch does not have, and the linear map that reads a mirrored one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CReLU(nn.Module):
    """relu(x) and relu(−x) side by side: twice the features, and nothing of x is lost.

    (…, C) becomes (…, 2C); ‖crelu(x)‖ = ‖x‖. Shang et al. 2016 (arXiv 1603.05201).
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], dim=-1)


class MirroredLinear(nn.Linear):
    """The linear map of what `CReLU` made of `features` features: its weight is twice as wide.

    With weight [Ω, −Ω] it gives Ωx exactly, as relu(x) − relu(−x) = x: `looks_linear` draws it so.
    """

    def __init__(self, features: int, features_out: int, bias: bool = True) -> None:
        super().__init__(2 * features, features_out, bias)


class TailoredReLU(nn.Module):
    """√(2/(1 + a²))·leaky_relu(x, a): E[φ(z)²] = 1 for z ~ N(0, 1).

    Zhang et al. 2022 (arXiv 2203.08120). Its factor and weights of variance 1/fan_in
    (`lecun`) are leaky_relu and `he`: gradflow's own networks have it as `activation=leaky_relu
    negative_slope=a init=he`.
    """

    def __init__(self, negative_slope: float) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.factor = (2 / (1 + negative_slope**2)) ** 0.5

    @classmethod
    def at_depth(cls, depth: int, cosine: float = 0.9) -> TailoredReLU:
        """With the slope that takes orthogonal inputs to this cosine over `depth` activations."""
        from gradflow.theory import tailored_slope

        return cls(float(tailored_slope(depth, cosine)))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"
