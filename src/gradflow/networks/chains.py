"""Networks without stem and readout, of which exact theory speaks: equal blocks in a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.networks.initialization import initialized
from gradflow.networks.layers import Layers, check_sizes
from gradflow.networks.skips import Skip
from gradflow.spec import RunSpec

WORDS = ("linear", "act", "norm")
"""What a branch is made of."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class ChainBlock(nn.Module):
    """y = skip(x, F(x))."""

    def __init__(self, branch: nn.Module, skip: Skip) -> None:
        super().__init__()
        self.branch = branch
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x, self.branch(x))
        return y


class Chain(nn.Module):
    """Blocks in a row, `blocks.0`, `blocks.1`, …, each with its `branch` and its `skip`.

    Args:
        features: how many the input is to have when it is flattened; None leaves it as it is.
        scale: factor on the input.
    """

    def __init__(
        self, blocks: Sequence[ChainBlock], features: int | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.features, self.scale = features, scale
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.features is not None:
            x = x.flatten(1)
            check_features(self.features, x)
        y: Tensor = self.blocks(x if self.scale == 1 else self.scale * x)
        return y


def check_features(width: int, x: Tensor) -> None:
    """Raise SpecError where the input's last dimension is not the width."""
    if x.shape[-1] != width:
        raise SpecError(f"width={width}: the input has {x.shape[-1]} features")


def chain(
    depth: int,
    width: int,
    *,
    branch: str = "linear act",
    skip: str | bool = "none",
    skip_forward: float | None = None,
    skip_backward: float | None = None,
    branch_scale: float = 1.0,
    activation: str = "relu",
    negative_slope: float | None = None,
    norm: str = "none",
    init: str | Sequence[str] = "he",
    sigma_w: float | None = None,
    sigma_b: float | None = None,
    gate_bias: float | None = None,
    seed: int | None = None,
    dtype: str = "float32",
) -> Chain:
    """`depth` blocks x ← skip(x, F(x)) of square linear maps: (N, …), flattened, -> (N, width).

    The linear maps are `blocks.0.branch.linear1`, …, with biases only where norm is `none`, as in
    gradflow's other networks; the norms `blocks.0.branch.norm1`, ….

    Args:
        branch: F, in the order in which it is computed. `linear act`: x + φ(Wx), Yang & Schoenholz
            2017 (arXiv 1712.08969); `linear act linear`: x + αW₂φ(W₁x), Taki 2017 (arXiv
            1709.02956); `norm act linear`: pre-activation; `linear act linear norm`: batch norm
            last in the branch, De & Smith 2020 (arXiv 2002.10444).
        skip, skip_forward, skip_backward, branch_scale: see `Skip`; branch_scale is Taki's α.
        norm: which one the word norm stands for.
        init: one name, or one for each linear map of a branch, as Taki's ["he", "lecun"]; see
            `initialize`.
        gate_bias: with skip=highway, the gate is T = sigmoid(gate_bias) everywhere: its weights
            start at zero. By default they are random and the bias −2.
        seed: of the parameters; None draws it from torch's global generator.
        dtype: float32 or float64, in which orthogonal maps are orthogonal to 1e-15.

    Raises:
        SpecError: one line with the key, the value and what is allowed.
    """
    check_sizes(depth=depth, width=width)
    words = _words(branch, norm=norm, activation=activation)
    inits = _inits(init, words.count("linear"))
    spec = RunSpec(
        network="mlp",  # type: ignore[arg-type]  # a name becomes its part there
        width=width,
        order="pre",
        skip=skip,  # type: ignore[arg-type]  # a bool becomes its name there
        skip_forward=skip_forward,
        skip_backward=skip_backward,
        branch_scale=branch_scale,
        norm=norm,
        activation=activation,
        negative_slope=negative_slope,
        init="gaussian" if "gaussian" in inits else inits[0],
        sigma_w=sigma_w,
        sigma_b=sigma_b,
    )
    if gate_bias is not None and spec.skip != "highway":
        raise SpecError(f"gate_bias={gate_bias}: only skip=highway uses it")
    join = partial(
        Skip,
        skip,
        skip_forward=skip_forward,
        skip_backward=skip_backward,
        branch_scale=branch_scale,
        channels=width,
    )
    layers = Layers.of(spec)

    def block() -> ChainBlock:
        return ChainBlock(_branch(words, width, layers), join())

    others = {
        f"blocks.{block}.branch.linear{number}": name
        for block in range(depth)
        for number, name in enumerate(inits, 1)
    }
    network = initialized(
        lambda: Chain([block() for _ in range(depth)], width),
        spec,
        init=inits[0],
        others=others,
        seed=seed,
        dtype=_dtype(dtype),
    )
    if gate_bias is not None:
        for module in network.modules():
            if isinstance(module, Skip):
                nn.init.zeros_(module.gate.weight)
                nn.init.constant_(module.gate.bias, gate_bias)
    return network


def conv_chain(
    depth: int,
    channels: int,
    *,
    activation: str = "linear",
    negative_slope: float | None = None,
    init: str = "delta_orthogonal",
    sigma_w: float | None = None,
    sigma_b: float | None = None,
    kernel: int = 3,
    padding: str = "circular",
    scale: float = 1.0,
    seed: int | None = None,
    dtype: str = "float32",
) -> Chain:
    """`depth` blocks x ← φ(w * x) of convolutions: (N, channels, H, W) -> the same shape.

    Linear, delta-orthogonal and in float64 it keeps norms to rounding, whatever the depth: Xiao et
    al. 2018 (arXiv 1806.05393). The convolutions are `blocks.0.branch.conv1`, ….

    Args:
        kernel: height and width of the kernels, odd.
        padding: `circular`, or `zeros`, whose border takes something from every norm.
        scale: factor on the input, whose length decides how far tanh bends.
        seed, dtype: as for `chain`.

    Raises:
        SpecError: one line with the key, the value and what is allowed.
    """
    check_sizes(depth=depth, channels=channels, kernel=kernel)
    if kernel % 2 == 0:
        raise SpecError(f"kernel={kernel}: allowed is an odd number")
    spec = RunSpec(
        skip="none",
        norm="none",
        activation=activation,
        negative_slope=negative_slope,
        init=init,
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        padding=padding,
    )
    layers = Layers.of(spec)

    def block() -> ChainBlock:
        branch = nn.Sequential()
        branch.add_module("conv1", layers.convolution(channels, channels, kernel))
        branch.add_module("act1", layers.activate())
        return ChainBlock(branch, Skip("none"))

    return initialized(
        lambda: Chain([block() for _ in range(depth)], scale=scale),
        spec,
        seed=seed,
        dtype=_dtype(dtype),
    )


def _branch(words: Sequence[str], width: int, layers: Layers) -> nn.Sequential:
    """F: each word's modules are numbered from 1."""
    branch = nn.Sequential()
    made = dict.fromkeys(WORDS, 0)
    for before, word in pairwise(["", *words]):
        made[word] += 1
        if word == "linear":
            module: nn.Module = layers.linear(width, width, activated=before == "act")
        else:
            module = layers.activate() if word == "act" else layers.normalize_vectors(width)
        branch.add_module(f"{word}{made[word]}", module)
    return branch


def _words(branch: str, *, norm: str, activation: str) -> list[str]:
    words = branch.split() if isinstance(branch, str) else []
    if "linear" not in words or not set(words) <= set(WORDS):
        raise SpecError(f"branch={branch}: allowed is {', '.join(WORDS)}, with a linear among them")
    if ("norm" in words) != (norm != "none"):
        has = "has the word norm" if norm == "none" else "lacks the word norm"
        raise SpecError(f"norm={norm}: branch={branch} {has}")
    follows = {after for word, after in pairwise([*words, "nothing"]) if word == "act"}
    if activation == "crelu" and follows - {"linear"}:
        raise SpecError(f"activation=crelu: in branch={branch} not every act has a linear after it")
    return words


def _inits(init: str | Sequence[str], linear_maps: int) -> list[str]:
    names = [init] * linear_maps if isinstance(init, str) else list(init)
    if len(names) != linear_maps:
        raise SpecError(f"init={init}: allowed is one name, or {linear_maps} for the linear maps")
    return names


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SpecError(f"dtype={name}: allowed is {', '.join(DTYPES)}")
    return DTYPES[name]
