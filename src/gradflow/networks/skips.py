"""How a block's branch F(x) and its skip meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.spec import PRESETS, RunSpec

Terms = tuple[Tensor | None, Tensor]

HIGHWAY_BIAS = -2.0
"""Start of the highway gate's bias, T = 0.12: Srivastava et al. 2015 (arXiv 1505.00387, §2.2) want
it negative, such as -1 or -3, so that a new block carries its input."""


class Skip(nn.Module):
    """Joins a block's input x and its branch F(x): `y = β·F(x) + b·(x − sg(x)) + a·sg(x)`.

    sg stops the gradient: a is the dose of the skip in the forward pass, b in the backward pass. A
    term with coefficient 0 and a factor 1 are not computed. As x − sg(x) is exactly zero for finite
    x, `backward_only` equals `none` in the forward pass, bit for bit.

    Kinds beside the dosed ones:
        rezero: y = x + β·F(x), β learnt from 0, `beta` of shape (1,). Bachlechner et al. 2020
            (arXiv 2003.04887, eq. 1); SkipInit, De & Smith 2020 (arXiv 2002.10444).
        highway: y = T·F(x) + (1 − T)·x, T = sigmoid(W·x + c) over the channels at each place.
            Srivastava et al. 2015 (arXiv 1505.00387, eq. 3).
        stochastic_depth: in training y = x + F(x), or x alone with the chance `drop_rate`, one draw
            a batch from torch's global CPU generator; a dropped branch has gradient zero. In
            evaluation y = x + (1 − drop_rate)·F(x). Huang et al. 2016 (arXiv 1603.09382, eq. 2, 5).

    Args:
        kind: `none`, `identity`, `forward_only`, `backward_only`, `dosed`, `rezero`, `highway`,
            `stochastic_depth`; True is `identity`, False is `none`.
        skip_forward, skip_backward: a and b, in place of the kind's own.
        branch_scale: β, for the dosed kinds.
        channels, channel_dim: highway: how many channels, and which dimension they are.
        drop_rate: stochastic_depth: the chance that this block is dropped.

    Raises:
        SpecError: a kind or value that is not allowed.
    """

    def __init__(
        self,
        kind: str | bool = "identity",
        *,
        skip_forward: float | None = None,
        skip_backward: float | None = None,
        branch_scale: float = 1.0,
        channels: int | None = None,
        channel_dim: int = 1,
        drop_rate: float | None = None,
    ) -> None:
        super().__init__()
        spec = RunSpec(
            skip=kind,  # type: ignore[arg-type]  # a bool becomes its name there
            skip_forward=skip_forward,
            skip_backward=skip_backward,
            branch_scale=branch_scale,
            drop_rate=drop_rate,
        )
        assert spec.skip is not None
        self.kind = spec.skip
        self.skip_forward, self.skip_backward = spec.skip_forward, spec.skip_backward
        self.branch_scale, self.drop_rate = spec.branch_scale, spec.drop_rate
        self.channel_dim = channel_dim
        if self.kind == "rezero":
            self.beta = nn.Parameter(torch.empty(1))
        if self.kind == "highway":
            if channels is None:
                raise SpecError("channels=null: skip=highway needs to know how many there are")
            self.gate = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set rezero's β and the bias of highway's gate to their start; its weights stay."""
        if self.kind == "rezero":
            nn.init.zeros_(self.beta)
        if self.kind == "highway":
            nn.init.constant_(self.gate.bias, HIGHWAY_BIAS)

    @property
    def uses_skip(self) -> bool:
        """Whether x matters at all; where not, nobody need compute it."""
        return self.kind != "none"

    def terms(self, x: Tensor, branch: Tensor) -> Terms:
        """What is added up: the skip's term, None where there is none, and the branch's.

        Args:
            x: the block's input, or its shortcut's output where shapes change.
            branch: F(x), in the same shape.
        """
        return SKIPS[self.kind](self, x, branch)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """y, in the shape of x and branch."""
        skip_term, branch_term = self.terms(x, branch)
        return branch_term if skip_term is None else branch_term + skip_term

    def extra_repr(self) -> str:
        names = ("skip_forward", "skip_backward", "branch_scale", "drop_rate")
        values = [f"{n}={getattr(self, n):g}" for n in names if getattr(self, n) is not None]
        return ", ".join([self.kind, *values])


def _scaled(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1 else factor * x


def _dosed(skip: Skip, x: Tensor, branch: Tensor) -> Terms:
    a, b, beta = skip.skip_forward, skip.skip_backward, skip.branch_scale
    assert a is not None
    assert b is not None
    assert beta is not None
    branch_term = torch.zeros_like(branch) if beta == 0 else _scaled(beta, branch)
    if a == b:
        return (_scaled(a, x) if a else None), branch_term
    # Together these are a·x in value, exactly, as x − sg(x) is zero; only the gradient is b's.
    forward = _scaled(a, x.detach()) if a else None
    backward = _scaled(b, x - x.detach()) if b else None
    if forward is None or backward is None:
        return (backward if forward is None else forward), branch_term
    return backward + forward, branch_term


def _rezero(skip: Skip, x: Tensor, branch: Tensor) -> Terms:
    return x, skip.beta * branch


def _highway(skip: Skip, x: Tensor, branch: Tensor) -> Terms:
    gate = torch.sigmoid(skip.gate(x.movedim(skip.channel_dim, -1)))
    transform = gate.movedim(-1, skip.channel_dim)
    return (1 - transform) * x, transform * branch


def _stochastic_depth(skip: Skip, x: Tensor, branch: Tensor) -> Terms:
    assert skip.drop_rate is not None
    survival = 1 - skip.drop_rate
    if skip.training:
        survival = float(torch.rand(()) < survival)
    return x, _scaled(survival, branch)


SKIPS: dict[str, Callable[[Skip, Tensor, Tensor], Terms]] = {
    **dict.fromkeys((*PRESETS, "dosed"), _dosed),
    "rezero": _rezero,
    "highway": _highway,
    "stochastic_depth": _stochastic_depth,
}
