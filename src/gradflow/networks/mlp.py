"""The square fully connected network, of which exact theory speaks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from gradflow.networks.layers import Layers
from gradflow.networks.resnet import MakeSkip


class MLP(nn.Module):
    """A multilayer perceptron with skips around its hidden layers: (N, …) -> logits (N, classes).

    The input is flattened. `layers.0` maps it to the width, `layers.1` … are square, `readout` maps
    to the logits; `norms.k` normalises what `layers.k` adds to: its own output (order `post`), or
    the sum after it (order `pre`). So names, and with them the initial parameters, do not depend
    on the skip nor on `branch_layers`. With one layer a branch:

        post: h = act(norm(W₀x)), then h = act(skip(h, norm(W·h))) for each hidden layer
        pre:  h = W₀x, then h = skip(h, W·act(norm(h))), and act(norm(h)) before the readout

    With two, act(norm(W₁·)) comes before W₂ inside the branch. Without skips all three are the
    plain network of that order. Activation `crelu` doubles the inputs of all maps but `layers.0`;
    h itself is doubled with order `post`, which therefore has it without skips alone.

    Args:
        depth: weight layers, `layers.0` and the readout included.
        branch_layers: linear maps a branch; has to divide depth − 2.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int,
        branch_layers: int,
        order: str,
        layers: Layers,
        make_skip: MakeSkip,
        in_features: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.pre = order == "pre"
        self.branch_layers = branch_layers
        sizes = [in_features] + [width] * (depth - 1)
        self.layers = nn.ModuleList(
            layers.linear(before, after, activated=k > 0)
            for k, (before, after) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(layers.normalize_vectors(width) for _ in self.layers)
        blocks = (depth - 2) // branch_layers
        self.skips = nn.ModuleList(make_skip(k + 1, blocks, width) for k in range(blocks))
        self.activation = layers.activate()
        self.readout = layers.readout(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x.flatten(1))
        if not self.pre:
            h = self.activation(self.norms[0](h))
        for block, skip in enumerate(self.skips):
            h = skip(h, self.branch(block, h))
            h = h if self.pre else self.activation(h)
        if self.pre:
            h = self.activation(self.norms[-1](h))
        logits: Tensor = self.readout(h)
        return logits

    def branch(self, block: int, h: Tensor) -> Tensor:
        """F(h) of a block, counted from 0."""
        first = 1 + block * self.branch_layers
        for k in range(first, first + self.branch_layers):
            if self.pre:
                h = self.layers[k](self.activation(self.norms[k - 1](h)))
            else:
                h = self.norms[k](self.layers[k](h if k == first else self.activation(h)))
        return h
